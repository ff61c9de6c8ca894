"""Heavy packages are imported without garbage collections, which take a third of the time and find next to nothing.

And without a torchvision that does not go with the installed torch: transformers would import it and fail. What APPFL
imports and a run does not use is put off until something uses it.
"""

import gc
import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


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


class Later(types.ModuleType):
    """Stands for a package until something of it is used; then the package is imported and takes its place.

    Not `importlib.util.LazyLoader`, which imports when anything looks at a module's `__file__`, as `inspect` does with all.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # which an import of something inside it asks for
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


def put_off(*packages: str) -> None:
    """Let packages that are installed be imported when something of them is used, and not before."""
    for name in packages:
        if name not in sys.modules and (spec := importlib.util.find_spec(name)):
            sys.modules[name] = Later(name)
            sys.modules[name].__spec__ = spec


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
