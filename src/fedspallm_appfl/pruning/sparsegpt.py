"""SparseGPT: prune column by column and let the columns to the right make up for the error.

Source: Frantar & Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", ICML 2023,
algorithm 1. With `H = G + damping * mean(diag G) * I` and U the upper Cholesky factor of its inverse (`H^-1 = U^T U`):
columns are visited in blocks; at the start of a block the entries with the smallest `W^2 / U_jj^2` are chosen; each
pruned entry leaves an error `W_j / U_jj`, which `U` distributes over the columns that are still to come.

Where this differs from the authors' code:
* exactly as many entries are pruned as asked, counted cumulatively over column blocks, ties by index;
* an input feature that is always zero makes its weights free: they are pruned first and those that stay are left as they
  were (the authors set them all to zero, which would pull down the mean over clients that do see the feature);
* U comes from one Cholesky factorization: with the order of features reversed, `H = R R^T` with R upper triangular, and
  `U = R^-1`.  A factorization that fails is tried again with ten times the damping, `retries` times, and then is an error.

The work runs on the transposed matrix, so that a column lies in contiguous memory, and in sub-blocks of 16 columns, so
that most of the compensation is a matrix product.

Legend: O out features, I in features.
"""

import torch
from torch import Tensor

from fedspallm_appfl.errors import PruningError
from fedspallm_appfl.pruning.gram import InputGram
from fedspallm_appfl.sparsity import NM, Target, select, smallest

COLUMN_BLOCK = 128
SUB_BLOCK = 16


class Factor:
    """The factor U of one Gram matrix, shared by all linears that have the same input.

    Attributes:
        upper: (I, I) float32, upper triangular, `(G + damping mean(diag G) I)^-1 = upper^T upper`, where dead features
            have mean(diag G) on the diagonal of G.
        dead: (I,) bool, features that are always zero.
        damping: the damping that was used in the end, as a share of mean(diag G).
        attempts: factorizations tried.
    """

    def __init__(self, gram: InputGram, damping: float, retries: int) -> None:
        """Factor a Gram matrix.

        Raises:
            PruningError: the matrix could not be factored with any of the dampings tried.
        """
        matrix = gram.matrix()
        diagonal = matrix.diagonal()
        self.dead = diagonal == 0
        mean = float(diagonal.mean()) or 1.0
        diagonal[self.dead] = mean
        added = 0.0
        for self.attempts in range(1, retries + 2):
            self.damping = damping * 10.0 ** (self.attempts - 1)
            diagonal += self.damping * mean - added
            added = self.damping * mean
            lower, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1))
            if not failed:
                break
        else:
            raise PruningError(
                f"the Cholesky factorization failed {self.attempts} times, at last with damping {self.damping:g}; "
                "give more or more varied calibration text, a larger `damping`, or more `damping_retries`"
            )
        identity = torch.eye(len(matrix), device=matrix.device)
        self.upper = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)


def prune(weight: Tensor, target: Target, factor: Factor, column_block: int = COLUMN_BLOCK) -> tuple[Tensor, Tensor]:
    """Prune one matrix and compensate.

    Args:
        weight: (O, I) float32, not changed.
        target: ratio or n:m; for n:m, I is a multiple of m.
        factor: of the Gram matrix of the layer's inputs.
        column_block: columns among which a ratio is compared at once.

    Returns:
        (pruned weight (O, I) float32, mask (O, I) bool with True = kept).
    """
    columns = weight.T.contiguous()
    kept = torch.ones_like(columns, dtype=torch.bool)
    in_features, out_features = columns.shape
    if isinstance(target, NM):
        column_block = max(target.group, column_block - column_block % target.group)
    for start in range(0, in_features, column_block):
        end = min(start + column_block, in_features)
        if not isinstance(target, NM):
            count = target.zeros(end * out_features) - target.zeros(start * out_features)
            kept[start:end] = ~_choose(columns[start:end], _importance(factor, start, end), count)
        errors = _compensate_inside(columns[start:end], kept[start:end], factor, start, target)
        columns[end:].addmm_(factor.upper[start:end, end:].T, errors, alpha=-1)
    return columns.T.contiguous(), kept.T.contiguous()


def _importance(factor: Factor, start: int, end: int) -> Tensor:
    """(columns,) float32: `1 / U_jj^2`, what a squared weight of each column costs; nothing where the input is dead."""
    cost = factor.upper.diagonal()[start:end].square().reciprocal()
    return cost.masked_fill(factor.dead[start:end], 0.0)


def _choose(columns: Tensor, importance: Tensor, count: int) -> Tensor:
    """(columns, O) bool, the entries of a column block to prune; ties by row, then by column."""
    scores = (columns.square() * importance.unsqueeze(1)).T.contiguous()
    return smallest(scores.flatten(), count).view(scores.shape).T


def _compensate_inside(columns: Tensor, kept: Tensor, factor: Factor, start: int, target: Target) -> Tensor:
    """Visit the columns of one block; `columns` and, for n:m, `kept` are changed in place. Returns errors (columns, O)."""
    upper = factor.upper[start : start + len(columns), start : start + len(columns)]
    importance = _importance(factor, start, start + len(columns))
    diagonal = upper.diagonal().tolist()
    errors = torch.zeros_like(columns)
    step = target.group * max(1, SUB_BLOCK // target.group) if isinstance(target, NM) else SUB_BLOCK
    for low in range(0, len(columns), step):
        high = min(low + step, len(columns))
        for j in range(low, high):
            if isinstance(target, NM) and j % target.group == 0:
                group = slice(j, j + target.group)
                scores = (columns[group].square() * importance[group].unsqueeze(1)).T
                kept[group] = ~select(scores, target, per_row=True).T
            error = torch.where(kept[j], 0.0, columns[j] / diagonal[j])
            columns[j] *= kept[j]
            columns[j + 1 : high].addr_(upper[j, j + 1 : high], error, alpha=-1)
            errors[j] = error
        columns[high:].addmm_(upper[low:high, high:].T, errors[low:high], alpha=-1)
    return errors
