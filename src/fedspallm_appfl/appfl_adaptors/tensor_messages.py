"""Send a dict with tensors in it through MPI without copying a tensor.

The dict goes ahead as JSON, in which every tensor is replaced by its dtype and shape; the tensors follow one by one, each
straight from and into its own memory. MPI keeps messages between two ranks in order, so nothing has to be numbered.
"""

import itertools
import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor

ALIGNMENT = 64  # bytes, as torch allocates
TENSOR = "\0tensor"  # the key that stands for one; no client, block or linear is called so


def take_apart(payload: Any) -> tuple[bytes, list[Tensor]]:
    """A payload of dicts, lists, tensors and what JSON knows -> (JSON with a description of each tensor, the tensors)."""
    tensors: list[Tensor] = []

    def describe(part: Any) -> Any:
        if isinstance(part, Tensor):
            tensors.append(part.detach().cpu().contiguous())
            return {TENSOR: [str(part.dtype).removeprefix("torch."), list(part.shape)]}
        if isinstance(part, dict):
            return {str(key): describe(value) for key, value in part.items()}
        return [describe(value) for value in part] if isinstance(part, list | tuple) else part

    return json.dumps(describe(payload)).encode(), tensors


class Inbox:
    """Takes messages in, one at a time.

    The memory of a message is kept for the next one, as new memory is slow to fill: whoever gets a payload has to be done
    with its tensors, or copy them, before the next message is taken in. Server and clients fold or store them at once.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def receive(self, comm: Any, description: bytes, rank: int, tag: int) -> Any:
        """The payload of a description, with its tensors received."""
        tensors: list[tuple[torch.dtype, list[int]]] = []
        payload = json.loads(description, object_hook=lambda part: _placeholder(part, tensors))
        sizes = [math.prod(shape) * dtype.itemsize for dtype, shape in tensors]
        starts = list(itertools.accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes), initial=0))
        if starts[-1] > len(self._memory):
            self._memory = torch.empty(0, dtype=torch.uint8)  # not both at a time
            self._memory = torch.empty(starts[-1], dtype=torch.uint8)
        parts = [self._memory[start : start + size] for start, size in zip(starts, sizes, strict=False)]
        for part in parts:
            comm.Recv([part.numpy().data, MPI.BYTE], source=rank, tag=tag)
        filled = [part.view(dtype).view(shape) for part, (dtype, shape) in zip(parts, tensors, strict=True)]
        return _filled(payload, filled)


@dataclass
class _Placeholder:
    number: int


def _placeholder(part: dict[str, Any], tensors: list[tuple[torch.dtype, list[int]]]) -> Any:
    if set(part) != {TENSOR}:
        return part
    dtype, shape = part[TENSOR]
    tensors.append((getattr(torch, dtype), shape))
    return _Placeholder(len(tensors) - 1)


def _filled(part: Any, tensors: list[Tensor]) -> Any:
    if isinstance(part, _Placeholder):
        return tensors[part.number]
    if isinstance(part, dict):
        return {key: _filled(value, tensors) for key, value in part.items()}
    return [_filled(value, tensors) for value in part] if isinstance(part, list) else part


def send(comm: Any, tensors: list[Tensor], rank: int, tag: int) -> None:
    """Send the tensors of a payload, each below 2^31 bytes."""
    for tensor in tensors:
        comm.Send([_memory(tensor), MPI.BYTE], dest=rank, tag=tag)


def _memory(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data
