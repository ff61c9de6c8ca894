"""Wanda: prune by magnitude times input norm, row by row; what is kept stays as it was.

Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024, equation 1:
`S_ij = |W_ij| * ||x_j||_2`, compared within each output row. Counts of the rows are cumulative, so that the matrix has
exactly `floor(s * O * I)` zeros.

Legend: O out features, I in features.
"""

import torch
from torch import Tensor

from fedspallm_appfl.pruning.pruner import Prepared, Pruner
from fedspallm_appfl.pruning.statistics import InputNorms, Statistic
from fedspallm_appfl.settings.schema import Pruning
from fedspallm_appfl.tensors.sparsity import select, smallest_in_rows, spread
from fedspallm_appfl.tensors.target import NM, Target


def prune(weight: Tensor, target: Target, statistic: Statistic, zero: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Prune one matrix.

    Args:
        weight: (O, I) float32, not changed.
        target: ratio or n:m; for n:m, I is a multiple of m.
        statistic: of the layer's inputs.
        zero: (O, I) bool, entries that are pruned first, and all of them; None for none.

    Returns:
        (pruned weight (O, I) float32, mask (O, I) bool with True = kept).
    """
    scores = weight.abs() * statistic.diagonal().sqrt()
    if zero is None:
        mask = ~select(scores, target, per_row=True)
    elif isinstance(target, NM):
        mask = ~select(scores.masked_fill_(zero, -1.0), target, per_row=True).logical_or_(zero)
    else:
        counts = spread(target, [weight.shape[1]] * len(weight), zero.sum(1).tolist())
        mask = ~smallest_in_rows(scores.masked_fill_(zero, -1.0), torch.tensor(counts, device=weight.device))
    return weight * mask, mask


def _prepare(settings: Pruning, statistic: Statistic) -> Prepared:
    return Prepared(
        lambda weight: prune(weight, settings.own_target, statistic),
        torch.mul,
        sparse=lambda weight, zero: prune(weight, settings.own_target, statistic, zero),
    )


PRUNER = Pruner(
    "wanda",
    needs=InputNorms,
    prepare=_prepare,
    keeps_weights=True,
    working_bytes=lambda rows, features: 14 * rows * features,  # measured
)
