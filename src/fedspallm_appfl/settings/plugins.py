"""A user's own code: plugins that register pruners or algorithms when imported (docs/python.md), and classes in files."""

import importlib
import importlib.machinery
import sys
import traceback
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Generic, TypeVar

from fedspallm_appfl.errors import ConfigError, quoted, shortened
from fedspallm_appfl.settings.paths import is_file

T = TypeVar("T")
ADDED: set[str] = set()  # algorithms and pruners that code has registered in this process


class Registry(Generic[T]):
    """Algorithms or pruners by name: the built-in ones first, then those that code adds.

    Attributes:
        built_in: names of those that come with the package.
    """

    def __init__(self, what: str, built_in: dict[str, T], reserved: Sequence[str] = ()) -> None:
        """What they are, with an article, for messages; those that are built in; other names that nobody may take."""
        self.built_in = tuple(built_in)
        self._what, self._known, self._reserved = what, dict(built_in), reserved

    def names(self) -> tuple[str, ...]:
        """All names, the built-in ones first."""
        return tuple(self._known)

    def find(self, name: str) -> T:
        """The one of a name.

        Raises:
            ConfigError: there is none; lists those that there are.
        """
        if name not in self._known:
            raise ConfigError(
                f"{self._what} is one of {', '.join(self._known)}, or of a plugin that `plugins` names; got {quoted(name)}"
            )
        return self._known[name]

    def add(self, name: str, one: T) -> None:
        """Add one, in place of an earlier one of that name unless that is built in.

        Raises:
            ConfigError: the name is taken, or not made of letters, digits, '-' and '_'.
        """
        if name in (*self.built_in, *self._reserved):
            raise ConfigError(f"{self._what} {name} is built in; give your own another name")
        if not name.replace("-", "_").isidentifier():
            raise ConfigError(f"{self._what}'s name has letters, digits, '-' and '_', got {quoted(name)}")
        self._known[name] = one
        ADDED.add(name)

    def remove_added(self) -> None:
        """Leave the built-in ones."""
        self._known = {name: self._known[name] for name in self.built_in}


def load(plugins: Sequence[str]) -> None:
    """Import plugins, each once a process.

    Args:
        plugins: paths of Python files, or names of modules that can be imported.

    Raises:
        ConfigError: a plugin cannot be imported; names it and says why.
    """
    for plugin in plugins:
        if plugin.endswith(".py"):
            import_file(plugin, "plugins")
            continue
        try:
            importlib.import_module(plugin)
        except (Exception, SystemExit) as error:  # whatever the code of the module raises
            why = f"{type(error).__name__}: {shortened(error)}"
            raise ConfigError(
                f"plugins: {shortened(plugin)} cannot be imported: {why}; name a Python file, or an installed module"
            ) from error


def import_file(file: str, key: str) -> types.ModuleType:
    """Import a Python file once a process. Its folder is not put on the path: it can import installed modules only.

    Args:
        file: its path; a relative one starts from the working directory.
        key: the key of the configuration that names it, for messages.

    Raises:
        ConfigError: there is no such file, or it cannot be imported; says why and in which line.
    """
    place = Path(file).expanduser().resolve()
    name = str(place)  # no installed module is named so
    if name in sys.modules:
        return sys.modules[name]
    if not is_file(place):
        raise ConfigError(
            f"{key}: there is no file {shortened(place)}; a relative path starts from the working directory"
        )
    module = types.ModuleType(name)
    module.__file__ = name
    sys.modules[name] = module  # as an import does, before the code runs: dataclasses look there
    try:
        importlib.machinery.SourceFileLoader(name, name).exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the code of the file raises
        del sys.modules[name]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == name]
        where = f", line {lines[-1]}" if lines else ""
        raise ConfigError(f"{key}: {place} cannot be imported: {type(error).__name__}: {error}{where}") from error
    return module
