"""Memory that messages are received into, for transports that carry tensors one by one (MPI, worker processes)."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch

from fedspallm_appfl.wire.as_bytes import fill, memory, read_description

ALIGNMENT = 64  # bytes, as torch allocates


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
