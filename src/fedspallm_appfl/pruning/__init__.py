"""Local pruners, one matrix at a time: `sparsegpt`, `wanda`, `magnitude` (docs/method.md section 1).

A pruner is chosen by name. It says what it needs to know of a linear's inputs, prepares that once for all linears that
share an input, and prunes each of them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedspallm_appfl.pruning import magnitude, sparsegpt, wanda
from fedspallm_appfl.pruning.gram import InputGram, InputNorms, Statistic
from fedspallm_appfl.sparsity import Target

PRUNERS = ("sparsegpt", "wanda", "magnitude")
KEEP_WEIGHTS = frozenset({"wanda", "magnitude"})  # they choose a mask and leave kept weights as they are


@dataclass(frozen=True)
class Settings:
    """How to prune a matrix.

    Attributes:
        pruner: `sparsegpt`, `wanda` or `magnitude`.
        target: ratio or n:m.
        damping: SparseGPT's `percdamp`, added to the Hessian's diagonal as a share of its mean.
        damping_retries: how often a failed factorization is tried again with ten times the damping.
        column_block: SparseGPT's column block.
    """

    pruner: str
    target: Target
    damping: float = 0.01
    damping_retries: int = 3
    column_block: int = sparsegpt.COLUMN_BLOCK

    @property
    def keeps_weights(self) -> bool:
        """Whether a mask says all that the pruner did."""
        return self.pruner in KEEP_WEIGHTS


Prune = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Prepared:
    """A pruner ready for all linears that share one input.

    Attributes:
        prune: weight (O, I) float -> (pruned weight (O, I) float32, mask (O, I) bool with True = kept).
        notes: what the report should say, e.g. the damping if it had to be raised.
    """

    prune: Prune
    notes: dict[str, float] = field(default_factory=dict)


def new_statistic(settings: Settings, in_features: int, device: torch.device) -> Statistic | None:
    """An empty accumulator of what the pruner needs to know of the inputs; None if it needs nothing."""
    if settings.pruner == "sparsegpt":
        return InputGram(in_features, device)
    return InputNorms(in_features, device) if settings.pruner == "wanda" else None


def prepare(settings: Settings, statistic: Statistic | None) -> Prepared:
    """Do once what linears with the same input share.

    Args:
        settings: how to prune.
        statistic: what `new_statistic` returned, filled with inputs.

    Raises:
        PruningError: SparseGPT's factorization keeps failing.
    """
    if isinstance(statistic, InputGram):
        width = sparsegpt.block_width(settings.target, settings.column_block)
        factor = sparsegpt.Factor(statistic, settings.damping, settings.damping_retries, width)
        notes = {"damping": factor.damping} if factor.attempts > 1 else {}
        return Prepared(lambda w: sparsegpt.prune(w, settings.target, factor), notes)
    if statistic is not None:
        return Prepared(lambda w: wanda.prune(w, settings.target, statistic))
    return Prepared(lambda w: magnitude.prune(w, settings.target))
