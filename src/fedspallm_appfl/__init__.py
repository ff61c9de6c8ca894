"""FedSpaLLM: prune a large language model where the data lives.

    import fedspallm_appfl as fs

    result = fs.prune("models/Llama-2-7b", {"a": "a.txt", "b": "b.txt"}, "runs/x", sparsity="2:4")

Nothing heavy is imported before a name is used. See docs/python.md.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from fedspallm_appfl.settings.imports import importing

__version__ = "0.1.0"

# torch reads it once, when it first makes a tensor: large ones in huge pages, where the system leaves that to programs.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# libgomp reads it when torch is imported: idle threads would spin for milliseconds on cores that others need.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

_WHERE = {  # name -> the module that holds it
    "api": ("prune", "run", "load_config", "evaluate", "estimate", "validate"),
    "by_hand": ("sparsegpt", "admm", "wanda", "magnitude"),
    "models.storage.packing": ("pack", "unpack", "load_packed"),
    "recovery.zeros": ("keep_sparsity",),
    "reports.result": ("Result",),
    "reports.sparsity": ("check",),
    "settings.schema": ("Config", "Pruning"),
    "tensors.target": ("Target", "parse_target"),
    "tensors.sparsity": ("select",),
    "pruning.pruner": ("Pruner", "Prepared"),
    "pruning.registry": ("pruner",),
    "pruning.statistics": ("InputGram", "InputNorms"),
    "aggregation.l0_mean": ("L0Sums", "l0_mean", "plain_mean"),
    "aggregation.mask_expansion": ("Votes", "expand"),
    "algorithms.algorithm": ("Algorithm", "Exchange", "Matrix"),
    "algorithms.registry": ("register",),
    "errors": (
        "FedSpaLLMError",
        "ConfigError",
        "ModelError",
        "DataError",
        "PruningError",
        "UpdateError",
        "DataStoreError",
        "FederationError",
    ),
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}
__all__ = ["__version__", *_MODULE_OF]

if TYPE_CHECKING:
    from fedspallm_appfl.aggregation.l0_mean import L0Sums, l0_mean, plain_mean
    from fedspallm_appfl.aggregation.mask_expansion import Votes, expand
    from fedspallm_appfl.algorithms.algorithm import Algorithm, Exchange, Matrix
    from fedspallm_appfl.algorithms.registry import register
    from fedspallm_appfl.api import estimate, evaluate, load_config, prune, run, validate
    from fedspallm_appfl.by_hand import admm, magnitude, sparsegpt, wanda
    from fedspallm_appfl.errors import (
        ConfigError,
        DataError,
        DataStoreError,
        FederationError,
        FedSpaLLMError,
        ModelError,
        PruningError,
        UpdateError,
    )
    from fedspallm_appfl.models.storage.packing import load_packed, pack, unpack
    from fedspallm_appfl.pruning.pruner import Prepared, Pruner
    from fedspallm_appfl.pruning.registry import pruner
    from fedspallm_appfl.pruning.statistics import InputGram, InputNorms
    from fedspallm_appfl.recovery.zeros import keep_sparsity
    from fedspallm_appfl.reports.result import Result
    from fedspallm_appfl.reports.sparsity import check
    from fedspallm_appfl.settings.schema import Config, Pruning
    from fedspallm_appfl.tensors.sparsity import select
    from fedspallm_appfl.tensors.target import Target, parse_target


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = f"{__name__}.{_MODULE_OF[name]}"
    if module not in sys.modules:
        with importing("transformers"):
            importlib.import_module(module)
    return getattr(sys.modules[module], name)


def __dir__() -> list[str]:
    return sorted(__all__)
