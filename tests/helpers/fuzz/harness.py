"""Run cases, and say which of them broke a rule."""

import random
import re
import signal
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fedspallm_appfl.errors import FedSpaLLMError

CPU_SECONDS = 10.0  # of a case
MOST_BYTES = 200 * 2**20  # that a case may take beside what was in memory before
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

Attempt = Callable[[random.Random], None]  # raises what the package makes of a case


class Unnamed(AssertionError):  # noqa: N818
    """A refusal that does not say what it has to."""


class Hang(BaseException):  # noqa: N818
    """A case took too long."""


@dataclass
class Tally:
    """What became of the cases of one target.

    Attributes:
        counts: how many were taken, refused, or broke a rule.
        faults: place of an error -> (seed, words) of the first case that led there.
    """

    counts: Counter = field(default_factory=Counter)
    faults: dict[str, tuple[int, str]] = field(default_factory=dict)

    def note(self, place: str, seed: int, words: str) -> None:
        """Count a case that broke a rule."""
        self.counts["faults"] += 1
        self.faults.setdefault(place, (seed, words))


def run_case(tally: Tally, name: str, attempt: Attempt, seed: int) -> None:
    """Run one case; the same name and seed give the same one."""
    before = _peak(reset=True)
    try:
        with _limited():
            attempt(random.Random(f"{name}/{seed}"))
        tally.counts["taken"] += 1
    except FedSpaLLMError as error:
        tally.counts["refused"] += 1
        if len(str(error)) > 20_000:
            tally.note("a long message", seed, str(error)[:500])
    except (Exception, Hang) as error:  # noqa: BLE001 - this is what is looked for
        lines = traceback.extract_tb(error.__traceback__)
        inside = [line for line in lines if "fedspallm_appfl" in line.filename] or lines
        place = f"{type(error).__name__} at {Path(inside[-1].filename).name}:{inside[-1].name}"
        tally.note(place, seed, "".join(traceback.format_exception(error))[-3000:])
    if _peak() - before > MOST_BYTES:
        tally.note("memory", seed, f"{(_peak() - before) >> 20} MiB more than before")


def _expired(number: int, frame: object) -> None:
    raise Hang(f"more than {CPU_SECONDS} s")


@contextmanager
def _limited():
    """Processor time, so that a busy machine changes nothing, and whoever else counts seconds is left alone."""
    before = signal.signal(signal.SIGPROF, _expired)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _peak(reset: bool = False) -> int:
    """The most bytes that were in memory since the last reset; what is there now, after one."""
    try:
        if reset:
            CLEAR.write_text("5")
        found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
    except OSError:  # not Linux, or not allowed
        return 0
    return int(found[1]) * 1024 if found else 0
