"""ADMM pruning: search mask and weights together, then fit the kept weights.

Source: Meng, Behdin, Wang & Mazumder, "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language
Models", NeurIPS 2024, algorithm 1. With the damped correlation matrix C (see `least_squares`) and scaled weights W, the
error `tr (X - W) C (X - W)^T` is minimized over X = Q with Q sparse; with the scaled multiplier U and penalty rho a step is

    X = W + (Q - U - W) rho (C + rho)^-1,    Q = the largest entries of X + U,    U = X + U - Q.

So Q is `Z = X + U` inside the mask, and U is Z outside it: Z and the mask are the whole state. Least
squares on the support (`least_squares`) follow.

Where this differs from the authors' code:
* the penalty takes the same values for any number of steps, so more steps mean a slower, better search; it does
  not depend on how much the mask changed, but a mask that stays the same for long ends the search;
* U stays when the penalty grows, instead of rho U: simpler, and the error is a little smaller;
* no eigendecomposition: `(C + rho)^-1` by Cholesky factors costs less than the product of eigenvectors;
* exactly the requested number of entries is pruned, ties by index;
* weights of dead features are pruned first, and the remaining ones do not change.

Legend: O out features, I in features.
"""

import torch
from torch import Tensor

from fedspallm_appfl.pruning import least_squares
from fedspallm_appfl.pruning.least_squares import Correlation
from fedspallm_appfl.pruning.pruner import Prepared, Pruner, raised_damping
from fedspallm_appfl.pruning.statistics import InputGram, mirror
from fedspallm_appfl.settings.schema import Pruning
from fedspallm_appfl.tensors.sparsity import select
from fedspallm_appfl.tensors.target import Target

STEPS = 60
PENALTIES = (0.1, 4.0)  # the first and, at the latest, the last
PERIOD = 3  # steps with one penalty
PATIENCE = 2  # the search ends after this many penalties in a row without a change of the mask


def prune(
    weight: Tensor, target: Target, correlation: Correlation, steps: int = STEPS, zero: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Prune one matrix.

    Args:
        weight: (O, I) float, not changed.
        target: ratio or n:m; for n:m, I is a multiple of m.
        correlation: of the layer's inputs.
        steps: maximum number of ADMM steps.
        zero: (O, I) bool, entries that are pruned first, and all of them; None for none.

    Returns:
        (pruned weight (O, I) float32, mask (O, I) bool with True = kept).
    """
    state, mask = _search(correlation.scaled(weight), target, correlation, steps, zero)
    return least_squares.fit(weight, mask, state.mul_(mask), correlation), mask


def _search(
    weight: Tensor, target: Target, correlation: Correlation, steps: int, zero: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Z (O, I) float32 and the mask after the last step, from a scaled weight."""
    state = weight.clone()
    mask, settled = _largest(state, target, zero), 0
    for penalty, count in _schedule(steps):
        shrinkage, earlier = correlation.shrinkage(penalty), mask
        for _ in range(count):
            _step(state, weight, mask, shrinkage)
            mask = _largest(state, target, zero)
        del shrinkage  # free memory for the next one
        settled = settled + 1 if torch.equal(mask, earlier) else 0
        if settled == PATIENCE:
            break
    return state, mask


def _schedule(steps: int) -> list[tuple[float, int]]:
    """(penalty, steps with it), penalties in geometric progression."""
    counts = [min(PERIOD, steps - start) for start in range(0, steps, PERIOD)]
    first, last = PENALTIES
    growth = (last / first) ** (1 / max(1, len(counts) - 1))
    return [(first * growth**number, count) for number, count in enumerate(counts)]


def _step(state: Tensor, weight: Tensor, mask: Tensor, shrinkage: Tensor) -> None:
    """`Z <- W + (Q - U - W) rho (C + rho)^-1 + U`, in place."""
    for rows in least_squares.slices(len(state)):
        kept = state[rows] * mask[rows]
        state[rows] -= kept
        kept -= state[rows]
        kept -= weight[rows]
        state[rows].add_(weight[rows]).addmm_(kept, shrinkage)


def _largest(state: Tensor, target: Target, zero: Tensor | None = None) -> Tensor:
    """(O, I) bool, True at the entries to keep."""
    if zero is None:
        return ~select(state.abs(), target, per_row=False)
    return ~select(state.abs().masked_fill_(zero, -1.0), target, per_row=False).logical_or_(zero)


def _prepare(settings: Pruning, gram: InputGram) -> Prepared:
    correlation = Correlation(mirror(gram.upper), settings.damping)
    return Prepared(
        lambda weight: prune(weight, settings.own_target, correlation, settings.iterations),
        lambda weight, mask: least_squares.refit(weight, mask, weight * mask, correlation),
        raised_damping(settings, correlation),
        lambda weight, zero: prune(weight, settings.own_target, correlation, settings.iterations, zero),
    )


def _working_bytes(rows: int, features: int) -> int:
    """Measured: the search with the step of one penalty, or the fit after it."""
    search = 20 * rows * features + 4 * features * features
    return max(search, least_squares.fitting_bytes(rows, features, 5))


PRUNER = Pruner("admm", needs=InputGram, prepare=_prepare, fits=True, working_bytes=_working_bytes)
