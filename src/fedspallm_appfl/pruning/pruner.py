"""Local pruners, one matrix at a time: `sparsegpt`, `admm`, `wanda`, `magnitude` (docs/method.md section 1).

A pruner is chosen by name. It says what it needs to know of a linear's inputs, prepares that once for all linears that
share an input, and prunes each of them, or makes up for a mask that others chose.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedspallm_appfl.pruning import admm, least_squares, magnitude, sparsegpt, wanda
from fedspallm_appfl.pruning.correlation import Correlation
from fedspallm_appfl.pruning.statistics import InputGram, InputNorms, Statistic, mirror
from fedspallm_appfl.tensors.sparsity import Target, parse_target

PRUNERS = ("sparsegpt", "wanda", "magnitude", "admm")
KEEP_WEIGHTS = frozenset({"wanda", "magnitude"})  # they choose a mask and, not refitted, leave kept weights as they are


@dataclass(frozen=True)
class Settings:
    """How to prune a matrix.

    Attributes:
        pruner: one of `PRUNERS`.
        target: ratio or n:m.
        damping: added to the Hessian's diagonal, as a share of its mean (SparseGPT's `percdamp`) or, for ADMM and least
            squares, of each of its entries.
        damping_retries: how often a failed factorization of SparseGPT is tried again with ten times the damping.
        column_block: SparseGPT's column block.
        iterations: ADMM's steps at most.
        refit: least squares on the support after SparseGPT or Wanda; ADMM always does so, magnitude knows no inputs.
    """

    pruner: str
    target: Target
    damping: float = 0.01
    damping_retries: int = 3
    column_block: int = sparsegpt.COLUMN_BLOCK
    iterations: int = admm.STEPS
    refit: bool = False

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> "Settings":
        """Read them from plain values by the names of the configuration, the target from `sparsity`."""
        names = ("damping", "damping_retries", "iterations", "refit")
        given = {name: plain[name] for name in names if name in plain}
        return cls(plain["pruner"], parse_target(plain["sparsity"]), **given)

    @property
    def keeps_weights(self) -> bool:
        """Whether a mask says all that the pruner did."""
        return keeps_weights(self.pruner, self.refit)


def keeps_weights(pruner: str, refit: bool) -> bool:
    """Whether a pruner leaves the weights that it keeps as they were, so that a mask says all that it did."""
    return pruner in KEEP_WEIGHTS and not (refit and pruner == "wanda")


Prune = Callable[[Tensor], tuple[Tensor, Tensor]]
Compensate = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Prepared:
    """A pruner ready for all linears that share one input.

    Attributes:
        prune: weight (O, I) float -> (pruned weight (O, I) float32, mask (O, I) bool with True = kept).
        compensate: weight (O, I) float, mask (O, I) bool -> pruned weight (O, I) float32: the same with the mask given.
        notes: what the report should say, e.g. the damping if it had to be raised.
    """

    prune: Prune
    compensate: Compensate
    notes: dict[str, float] = field(default_factory=dict)


def new_statistic(settings: Settings, in_features: int, device: torch.device) -> Statistic | None:
    """An empty accumulator of what the pruner needs to know of the inputs; None if it needs nothing."""
    if settings.pruner == "magnitude":
        return None
    return InputNorms(in_features, device) if settings.keeps_weights else InputGram(in_features, device)


def prepare(settings: Settings, statistic: Statistic | None) -> Prepared:
    """Do once what linears with the same input share.

    Args:
        settings: how to prune.
        statistic: like what `new_statistic` returned, filled with inputs; used up, as its memory is worked in.

    Raises:
        PruningError: SparseGPT's factorization keeps failing, or the Gram matrix for ADMM or least squares holds NaN.
    """
    if settings.pruner == "magnitude" or statistic is None:
        return Prepared(lambda w: magnitude.prune(w, settings.target), torch.mul)
    if settings.keeps_weights:
        return Prepared(lambda w: wanda.prune(w, settings.target, statistic), torch.mul)
    if not isinstance(statistic, InputGram):
        raise TypeError(f"{settings.pruner} needs the Gram matrix of the inputs")
    return {"sparsegpt": _sparsegpt, "wanda": _refitted_wanda, "admm": _admm}[settings.pruner](settings, statistic)


def _sparsegpt(settings: Settings, gram: InputGram) -> Prepared:
    width = sparsegpt.block_width(settings.target, settings.column_block)
    factor = sparsegpt.Factor(gram, settings.damping, settings.damping_retries, width)
    prepared = Prepared(
        lambda w: sparsegpt.prune(w, settings.target, factor),
        lambda w, mask: sparsegpt.compensate(w, mask, factor),
        {"damping": factor.damping} if factor.attempts > 1 else {},
    )
    return _refitted(prepared, settings, gram.matrix()) if settings.refit else prepared


def _refitted_wanda(settings: Settings, gram: InputGram) -> Prepared:
    norms = InputNorms.of(gram.diagonal().clone(), gram.tokens)
    prepared = Prepared(lambda w: wanda.prune(w, settings.target, norms), torch.mul)
    return _refitted(prepared, settings, mirror(gram.upper))


def _refitted(prepared: Prepared, settings: Settings, gram: Tensor) -> Prepared:
    """A pruner with least squares after it. `gram` (I, I) is symmetric, and used up."""
    correlation = Correlation(gram, settings.damping)

    def prune(weight: Tensor) -> tuple[Tensor, Tensor]:
        start, mask = prepared.prune(weight)
        return least_squares.refit(weight, mask, start, correlation), mask

    def compensate(weight: Tensor, mask: Tensor) -> Tensor:
        return least_squares.refit(weight, mask, prepared.compensate(weight, mask), correlation)

    return Prepared(prune, compensate, prepared.notes or _notes(settings, correlation))


def _admm(settings: Settings, gram: InputGram) -> Prepared:
    correlation = Correlation(mirror(gram.upper), settings.damping)
    return Prepared(
        lambda w: admm.prune(w, settings.target, correlation, settings.iterations),
        lambda w, mask: least_squares.refit(w, mask, w * mask, correlation),
        _notes(settings, correlation),
    )


def _notes(settings: Settings, correlation: Correlation) -> dict[str, float]:
    return {"damping": correlation.damping} if correlation.damping > settings.damping else {}
