"""Memory of a process, as Linux counts it: what is resident, and the most that was.

Imports the standard library only, so that children under another interpreter can use it too.
"""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


def settle() -> None:
    """Give freed memory back to the system, so that it is not taken for memory in use."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def resident() -> float:
    """Resident MB (10^6 bytes) now."""
    settle()
    return _field("VmRSS")


def reset_peak() -> None:
    """Forget the high-water mark; from here on it starts at what is resident now."""
    settle()
    CLEAR.write_text("5")


def peak() -> float:
    """Resident MB at most since `reset_peak`."""
    return _field("VmHWM")


def peak_above(work: Callable[[], Any]) -> float:
    """MB that some work takes at most, above what is resident before it."""
    reset_peak()
    before = _field("VmRSS")
    work()
    return peak() - before


def _field(name: str) -> float:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024 / 1e6
