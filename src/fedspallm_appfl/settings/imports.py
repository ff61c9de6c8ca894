"""Heavy packages are imported without garbage collections, which take a third of the time and find next to nothing.

And without a torchvision that does not go with the installed torch: transformers would import it and fail. What APPFL and
transformers import and a run does not use is put off until something uses it.
"""

import gc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

# Of what transformers and APPFL import from large packages: names that a run does not use. A third of their time.
UNUSED = {
    "sklearn.metrics": ("roc_curve",),
    "sklearn.decomposition": ("PCA",),
    "scipy.optimize": ("linear_sum_assignment",),
    "opacus": ("PrivacyEngine",),
    "opacus.utils.batch_memory_manager": ("BatchMemoryManager",),
}


@contextmanager
def importing(package: str) -> Iterator[None]:
    """Import a heavy package within: sooner, and without what few runs use of the packages that it imports.

    Torch and transformers make 800,000 objects, and nearly all stay. The collector would go through them again and again
    while they are made, later in the run, and at the end of the process. So garbage is not looked for within, nor
    afterwards in what is there by then.

    Args:
        package: nothing changes if it has been imported before.
    """
    if package in sys.modules:
        yield
        return
    with ExitStack() as stack:
        for module, names in UNUSED.items():
            stack.enter_context(_put_off_names(module, names))
        stack.enter_context(_uncollected())
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
    """Stands for a package until something of it is used; then the package is imported and takes its place.

    Not `importlib.util.LazyLoader`, which imports when anything looks at a module's `__file__`, as `inspect` does with all.
    """

    def __init__(self, name: str, *functions: str) -> None:
        """Stand for a package, or for those of a module's functions and classes that `from` may ask for.

        Args:
            name: of the package or module.
            functions: of that module; they can be imported, and import the module when they are called.
        """
        super().__init__(name)
        self._whole = not functions
        for function in functions:
            setattr(self, function, partial(self._call, function))

    def __getattr__(self, name: str) -> Any:
        # An import of something inside a package asks for its path, and `from` does so before it takes a name.
        if name.startswith("__") and not (self._whole and name == "__path__"):
            raise AttributeError(name)
        return getattr(self._module(), name)

    def _module(self) -> types.ModuleType:
        """The module itself; what stands for it, and for the package that it is in, goes."""
        for name in (self.__name__, self.__name__.partition(".")[0]):
            if isinstance(sys.modules.get(name), Later):
                del sys.modules[name]
        return importlib.import_module(self.__name__)

    def _call(self, function: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._module(), function)(*args, **kwargs)


def put_off(*packages: str) -> None:
    """Let packages that are installed be imported when something of them is used, and not before."""
    for name in packages:
        if name not in sys.modules and (spec := importlib.util.find_spec(name)):
            sys.modules[name] = Later(name)
            sys.modules[name].__spec__ = spec


@contextmanager
def _put_off_names(module: str, names: tuple[str, ...]) -> Iterator[None]:
    """Let `from module import name` within give what imports the module when it is called."""
    if module in sys.modules or importlib.util.find_spec(module.partition(".")[0]) is None:
        yield
        return
    sys.modules[module] = stand_in = Later(module, *names)
    stand_in.__spec__ = importlib.machinery.ModuleSpec(module, None)
    try:
        yield
    finally:
        if sys.modules.get(module) is stand_in:
            del sys.modules[module]


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
