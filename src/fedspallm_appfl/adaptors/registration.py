"""Make FedSpaLLM's classes known to APPFL by plain name, and take the edge off importing APPFL.

APPFL has no plug-in registry: names in YAML are looked up as attributes of `appfl.algorithm.trainer`, `.aggregator` and
`.scheduler`, so the classes are put there. Importing APPFL also empties the root logger's handlers, imports packages for
images, plots, tracking and privacy that few runs use, of which `piq` needs a torchvision that fits the installed torch, and
leaves half a million objects for every `gc.collect()` that APPFL calls several times per client and round; the first is
undone, the second put off, the third frozen out of the way. Its communicator for Globus Compute imports a module that the
SDK has dropped in 4.9.

A subclass that a configuration names by its file is put there too, under the value of the key (`mine.py:MyTrainer`), so
that it never stands in the place of another class.
"""

import gc
import importlib
import logging
import sys
import types
from typing import Any, TypeVar

from fedspallm_appfl.errors import ConfigError, quoted
from fedspallm_appfl.settings.imports import guard_torchvision, importing
from fedspallm_appfl.settings.plugins import import_file

T = TypeVar("T")


def register() -> None:
    """Import APPFL without what few runs use, and register the trainer, the aggregator and the scheduler with it.

    Call it before APPFL is imported, and again where that is not certain.
    """
    guard_torchvision()
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        with importing("appfl.agent"):
            import appfl.agent
            import appfl.algorithm.aggregator
            import appfl.algorithm.scheduler
            import appfl.algorithm.trainer

            from fedspallm_appfl.adaptors.aggregator import FedSpaLLMAggregator
            from fedspallm_appfl.adaptors.scheduler import FedSpaLLMScheduler
            from fedspallm_appfl.adaptors.trainer import FedSpaLLMTrainer
    finally:
        root.handlers[:], root.level = handlers, level

    appfl.algorithm.trainer.FedSpaLLMTrainer = FedSpaLLMTrainer
    appfl.algorithm.aggregator.FedSpaLLMAggregator = FedSpaLLMAggregator
    appfl.algorithm.scheduler.FedSpaLLMScheduler = FedSpaLLMScheduler


def agents() -> types.ModuleType:
    """The module that makes the agents of server and clients; the first call imports APPFL, which takes a while."""
    register()
    from fedspallm_appfl.adaptors import agents

    freeze()
    return agents


def register_named(kind: str, value: str, base: type, key: str) -> None:
    """Make the class that a configuration names known to APPFL, under just that name.

    Args:
        kind: `trainer`, `aggregator` or `scheduler`.
        value: the name of `base`, or `path/to/file.py:ClassName`, see `class_of`.
        base: what the class has to be or to derive from.
        key: the key of the configuration, for messages.

    Raises:
        ConfigError: the value names no such class.
    """
    setattr(importlib.import_module(f"appfl.algorithm.{kind}"), value, class_of(value, base, key))


def class_of(value: str, base: type[T], key: str) -> type[T]:
    """The class that a configuration names: one of this package by its name, or a subclass of it in a file.

    Args:
        value: the name of `base`, or `path/to/file.py:ClassName`; a relative path starts from the working directory.
        base: what the class has to be or to derive from.
        key: the key of the configuration, for messages.

    Raises:
        ConfigError: there is no such file or class, the file cannot be imported, or the class does not derive from `base`.
    """
    if value == base.__name__:
        return base
    file, _, name = value.rpartition(":")
    if not file.endswith(".py"):
        raise ConfigError(
            f"{key}: expected {base.__name__}, or a subclass as path/to/file.py:ClassName; got {quoted(value)}"
        )
    module = import_file(file, key)
    classes = {name: one for name, one in vars(module).items() if isinstance(one, type)}
    if name not in classes:
        raise ConfigError(f"{key}: {file} has no class {quoted(name)}, only {', '.join(classes) or 'none at all'}")
    if not issubclass(classes[name], base):
        raise ConfigError(f"{key}: {name} of {file} is no subclass of {base.__module__}.{base.__name__}; derive it")
    return classes[name]


def freeze() -> None:
    """Keep all that is imported by now out of later garbage collections; call it after the last import."""
    gc.collect()
    gc.freeze()


def guard_login_manager() -> None:
    """Stand in for `globus_compute_sdk.sdk.login_manager`, gone since 4.9; APPFL uses it only where it is given tokens."""
    name = "globus_compute_sdk.sdk.login_manager"
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        stand_in: Any = types.ModuleType(name)
        stand_in.AuthorizerLoginManager = None
        sys.modules[name] = stand_in
