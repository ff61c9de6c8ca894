"""Heavy packages are imported sooner, and without what a run does not use of what they import.

Garbage is not collected meanwhile, which takes a third of the time and finds next to nothing. What APPFL and transformers
import and a run does not use is put off until something uses it. A torchvision that does not go with the installed torch is
hidden: transformers would import it and fail.
"""

import builtins
import gc
import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

# What transformers and APPFL import from large packages and a run does not use: a third of their time. All are called,
# none is a base class.
UNUSED = {
    "sklearn.metrics": ("roc_curve",),
    "sklearn.decomposition": ("PCA",),
    "scipy.optimize": ("linear_sum_assignment",),
    "opacus": ("PrivacyEngine",),
    "opacus.utils.batch_memory_manager": ("BatchMemoryManager",),
}
WHOLE = ("piq", "seaborn", "wandb")  # packages that APPFL imports as a whole; piq needs torchvision
BY = ("transformers.", "appfl.")  # whose imports these are
# A module of APPFL, which goes on without it -> the package that it asks for after it has imported all others.
IN_VAIN = {"fedsb_trainer": "fed_sb"}


@contextmanager
def importing(package: str) -> Iterator[None]:
    """Import a heavy package within: sooner, and without what a run does not use.

    Torch and transformers make 800,000 objects, and nearly all stay. The collector would go through them again and again
    while they are made, later in the run, and at the end of the process. So garbage is not looked for within, nor
    afterwards in what is there by then.

    Args:
        package: if it has been imported before, all is imported as usual.
    """
    if package in sys.modules:
        yield
        return
    with _without_unused(), _uncollected():
        yield


@contextmanager
def _uncollected() -> Iterator[None]:
    if not gc.isenabled():
        yield
        return
    gc.collect()  # what is garbage by now would stay for good
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


class Later(types.ModuleType):
    """Stands for a package that is imported when something of it is used."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name)


@contextmanager
def _without_unused() -> Iterator[None]:
    """Answer imports of `UNUSED` and `WHOLE` with what imports them when it is used; all other imports are as usual."""
    usual = builtins.__import__

    def answer(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:  # noqa: A002
        by = (globals or {}).get("__name__", "")
        if by.startswith(BY):
            if name in WHOLE and not fromlist and _is_to_come(name):
                return Later(name)
            if level == 0 and fromlist and {*fromlist} <= {*UNUSED.get(name, ())} and _is_to_come(name):
                return types.SimpleNamespace(**{one: partial(_call, name, one) for one in fromlist})
            if level and (needed := IN_VAIN.get(name)) and not _is_installed(needed):
                raise ModuleNotFoundError(f"No module named {needed!r}", name=needed)
        return usual(name, globals, locals, fromlist, level)

    builtins.__import__ = answer
    try:
        yield
    finally:
        builtins.__import__ = usual


def _is_to_come(module: str) -> bool:
    """Whether a module has not been imported yet, and can be."""
    return module not in sys.modules and _is_installed(module.partition(".")[0])


def _is_installed(package: str) -> bool:
    return sys.modules.get(package) is not None or importlib.util.find_spec(package) is not None


def _call(module: str, function: str, *args: Any, **kwargs: Any) -> Any:
    return getattr(importlib.import_module(module), function)(*args, **kwargs)


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
