"""Send a dict with tensors in it through MPI without copying a tensor.

The dict goes ahead as JSON, in which every tensor is replaced by its dtype and shape; the tensors follow one by one, each
straight from and into its own memory. MPI keeps messages between two ranks in order, so nothing has to be numbered.
"""

import json
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor

from fedspallm_appfl import allocation

TENSOR = "tensor"  # the key that stands for one; no key of an update is called so


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


def put_together(description: bytes) -> tuple[Any, list[Tensor]]:
    """What `take_apart` took apart, with empty tensors to be filled: (payload, its tensors in order)."""
    tensors: list[Tensor] = []

    def build(part: Any) -> Any:
        if isinstance(part, dict) and set(part) == {TENSOR}:
            dtype, shape = part[TENSOR]
            tensors.append(allocation.empty(tuple(shape), getattr(torch, dtype)))
            return tensors[-1]
        if isinstance(part, dict):
            return {key: build(value) for key, value in part.items()}
        return [build(value) for value in part] if isinstance(part, list) else part

    return build(json.loads(description)), tensors


def send(comm: Any, tensors: list[Tensor], rank: int, tag: int) -> None:
    """Send the tensors of a payload, each below 2^31 bytes."""
    for tensor in tensors:
        comm.Send([_memory(tensor), MPI.BYTE], dest=rank, tag=tag)


def receive(comm: Any, tensors: list[Tensor], rank: int, tag: int) -> None:
    """Fill the tensors of a payload."""
    for tensor in tensors:
        comm.Recv([_memory(tensor), MPI.BYTE], source=rank, tag=tag)


def _memory(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data
