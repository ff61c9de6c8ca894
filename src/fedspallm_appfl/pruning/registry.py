"""The pruners by name: the built-in ones, and those that plugins add."""

from collections.abc import Callable

import torch
from torch import Tensor

from fedspallm_appfl.errors import ConfigError
from fedspallm_appfl.pruning import admm, magnitude, sparsegpt, wanda
from fedspallm_appfl.pruning.pruner import Prepared, Pruner, Rule, guarded, of_function
from fedspallm_appfl.pruning.statistics import InputGram, InputNorms, Statistic
from fedspallm_appfl.settings.plugins import Registry
from fedspallm_appfl.settings.schema import Pruning
from fedspallm_appfl.tensors.sparsity import already_zero

_BUILT_IN = (sparsegpt.PRUNER, admm.PRUNER, wanda.PRUNER, magnitude.PRUNER)
REGISTRY: Registry[Pruner] = Registry("a pruner", {one.name: one for one in _BUILT_IN})
BUILT_IN, names, find = REGISTRY.built_in, REGISTRY.names, REGISTRY.find


def register(pruner: Pruner) -> None:
    """Add a pruner, in place of an earlier one of that name unless that is built in.

    Raises:
        ConfigError: its name is taken or not made of letters, digits, '-' and '_'.
    """
    REGISTRY.add(pruner.name, guarded(pruner))


def pruner(
    name: str, needs: type[InputNorms] | type[InputGram] | None = None, keeps_weights: bool = False
) -> Callable[[Rule], Rule]:
    """Make a function a pruner that a configuration can name (see `pruner.of_function`).

    Args:
        name: its name.
        needs: what it is told of the inputs: `InputNorms`, `InputGram`, or None for nothing.
        keeps_weights: it chooses a mask and leaves kept weights as they are; then masks alone travel.

    Raises:
        ConfigError: the name is taken or none, or `needs` is no statistic.
    """
    if not isinstance(name, str) or needs not in (None, InputNorms, InputGram):
        raise ConfigError(
            f"write @fs.pruner(name, needs=...) with a name and InputNorms, InputGram or None; got {name!r}, {needs!r}"
        )

    def decorate(function: Rule) -> Rule:
        register(of_function(name, function, needs, keeps_weights))
        return function

    return decorate


def new_statistic(settings: Pruning, in_features: int, device: torch.device) -> Statistic | None:
    """An empty accumulator of what the pruner needs to know of the inputs; None if it needs nothing."""
    kind = find(settings.pruner).statistic(settings.refit)
    return None if kind is None else kind(in_features, device)


def prepare(settings: Pruning, statistic: Statistic | None) -> Prepared:
    """Do once what linears with the same input share (see `Pruner.ready`)."""
    return find(settings.pruner).ready(settings, statistic)


def keeps_weights(settings: Pruning) -> bool:
    """Whether the pruner leaves the weights that it keeps as they were, so that a mask says all that it did."""
    found = find(settings.pruner)
    return found.keeps_weights and not found.refits(settings.refit)


def prune(weight: Tensor, settings: Pruning, statistic: Statistic | None = None) -> tuple[Tensor, Tensor]:
    """Prune one matrix: (weight (O, I) float32, zero where pruned; mask (O, I) bool, True = kept)."""
    return prepare(settings, statistic).prune_all(weight, settings.own_target, already_zero(weight))
