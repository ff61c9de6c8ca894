"""Magnitude pruning: prune the smallest weights of a matrix. Needs no data.

Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015; compared over the
whole matrix, as the baselines of SparseGPT and Wanda do.

Legend: O out features, I in features.
"""

from torch import Tensor

from fedspallm_appfl.tensors.sparsity import Target, select


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
