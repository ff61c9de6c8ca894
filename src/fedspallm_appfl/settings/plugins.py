"""Plugins: Python files or modules that register pruners or algorithms when they are imported (docs/python.md)."""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from fedspallm_appfl.errors import ConfigError, first_line


def load(plugins: Sequence[str]) -> None:
    """Import plugins, each once a process.

    Args:
        plugins: paths of Python files, or names of modules that can be imported.

    Raises:
        ConfigError: a plugin cannot be imported; names it and says why.
    """
    for plugin in plugins:
        try:
            _import(plugin)
        except ConfigError as error:  # of a plugin that registers what is there already
            raise ConfigError(f"plugins: {plugin}: {error}") from error
        except Exception as error:  # a plugin may do anything when it is imported
            raise ConfigError(
                f"plugins: {plugin} cannot be imported: {type(error).__name__}: {first_line(error)}; name a Python file, or "
                "a module that can be imported here"
            ) from error


def _import(plugin: str) -> None:
    if not plugin.endswith(".py"):
        importlib.import_module(plugin)
        return
    file = Path(plugin).expanduser().resolve()
    if not file.is_file():
        raise FileNotFoundError(f"{file} is no file here")
    name = f"fedspallm_plugin_{file.stem}_{abs(hash(str(file))):x}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None, "it ends in .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]  # or the next attempt would find half of it
        raise
