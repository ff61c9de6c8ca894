"""Choose devices and threads, share work among devices, and give freed memory back to the system.

A GPU is chosen by the rank's place among the client ranks of its node, never by its global rank, and only among the GPUs
that the process can see: what a scheduler bound with CUDA_VISIBLE_DEVICES stays bound. Where a process sees one GPU, it
uses that. More ranks than GPUs share them in turn.
"""

import ctypes
import re
import socket
import threading
import time
from collections import UserDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fedspallm_appfl.errors import ConfigError, quoted
from fedspallm_appfl.settings.schema import DEVICE, TrainConfigs

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


def choose_devices(train: TrainConfigs, local_rank: int) -> list[str]:
    """All devices of a client; what it keeps lies on the first.

    Args:
        train: its settings.
        local_rank: place of this process among the client processes of its node, from 0.

    Raises:
        ConfigError: as `choose_device` says.
    """
    return [choose_device(one, local_rank) for one in train.devices or [train.device]]


def deal(pieces: int, devices: Sequence[torch.device], work: Callable[[int, int], None]) -> None:
    """Do pieces of work side by side: number n on device n mod N, on each in their order, without gradients.

    On one device it is a plain loop. After an error no device begins another piece.

    Args:
        pieces: how many there are.
        devices: N of them.
        work: does one, told its number and the place of its device.
    """
    if len(devices) == 1:
        for number in range(pieces):
            work(number, 0)
        return
    each, ended = torch.get_num_threads(), threading.Event()

    def on(place: int) -> None:
        torch.set_num_threads(each)  # this, gradients and the current GPU are a thread's own
        device = devices[place]
        with torch.no_grad(), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            for number in range(place, pieces, len(devices)):
                if ended.is_set():
                    return
                work(number, place)

    with ThreadPoolExecutor(len(devices)) as pool:
        done = [pool.submit(on, place) for place in range(len(devices))]
        try:
            wait(done, return_when=FIRST_EXCEPTION)
        finally:
            ended.set()
    for one in done:
        one.result()


def moved(value: Any, device: torch.device) -> Any:
    """Arguments of a call with the tensors in them on a device; those that are there already are not copied.

    Raises:
        TypeError: a value of a kind that may hide tensors.
    """
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (dict, UserDict):  # Gemma 4 passes the latter
        return type(value)({name: moved(one, device) for name, one in value.items()})
    if isinstance(value, list | tuple):
        each = [moved(one, device) for one in value]
        return type(value)(*each) if hasattr(value, "_fields") else type(value)(each)
    if value is None or isinstance(value, bool | int | float | str | torch.dtype):
        return value
    raise TypeError(f"{type(value).__name__} cannot be moved to {device}")


def slowdown(dtype: torch.dtype, side: int = 256) -> float:
    """How many times as long as in float32 a product of matrices takes on this CPU, from a few milliseconds of trying.

    CPUs without instructions for half precision take eight times as long and more.

    Args:
        dtype: of the product.
        side: of its matrices.
    """

    def seconds(of: torch.dtype) -> float:
        matrix, tries = torch.ones(side, side, dtype=of), []
        for _ in range(4):
            begin = time.perf_counter()
            torch.mm(matrix, matrix)
            tries.append(time.perf_counter() - begin)
        return min(tries)

    return seconds(dtype) / seconds(torch.float32)


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
