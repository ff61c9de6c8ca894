"""ADMM pruning: search mask and weights together, then fit the kept weights.

Source: Meng, Behdin, Wang & Mazumder, "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language
Models", NeurIPS 2024, algorithm 1. With the damped correlation matrix C (see `least_squares`) and scaled weights W, the
error `tr (X - W) C (X - W)^T` is minimized over X = Q with Q sparse; with the scaled multiplier U and penalty rho a step is

    X = W + (Q - U - W) rho (C + rho)^-1,    Q = the largest entries of X + U,    U = X + U - Q.

So Q is `Z = X + U` inside the mask, and U is Z outside it: Z and the mask are the whole state, and with
`P = 1 - rho (C + rho)^-1` a step is `Z <- Q + (W + Z - 2 Q) P`. Least squares on the support (`least_squares`) follow.

Where this differs from the authors' code:
* columns are scaled by what an entry costs once the others make up for it, `1 / (C^-1)_jj` as in SparseGPT: entries
  compare by that, and a third of the steps give the same error;
* the penalty takes values in the same range for any number of steps, so more steps mean a slower, better search; it
  does not depend on how much the mask changed, but a mask that stays the same for long ends the search;
* U stays when the penalty grows, instead of rho U: simpler, and the error is a little smaller;
* no eigendecomposition: `(C + rho)^-1` by Cholesky factors costs less than the product of eigenvectors;
* exactly the requested number of entries is pruned, ties by index;
* weights of dead features are pruned first, and the remaining ones do not change.

Legend: O out features, I in features.
"""

from functools import cached_property

import torch
from torch import Tensor

from fedspallm_appfl.pruning import least_squares
from fedspallm_appfl.pruning.least_squares import Correlation, inverted, numbers
from fedspallm_appfl.pruning.pruner import Prepared, Pruner, raised_damping
from fedspallm_appfl.pruning.statistics import InputGram, mirror
from fedspallm_appfl.settings.schema import Pruning
from fedspallm_appfl.tensors.sparsity import select
from fedspallm_appfl.tensors.target import Target

STEPS = 20
PENALTIES = (0.25, 2.0)  # the first and, at the latest, the last
LEAST_PENALTIES = 7  # while there are as many steps
PERIOD = 3  # steps with one penalty, at most
PATIENCE = 2  # the search ends after this many penalties in a row without a change of the mask
EASED = 0.1  # added to C for the costs: the inverse of C alone is noise where inputs hardly differ


class Metric:
    """What the searches of all matrices that have the same input share.

    Attributes:
        correlation: of the inputs.
    """

    def __init__(self, correlation: Correlation) -> None:
        self.correlation = correlation

    @cached_property
    def scale(self) -> Tensor:
        """(I,) float32, the square root of what an entry of each column costs."""
        eased = self.correlation.matrix.clone()
        eased.diagonal().add_(EASED)
        return inverted(eased).diagonal().rsqrt()

    def pull(self, penalty: float) -> Tensor:
        """(I, I) float32, `1 - rho (C + rho)^-1` with C scaled."""
        square = self.scale.square()
        damped = self.correlation.matrix.clone()
        damped.diagonal().add_(penalty * square)
        inverted(damped).mul_(self.scale).mul_(-penalty * self.scale.unsqueeze(1))
        damped.diagonal().add_(1.0)
        return damped


def prune(
    weight: Tensor, target: Target, metric: Metric, steps: int = STEPS, zero: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Prune one matrix.

    Args:
        weight: (O, I) float, not changed.
        target: ratio or n:m; for n:m, I is a multiple of m.
        metric: of the layer's inputs.
        steps: maximum number of ADMM steps.
        zero: (O, I) bool, entries that are pruned first, and all of them; None for none.

    Returns:
        (pruned weight (O, I) float32, mask (O, I) bool with True = kept).
    """
    correlation = metric.correlation
    state, mask = _search(correlation.scaled(weight).mul_(metric.scale), target, metric, steps, zero)
    start = torch.mul(state, numbers(mask), out=state).div_(metric.scale)
    return least_squares.fit(weight, mask, start, correlation), mask


def _search(
    weight: Tensor, target: Target, metric: Metric, steps: int, zero: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Z (O, I) float32 and the mask after the last step, from a scaled weight."""
    state, spare = weight.clone(), torch.empty_like(weight)
    mask, settled = _largest(state, target, zero, spare), 0
    for penalty, count in _schedule(steps):
        pull, earlier = metric.pull(penalty), mask
        for _ in range(count):
            _step(state, weight, mask, pull, spare)
            state, spare = spare, state
            mask = _largest(state, target, zero, spare)
        del pull  # free memory for the next one
        settled = settled + 1 if torch.equal(mask, earlier) else 0
        if settled == PATIENCE:
            break
    return state, mask


def _schedule(steps: int) -> list[tuple[float, int]]:
    """(penalty, steps with it), penalties in geometric progression."""
    number = max(min(steps, LEAST_PENALTIES), -(-steps // PERIOD))
    first, last = PENALTIES
    growth = (last / first) ** (1 / max(1, number - 1))
    return [(first * growth**place, (place + 1) * steps // number - place * steps // number) for place in range(number)]


def _step(state: Tensor, weight: Tensor, mask: Tensor, pull: Tensor, out: Tensor) -> None:
    """`out = Q + (W + Z - 2 Q) P`, with Q the kept entries of Z."""
    torch.mul(state, numbers(mask), out=out)
    for rows in least_squares.slices(len(state)):
        out[rows].addmm_((weight[rows] + state[rows]).sub_(out[rows], alpha=2), pull)


def _largest(state: Tensor, target: Target, zero: Tensor | None, scores: Tensor) -> Tensor:
    """(O, I) bool, True at the entries to keep. `scores` (O, I) float32 is overwritten."""
    torch.abs(state, out=scores)
    if zero is None:
        return ~select(scores, target, per_row=False)
    return ~select(scores.masked_fill_(zero, -1.0), target, per_row=False).logical_or_(zero)


def _prepare(settings: Pruning, gram: InputGram) -> Prepared:
    correlation = Correlation(mirror(gram.upper), settings.damping)
    metric = Metric(correlation)
    return Prepared(
        lambda weight: prune(weight, settings.own_target, metric, settings.iterations),
        lambda weight, mask: least_squares.refit(weight, mask, weight * mask, correlation),
        raised_damping(settings, correlation),
        lambda weight, zero: prune(weight, settings.own_target, metric, settings.iterations, zero),
    )


def _working_bytes(rows: int, features: int) -> int:
    """Measured: the search with the step of one penalty; or the fit."""
    search = 20 * rows * features + 4 * features * features
    return max(search, least_squares.fitting_bytes(rows, features, 5))


PRUNER = Pruner("admm", needs=InputGram, prepare=_prepare, fits=True, working_bytes=_working_bytes)
