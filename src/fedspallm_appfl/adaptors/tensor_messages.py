"""Send a dict with tensors in it through MPI without copying a tensor.

The dict goes ahead as JSON, in which every tensor is replaced by its dtype and shape; the tensors follow one by one, each
straight from and into its own memory. MPI keeps messages between two ranks in order, so nothing has to be numbered.
"""

import itertools
import math
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor

from fedspallm_appfl.wire.as_bytes import fill, memory, read_description

ALIGNMENT = 64  # bytes, as torch allocates


class Inbox:
    """Takes messages in, one at a time.

    The memory of a message is kept for the next one, as new memory is slow to fill: whoever gets a payload has to be done
    with its tensors, or copy them, before the next message is taken in. Server and clients fold or store them at once.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def receive(self, comm: Any, description: bytes, rank: int, tag: int) -> Any:
        """The payload of a description, with its tensors received."""
        payload, described = read_description(description)
        tensors = [(getattr(torch, dtype), shape) for dtype, shape in described]
        sizes = [math.prod(shape) * dtype.itemsize for dtype, shape in tensors]
        starts = list(itertools.accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes), initial=0))
        if starts[-1] > len(self._memory):
            self._memory = torch.empty(0, dtype=torch.uint8)  # not both at a time
            self._memory = torch.empty(starts[-1], dtype=torch.uint8)
        parts = [self._memory[start : start + size] for start, size in zip(starts, sizes, strict=False)]
        for part in parts:
            comm.Recv([part.numpy().data, MPI.BYTE], source=rank, tag=tag)
        filled = [part.view(dtype).view(shape) for part, (dtype, shape) in zip(parts, tensors, strict=True)]
        return fill(payload, filled)


def send(comm: Any, tensors: list[Tensor], rank: int, tag: int) -> None:
    """Send the tensors of a payload, each below 2^31 bytes."""
    for tensor in tensors:
        comm.Send([memory(tensor), MPI.BYTE], dest=rank, tag=tag)
