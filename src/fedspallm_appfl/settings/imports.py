"""Heavy packages are imported without garbage collections, which take a third of the time and find next to nothing."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected(package: str) -> Iterator[None]:
    """Import a package within; afterwards garbage is collected as before, but not looked for in what is there by then.

    Torch and transformers make 800,000 objects, and nearly all stay. The collector would go through them again and again
    while they are made, later in the run, and at the end of the process.

    Args:
        package: nothing changes if it has been imported before.
    """
    if package in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
