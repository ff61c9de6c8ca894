"""What ends a command from outside: SIGTERM, and SIGUSR1, by which Slurm warns that the time is nearly up.

Both end it as Ctrl-C does: what was begun is closed, and what a run has done stays for `fedspallm resume`.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fedspallm_appfl.errors import Terminated

ENDING = (signal.SIGTERM, signal.SIGUSR1)


def _end(number: int, frame: object) -> None:
    raise Terminated(signal.Signals(number).name)


@contextmanager
def ending() -> Iterator[None]:
    """Turn these signals into an exception, where the thread may."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _end) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
