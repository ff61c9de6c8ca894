"""Slow, plain second writings of what the package computes, used by several tests."""

import torch
from torch import Tensor


def sparsegpt(
    weight: Tensor, gram: Tensor, zeros_by_block: list[tuple[int, int, int]], damping: float
) -> tuple[Tensor, Tensor]:
    """SparseGPT's algorithm 1 in float64, column by column, with an explicit inverse.

    A feature that is always zero costs nothing: its weights go first, and those that stay are left alone.

    Args:
        weight: (O, I).
        gram: (I, I), `sum x x^T`.
        zeros_by_block: (first column, last column + 1, zeros) of each column block.
        damping: share of the mean diagonal that is added to it.
    """
    work, kept = weight.double().clone(), torch.ones(weight.shape, dtype=torch.bool)
    gram = gram.double().clone()
    dead = gram.diagonal() == 0
    mean = gram.diagonal().mean()
    gram.diagonal()[dead] = mean
    hessian = gram + damping * mean * torch.eye(len(gram), dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    for first, end, zeros in zeros_by_block:
        scores = work[:, first:end] ** 2 / upper.diagonal()[first:end] ** 2 * ~dead[first:end]
        order = scores.flatten().argsort(stable=True)[:zeros]
        pruned = torch.zeros(scores.numel(), dtype=torch.bool)
        pruned[order] = True
        kept[:, first:end] = ~pruned.view(scores.shape)
        for column in range(first, end):
            error = work[:, column] * ~kept[:, column] / upper[column, column] * ~dead[column]
            work[:, column:] -= error[:, None] * upper[column, column:][None]
            work[:, column] *= kept[:, column]
    return work, kept


def column_blocks(rows: int, columns: int, share: float, width: int = 128) -> list[tuple[int, int, int]]:
    """Column blocks with cumulative counts: floor(share * entries) so far, minus those of the blocks before."""
    ends = [min(end, columns) for end in range(width, columns + width, width)]
    starts = [0, *ends[:-1]]
    return [
        (a, b, int(share * rows * b + 1e-9) - int(share * rows * a + 1e-9)) for a, b in zip(starts, ends, strict=True)
    ]
