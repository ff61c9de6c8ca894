"""Choose devices and threads, share work among devices, and give freed memory back to the system.

A GPU is chosen by the rank's place among the client ranks of its node, never by its global rank, and only among the GPUs
that the process can see: what a scheduler bound with CUDA_VISIBLE_DEVICES stays bound. Where a process sees one GPU, it
uses that. More ranks than GPUs share them in turn.
"""

import ctypes
import os
import re
import socket
import threading
import time
from collections import UserDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from fedspallm_appfl.errors import ConfigError, quoted
from fedspallm_appfl.settings.schema import DEVICE, TrainConfigs

SLOW = 2.5  # times as long as in float32
Piece = TypeVar("Piece")
Done = TypeVar("Done")
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
        ConfigError: as `choose_device` says; or a GPU may be used twice.
    """
    chosen = [choose_device(one, local_rank) for one in train.places]
    gpus = [device for device in chosen if device != "cpu"]
    if len(set(gpus)) < len(gpus):
        raise ConfigError(f"train_configs.devices: each GPU once, got {', '.join(train.places)}")
    if len(gpus) > 1 and local_rank and "CUDA_VISIBLE_DEVICES" not in os.environ:
        raise ConfigError(
            f"train_configs.devices: another client rank of {socket.gethostname()} may use {', '.join(gpus)} too; give "
            "each rank its own GPUs with CUDA_VISIBLE_DEVICES, or start one rank on the node"
        )
    return chosen


def deal(pieces: int, devices: Sequence[torch.device], work: Callable[[int, int], None]) -> None:
    """Do pieces of work side by side: number n on device n mod N, on each in their order.

    On one device it is a plain loop; on several, threads do it without gradients. After an error no device begins another
    piece.

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


def side_by_side(work: Callable[[Piece], Done], pieces: Sequence[Piece]) -> list[Done]:
    """What becomes of pieces of work on the CPU, in their order, on as many threads as torch has.

    Each is done with one thread, so the bits do not depend on how many there are.

    Args:
        work: does one.
        pieces: its arguments, enough work each to be worth a thread.
    """
    done: dict[int, Done] = {}

    def on(number: int, place: int) -> None:
        done[number] = work(pieces[number])

    places = [torch.device("cpu")] * max(1, min(torch.get_num_threads(), len(pieces)))
    with threads(1):
        deal(len(pieces), places, on)
    return [done[number] for number in range(len(pieces))]


def moved(value: Any, device: torch.device) -> Any:
    """Arguments of a call with the tensors in them on a device; those that are there already are not copied.

    Raises:
        TypeError: a value of a kind that may hide tensors.
    """
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) is dict:
        return {name: moved(one, device) for name, one in value.items()}
    if isinstance(value, list | tuple):
        each = [moved(one, device) for one in value]
        return type(value)(*each) if hasattr(value, "_fields") else type(value)(each)
    if value is None or isinstance(value, bool | int | float | str | torch.dtype):
        return value
    if isinstance(value, UserDict):  # of Gemma 4: a batch has one, which its blocks fill on the device where they run
        return value
    raise TypeError(f"{type(value).__name__} cannot be moved to {device}")


def slowdown(dtype: torch.dtype) -> float:
    """How many times as long as in float32 a linear of a model takes on one core of this CPU; tried in a tenth of a second.

    Six to eight times where the CPU has no instructions for half precision.

    Args:
        dtype: of the linear.
    """

    def seconds(of: torch.dtype) -> float:
        inputs, weight, tries = torch.ones(256, 512, dtype=of), torch.ones(512, 512, dtype=of), []
        for _ in range(3):
            begin = time.thread_time()  # others may be using this core
            functional.linear(inputs, weight)
            tries.append(time.thread_time() - begin)
        return min(tries)

    with threads(1):
        return seconds(dtype) / seconds(torch.float32)


def is_slow(dtype: torch.dtype) -> bool:
    """Whether this CPU is far slower in an arithmetic than in float32."""
    return dtype != torch.float32 and slowdown(dtype) > SLOW


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


def proc_bytes(file: str, name: str) -> int | None:
    """Bytes that a file of /proc gives under a name, as `VmRSS` or `MemAvailable`; None where the system does not say."""
    try:
        lines = Path("/proc", file).read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)
