"""A user's own code: plugins that register pruners or algorithms when imported (docs/python.md), and classes in files."""

import importlib
import importlib.machinery
import sys
import traceback
import types
from collections.abc import Sequence
from pathlib import Path

from fedspallm_appfl.errors import ConfigError

ADDED: set[str] = set()  # algorithms and pruners that code has registered in this process


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
            raise ConfigError(
                f"plugins: {plugin} cannot be imported: {type(error).__name__}: {error}; name a Python file, or a module "
                "that is installed here"
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
    if not place.is_file():
        raise ConfigError(f"{key}: there is no file {place}; a relative path starts from the working directory")
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
