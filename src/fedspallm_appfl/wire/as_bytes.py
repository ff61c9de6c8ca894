"""A payload as a description and the memory of its tensors, for transports that carry only bytes: no pickle.

As one byte string it is checked on reading:

8 bytes, little endian   length n of the description
n bytes                  JSON: the payload with every tensor replaced by its dtype and shape
the rest                 the memory of the tensors, one after the other
"""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedspallm_appfl.errors import UpdateError, quoted

TENSOR = "\0tensor"  # the key that marks a tensor; no client, block or linear has this name
HEAD = 8  # bytes
ALIGNMENT = 64  # bytes, as torch allocates
LARGEST = 2**48  # limit for a side of a tensor
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (*INTEGERS, *FLOATS)}


def take_apart(payload: Any) -> tuple[bytes, list[Tensor]]:
    """A payload of dicts, lists, tensors and JSON values -> (JSON with a description of each tensor, the tensors)."""
    tensors: list[Tensor] = []

    def describe(part: Any) -> Any:
        if isinstance(part, Tensor):
            tensors.append(part.detach().cpu().contiguous())
            return {TENSOR: [str(part.dtype).removeprefix("torch."), list(part.shape)]}
        if isinstance(part, dict):
            return {str(key): describe(value) for key, value in part.items()}
        return [describe(value) for value in part] if isinstance(part, list | tuple) else part

    return json.dumps(describe(payload)).encode(), tensors


@dataclass
class Placeholder:
    """Placeholder for a tensor that follows its description."""

    number: int


def read_description(description: bytes) -> tuple[Any, list[tuple[str, list[int]]]]:
    """The payload of a description with placeholders in it, and the (dtype, shape) of each tensor."""
    found: list[tuple[str, list[int]]] = []

    def replace(part: dict[str, Any]) -> Any:
        if set(part) != {TENSOR}:
            return part
        dtype, shape = part[TENSOR]
        found.append((dtype, shape))
        return Placeholder(len(found) - 1)

    return json.loads(description, object_hook=replace), found


def fill(part: Any, tensors: list[Tensor]) -> Any:
    """Replace the placeholders of a payload by its tensors."""
    if isinstance(part, Placeholder):
        return tensors[part.number]
    if isinstance(part, dict):
        return {key: fill(value, tensors) for key, value in part.items()}
    return [fill(value, tensors) for value in part] if isinstance(part, list) else part


def memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return tensor.view(-1).view(torch.uint8).numpy().data


class Inbox:
    """Takes messages in, one at a time.

    The memory of a message is kept for the next one, as new memory is slow to fill: whoever gets a payload has to be done
    with its tensors, or copy them, before the next message is taken in. Server and clients fold or store them at once.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def receive(self, description: bytes, receive: Callable[[memoryview], Any]) -> Any:
        """The payload of a description, with its tensors received.

        Args:
            description: as `take_apart` makes it.
            receive: fills the memory of the next tensor.
        """
        payload, described = read_description(description)
        tensors = [(getattr(torch, dtype), shape) for dtype, shape in described]
        sizes = [math.prod(shape) * dtype.itemsize for dtype, shape in tensors]
        starts = list(itertools.accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes), initial=0))
        if starts[-1] > len(self._memory):
            self._memory = torch.empty(0, dtype=torch.uint8)  # not both at a time
            self._memory = torch.empty(starts[-1], dtype=torch.uint8)
        parts = [self._memory[start : start + size] for start, size in zip(starts, sizes, strict=False)]
        for part in parts:
            receive(memory(part))
        filled = [part.view(dtype).view(shape) for part, (dtype, shape) in zip(parts, tensors, strict=True)]
        return fill(payload, filled)


def to_bytes(payload: Any) -> bytes:
    """A payload as bytes; makes one copy of its tensors."""
    description, tensors = take_apart(payload)
    return b"".join([len(description).to_bytes(HEAD, "little"), description, *map(memory, tensors)])


def from_bytes(data: bytes, sender: str) -> Any:
    """The payload that `to_bytes` packed; its tensors use a copy of the bytes.

    Args:
        data: the received bytes.
        sender: sender to name in errors.

    Raises:
        UpdateError: it does not have this format, or describes other tensors than it contains.
    """
    size = int.from_bytes(data[:HEAD], "little")
    try:
        payload, described = read_description(bytes(data[HEAD : HEAD + size]))
        shapes = [(_dtype(name), _shape(shape)) for name, shape in described]
        fill(payload, [torch.empty(0)] * len(shapes))  # check that it can be traversed
    except (ValueError, TypeError, RecursionError) as error:
        raise UpdateError(f"refused an update from {sender}: its description cannot be read: {error}") from error
    sizes = [math.prod(shape) * dtype.itemsize for dtype, shape in shapes]
    if sum(sizes) != len(data) - HEAD - size:
        raise UpdateError(
            f"refused an update from {sender}: it describes {sum(sizes)} bytes of tensors, "
            f"{len(data) - HEAD - size} are there"
        )
    tensors, start, whole = [], HEAD + size, memoryview(data)
    for (dtype, shape), length in zip(shapes, sizes, strict=True):
        part = torch.frombuffer(bytearray(whole[start : start + length]), dtype=dtype) if length else torch.empty(0)
        tensors.append(part.to(dtype).view(shape))
        start += length
    return fill(payload, tensors)


def _dtype(name: Any) -> torch.dtype:
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"a dtype must be one of {', '.join(DTYPES)}, got {quoted(name)}")
    return DTYPES[name]


def _shape(shape: Any) -> list[int]:
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < LARGEST for size in shape):
        raise ValueError(f"a shape must be a list of sizes, got {quoted(shape)}")
    return shape
