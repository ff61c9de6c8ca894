"""Heavy packages are imported without garbage collections, which take a third of the time and find next to nothing.

And without a torchvision that does not go with the installed torch: transformers would import it and fail.
"""

import gc
import importlib.util
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


def guard_torchvision() -> None:
    """Hide a torchvision that cannot be imported: nothing here needs it.

    One of APPFL's dependencies asks for it, and beside a torch for the CPU pip takes one that was built for CUDA.
    """
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):  # RuntimeError: its operators are not there
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules["torchvision"] = None  # type: ignore[assignment]  # as if it were not installed
