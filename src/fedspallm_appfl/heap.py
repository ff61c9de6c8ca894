"""Give freed memory back to the system."""

import ctypes

_LIBC = ctypes.CDLL(None)


def give_back() -> None:
    """Return free memory that the C library keeps to the system; otherwise it counts as memory of the process."""
    if hasattr(_LIBC, "malloc_trim"):  # glibc
        _LIBC.malloc_trim(0)
