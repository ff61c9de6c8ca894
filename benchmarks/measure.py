"""Compare the time of two or more ways to do the same, on a machine that others use as well.

Variants take turns, A B A B ..., so that what disturbs one disturbs the other too. Time is CPU time of the whole process,
so that helper threads count and waiting for other processes does not. The ratio is that of the minima: noise only ever
adds. Beside it stand the median and the range of the ratios of the single turns, which say how far to trust it.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


def seconds(work: Callable[[], Any]) -> float:
    """CPU seconds of this process that some work takes."""
    started = time.process_time()
    work()
    return time.process_time() - started


def wall_seconds(work: Callable[[], Any]) -> float:
    """Seconds that some work takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def interleave(turns: int, *variants: Callable[[], float]) -> list[list[float]]:
    """Let variants take turns.

    Args:
        turns: turns of each.
        *variants: each does its work and returns the seconds that count.

    Returns:
        For each variant its seconds, a number a turn.
    """
    rounds = [[variant() for variant in variants] for _ in range(turns)]
    return [list(times) for times in zip(*rounds, strict=True)]


@dataclass(frozen=True)
class Ratio:
    """How many times one variant goes into the other.

    Attributes:
        best: ratio of the minima.
        median: median of the ratios of the turns.
        low: smallest ratio of a turn.
        high: largest ratio of a turn.
    """

    best: float
    median: float
    low: float
    high: float

    @classmethod
    def of(cls, slow: Sequence[float], fast: Sequence[float]) -> "Ratio":
        """Ratio of `slow` to `fast`, turn by turn."""
        turns = [a / b for a, b in zip(slow, fast, strict=True)]
        return cls(min(slow) / min(fast), statistics.median(turns), min(turns), max(turns))
