"""Make FedSpaLLM's classes known to APPFL by plain name, and take the edge off importing APPFL.

APPFL has no plug-in registry: names in YAML are looked up as attributes of `appfl.algorithm.trainer`, `.aggregator` and
`.scheduler`, so the classes are put there. Importing APPFL also empties the root logger's handlers, imports `piq`, which
needs a torchvision that fits the installed torch, and leaves half a million objects for every `gc.collect()` that APPFL
calls several times per client and round; the first is undone, the second guarded, the third frozen out of the way. Its
communicator for Globus Compute imports a module that the SDK has dropped in 4.9.
"""

import gc
import importlib
import logging
import sys
import types
from typing import Any


def register() -> None:
    """Import APPFL and register the trainer, the aggregator and the scheduler. Safe to call again."""
    guard_piq()
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        import appfl.agent
        import appfl.algorithm.aggregator
        import appfl.algorithm.scheduler
        import appfl.algorithm.trainer
    finally:
        root.handlers[:], root.level = handlers, level
    from fedspallm_appfl.adaptors.aggregator import FedSpaLLMAggregator
    from fedspallm_appfl.adaptors.scheduler import FedSpaLLMScheduler
    from fedspallm_appfl.adaptors.trainer import FedSpaLLMTrainer

    appfl.algorithm.trainer.FedSpaLLMTrainer = FedSpaLLMTrainer
    appfl.algorithm.aggregator.FedSpaLLMAggregator = FedSpaLLMAggregator
    appfl.algorithm.scheduler.FedSpaLLMScheduler = FedSpaLLMScheduler


def freeze() -> None:
    """Keep all that is imported by now out of later garbage collections; call it after the last import."""
    gc.collect()
    gc.freeze()


def guard_piq() -> None:
    """APPFL imports piq for metrics of images only; without a working torchvision an empty module stands in for it."""
    if "piq" in sys.modules:
        return
    try:
        importlib.import_module("piq")
    except (ImportError, RuntimeError):  # RuntimeError: torchvision for CUDA beside a torch for the CPU
        for name in [name for name in sys.modules if name.split(".")[0] in ("piq", "torchvision")]:
            del sys.modules[name]
        sys.modules["piq"] = types.ModuleType("piq")


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
