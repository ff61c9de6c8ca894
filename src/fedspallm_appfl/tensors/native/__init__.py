"""The compiled loops of `kernels.c`, if they were built when the package was installed.

They affect only speed: each caller has a torch implementation that gives the same bits. Set `FEDSPALLM_NATIVE=0` to run
without them. A report says which of the two a run used.
"""

import ctypes
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

SHORT = 2**18  # entries; for fewer a thread costs more than it saves
WIDEST_BLOCK = 256  # maximum number of columns of `sparsegpt_block`


def _load() -> ctypes.CDLL | None:
    spec = find_spec(f"{__name__}._kernels")
    if os.environ.get("FEDSPALLM_NATIVE") == "0" or spec is None or spec.origin is None:
        return None
    library = ctypes.CDLL(spec.origin)
    library.count_bits.restype = ctypes.c_int64
    return library


LIBRARY = _load()


def serves(*tensors: Tensor) -> bool:
    """Whether the compiled loops exist and can read these tensors: contiguous and on the CPU."""
    return LIBRARY is not None and all(t.device.type == "cpu" and t.is_contiguous() for t in tensors)


def call(function: str, *arguments: Tensor | int | None) -> Any:
    """Call a loop; tensors are passed by address, integers as int64, None as a null pointer.

    The caller has checked dtypes, sizes and `serves`: nothing is checked here.
    """
    plain = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else _plain(a) for a in arguments]
    return getattr(LIBRARY, function)(*plain)


def call_in_parts(function: str, parts: Sequence[tuple[Tensor | int | None, ...]]) -> None:
    """Call a loop once for each part of the work, on as many threads as torch has; ctypes lets go of the interpreter.

    Parts write to different places, so the bits do not depend on how many there are.
    """
    others = [_threads().submit(call, function, *part) for part in parts[1:]]
    try:
        call(function, *parts[0])
    finally:
        if others:  # to wait for nothing takes as long as a short loop
            wait(others)
    for other in others:
        other.result()


@cache
def _threads() -> ThreadPoolExecutor:
    """Threads for parts of the work; they stay, as to start one takes as long as a short loop."""
    return ThreadPoolExecutor(os.cpu_count(), "fedspallm-loops")


if hasattr(os, "register_at_fork"):  # a copy of this process has none of its threads
    os.register_at_fork(after_in_child=_threads.cache_clear)


def ranges(size: int, multiple: int) -> list[slice]:
    """A range in as many parts as torch has threads, each but the last a multiple long; one part if it is short."""
    count = 1 if size < SHORT else torch.get_num_threads()
    step = max(1, -(-size // (count * multiple))) * multiple
    return [slice(start, min(start + step, size)) for start in range(0, max(1, size), step)]


def _plain(argument: int | None) -> ctypes.c_int64 | ctypes.c_void_p:
    return ctypes.c_void_p(None) if argument is None else ctypes.c_int64(argument)


def description() -> str:
    """Which loops run, for a report."""
    return "compiled loops" if LIBRARY is not None else "no compiled loops"
