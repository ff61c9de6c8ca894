"""Give freed memory back to the system."""

import ctypes

_LIBC = ctypes.CDLL(None)


def give_back() -> None:
    """Give back what the C library keeps between pieces of memory that are in use; it would count as the process's."""
    if hasattr(_LIBC, "malloc_trim"):  # glibc
        _LIBC.malloc_trim(0)
