"""Magnitude pruning: prune the smallest weights of a matrix. Needs no data.

Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015; compared over the
whole matrix, as the baselines of SparseGPT and Wanda do.

Legend: O out features, I in features.
"""

import torch
from torch import Tensor

from fedspallm_appfl.pruning.pruner import Prepared, Pruner
from fedspallm_appfl.settings.schema import Pruning
from fedspallm_appfl.tensors.sparsity import select
from fedspallm_appfl.tensors.target import Target


def prune(weight: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """Prune one matrix.

    Args:
        weight: (O, I) float32, not changed.
        target: ratio or n:m; for n:m, I is a multiple of m.

    Returns:
        (pruned weight (O, I) float32, mask (O, I) bool with True = kept).
    """
    mask = ~select(weight.abs(), target, per_row=False)
    return weight * mask, mask


def _prepare(settings: Pruning, statistic: object) -> Prepared:
    return Prepared(lambda weight: prune(weight, settings.own_target), torch.mul)


PRUNER = Pruner(
    "magnitude",
    needs=None,
    prepare=_prepare,
    keeps_weights=True,
    working_bytes=lambda rows, features: 11 * rows * features,  # measured
)
