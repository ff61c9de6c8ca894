"""Choose a device and threads, and give freed memory back to the system.

A GPU is chosen by the rank's place among the client ranks of its node, never by its global rank, and only among the GPUs
that the process can see: what a scheduler bound with CUDA_VISIBLE_DEVICES stays bound. Where a process sees one GPU, it
uses that. More ranks than GPUs share them in turn.
"""

import ctypes
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fedspallm_appfl.errors import ConfigError, quoted
from fedspallm_appfl.settings.schema import DEVICE

_LIBC = ctypes.CDLL(None)


def choose_device(asked: str, local_rank: int) -> str:
    """The device for a client.

    Args:
        asked: `auto`, `cpu`, `cuda` or `cuda:N`.
        local_rank: place of this process among the client processes of its node, from 0.

    Raises:
        ConfigError: the words are none of these, or a GPU was asked for that this process cannot see.
    """
    if not re.fullmatch(DEVICE[0], asked):
        raise ConfigError(f"a device is {DEVICE[1]}; got {quoted(asked)}")
    if asked == "cpu":
        return "cpu"
    seen = torch.cuda.device_count()
    if asked.startswith("cuda:"):
        if int(asked.removeprefix("cuda:")) >= seen:
            raise ConfigError(f"device {asked} was asked for on {socket.gethostname()}, where {seen} GPUs can be seen")
        return asked
    if not seen:
        if asked == "cuda":
            raise ConfigError(
                f"device cuda was asked for on {socket.gethostname()}, where no GPU can be seen; use auto"
            )
        return "cpu"
    return f"cuda:{local_rank % seen}"


@contextmanager
def threads(wanted: int | None = None) -> Iterator[None]:
    """So many CPU threads, None for as many as there are; afterwards as many as before, whatever was set meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(wanted or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def give_back() -> None:
    """Give back what the C library keeps between pieces of memory that are in use; it would count as the process's."""
    if hasattr(_LIBC, "malloc_trim"):  # glibc
        _LIBC.malloc_trim(0)
