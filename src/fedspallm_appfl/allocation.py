"""New CPU tensors on large pages where they are large.

Filling new memory page by page takes longer than most that is done with it afterwards. numpy asks the kernel for large
pages, torch does so only for a whole process, small tensors included, which costs memory.
"""

import ctypes
import math

import numpy as np
import torch
from torch import Tensor

_LIBC = ctypes.CDLL(None)


def give_back() -> None:
    """Give freed memory back to the system; the C library would keep what lies between pieces that are in use."""
    if hasattr(_LIBC, "malloc_trim"):  # glibc
        _LIBC.malloc_trim(0)


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """A tensor whose entries are not set."""
    if torch.device(device).type != "cpu" or math.prod(shape) == 0:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.empty(math.prod(shape), f"i{dtype.itemsize}")).view(dtype).view(shape)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """A tensor of zeros; no memory is touched before it is used."""
    if torch.device(device).type != "cpu" or math.prod(shape) == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape), f"i{dtype.itemsize}")).view(dtype).view(shape)
