"""Worker processes on this machine, started and watched by loky.

They are fresh interpreters: a script or notebook needs no guard around its main part, and CUDA may be in use here. A task
gets its share of the cores.
"""

import importlib
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import loky
import torch
from loky.process_executor import TerminatedWorkerError

from fedspallm_appfl.devices import threads
from fedspallm_appfl.errors import FederationError
from fedspallm_appfl.settings.imports import importing

LOOK = 1.0  # seconds between two looks at whether the parent lives


def cores() -> int:
    """Physical cores that this process may use; affinity and the limits of a container count."""
    return int(loky.cpu_count(only_physical_cores=True))


class Workers:
    """So many processes, started with the first task and ended with the `with` block, whatever they do then.

    Attributes:
        count: processes; where it is 1 nothing is to be started.
    """

    def __init__(self, count: int = 1) -> None:
        self.count = count
        self._executor: loky.ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, kill_workers=True)

    def threads(self, tasks: int) -> int:
        """CPU threads of each of so many tasks: its share of the cores, and no more than this process may use."""
        return max(1, min(torch.get_num_threads(), cores() // min(self.count, tasks)))

    def submit(self, tasks: int, work: Callable[..., Any], *given: Any) -> "Future[Any]":
        """Have one of so many tasks done by the next process that is free; here and at once where there is no other.

        Raises:
            FederationError: a process was ended from outside before.
        """
        if self.count == 1:
            done: Future[Any] = Future()
            done.set_result(work(*given))
            return done
        if self._executor is None:
            self._executor = loky.ProcessPoolExecutor(self.count, initializer=_begin, initargs=(os.getpid(),))
        try:
            future: Future[Any] = self._executor.submit(_do, self.threads(tasks), work, *given)
        except TerminatedWorkerError as error:
            raise _ended("before it had work") from error
        return future


ALONE = Workers(1)


def result(future: "Future[Any]", who: str) -> Any:
    """What a task has returned; what it has raised is raised here.

    Args:
        future: the task's.
        who: what it was about, for the error.

    Raises:
        FederationError: its process was ended from outside.
    """
    try:
        return future.result()
    except TerminatedWorkerError as error:  # loky ends the other processes too
        raise _ended(f"while it worked for {who}") from error


def _ended(when: str) -> FederationError:
    return FederationError(
        f"a worker process was ended from outside {when}, maybe as memory ran out; try fewer of them (workers=1)"
    )


def _begin(parent: int) -> None:
    """Leave Ctrl-C to the parent, end with it, even if it is killed, and import what every task needs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    with suppress(Exception), importing("transformers"):  # a task imports it again, and says what fails
        importlib.import_module("fedspallm_appfl.models.lazy_model")


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK)
    os._exit(1)


def _do(count: int, work: Callable[..., Any], *given: Any) -> Any:
    with threads(count):
        return work(*given)
