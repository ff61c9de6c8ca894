"""SparseGPT: prune column by column and let the columns to the right make up for the error.

Source: Frantar & Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", ICML 2023,
algorithm 1. With `H = G + damping * mean(diag G) * I` and U the upper Cholesky factor of its inverse (`H^-1 = U^T U`):
columns are visited in blocks; at the start of a block the entries with the smallest `W^2 / U_jj^2` are chosen; each
pruned entry leaves an error `W_j / U_jj`, which `U` distributes over the columns that are still to come.

Where this differs from the authors' code:
* exactly as many entries are pruned as asked, counted cumulatively over column blocks, ties by index;
* an input feature that is always zero makes its weights free: they are pruned first and those that stay are left as they
  were (the authors set them all to zero, which would pull down the mean over clients that do see the feature);
* only H is factored, never inverted: with the order of features reversed, `H = R R^T` with R upper triangular and
  `U = R^-1`. With D what the finished columns have lost, the next block of columns b is, before its own loop,
  `W_b + D R_b U_bb`, where R_b are the rows of R of the finished columns and U_bb the inverse of a small triangle. The
  `R_b U_bb` are made once for all linears that share an input. A factorization that fails is tried again with ten times
  the damping, `retries` times, and then is an error.

The work runs on the transposed matrix, so that a column lies in contiguous memory.

Legend: O out features, I in features.
"""

import torch
from torch import Tensor

from fedspallm_appfl.errors import PruningError
from fedspallm_appfl.pruning import column_block
from fedspallm_appfl.pruning.gram import InputGram
from fedspallm_appfl.sparsity import NM, Ratio, Target, kth_smallest

COLUMN_BLOCK = 128


class Factor:
    """One Gram matrix, factored for all linears that have the same input.

    Attributes:
        width: columns of a block; the last one may have fewer.
        panels: (I, I) float32; for the block of columns b: `U_bb` on the diagonal, `R_b U_bb` above it.
        importance: (I,) float32, `1 / U_jj^2`, what a squared weight of each column costs; 0 for dead features.
        dead: (I,) bool, features that are always zero.
        damping: the damping that was used in the end, as a share of mean(diag G).
        attempts: factorizations tried.
    """

    def __init__(self, gram: InputGram, damping: float, retries: int, width: int = COLUMN_BLOCK) -> None:
        """Factor a Gram matrix.

        Raises:
            PruningError: the matrix could not be factored with any of the dampings tried.
        """
        self.width = width
        self.dead = gram.diagonal() == 0
        factor = self._cholesky(gram, damping, retries)
        self.importance = factor.diagonal().square().masked_fill_(self.dead, 0.0)
        self.panels = _panels_in_place(factor, width)

    def blocks(self) -> list[slice]:
        """The blocks of columns, in order."""
        return [slice(start, min(start + self.width, len(self.dead))) for start in range(0, len(self.dead), self.width)]

    def _cholesky(self, gram: InputGram, damping: float, retries: int) -> Tensor:
        """R, with `G + damping mean(diag G) I = R R^T`; a dead feature has mean(diag G) on the diagonal of G."""
        reversed_gram = gram.matrix().flip(0, 1)
        diagonal = reversed_gram.diagonal()
        mean = float(diagonal.mean()) or 1.0
        diagonal[self.dead.flip(0)] = mean
        added = 0.0
        for self.attempts in range(1, retries + 2):
            self.damping = damping * 10.0 ** (self.attempts - 1)
            diagonal += self.damping * mean - added
            added = self.damping * mean
            lower, failed = torch.linalg.cholesky_ex(reversed_gram)
            if not failed:
                del reversed_gram, diagonal
                return lower.flip(0, 1)
        raise PruningError(
            f"the Cholesky factorization failed {self.attempts} times, at last with damping {self.damping:g}; "
            "give more or more varied calibration text, a larger `damping`, or more `damping_retries`"
        )


def _panels_in_place(factor: Tensor, width: int) -> Tensor:
    for start in range(0, len(factor), width):
        block = slice(start, min(start + width, len(factor)))
        identity = torch.eye(block.stop - start, device=factor.device)
        inverse = torch.linalg.solve_triangular(factor[block, block], identity, upper=True)
        factor[:start, block] = factor[:start, block] @ inverse
        factor[block, block] = inverse
    return factor


def prune(weight: Tensor, target: Target, factor: Factor) -> tuple[Tensor, Tensor]:
    """Prune one matrix and compensate.

    Args:
        weight: (O, I) float, not changed.
        target: ratio or n:m; for n:m, I and the width of a column block are multiples of m.
        factor: of the Gram matrix of the layer's inputs.

    Returns:
        (pruned weight (O, I) float32, mask (O, I) bool with True = kept).
    """
    lost = weight.T.to(
        torch.float32, memory_format=torch.contiguous_format, copy=True
    )  # dense minus pruned, once visited
    pruned, kept = torch.empty_like(lost), torch.ones_like(lost, dtype=torch.bool)
    for block in factor.blocks():
        columns, importance = pruned[block], factor.importance[block]
        columns.copy_(lost[block]).addmm_(factor.panels[: block.start, block].T, lost[: block.start])
        if isinstance(target, Ratio):
            rows = columns.shape[1]
            kept[block] = _keep(columns, importance, target.zeros(block.stop * rows) - target.zeros(block.start * rows))
        column_block.solve(columns, kept[block], factor.panels[block, block].contiguous(), importance, target)
        lost[block] -= columns
    result = lost.view(weight.shape).copy_(pruned.T)  # nothing is needed any more of what was lost
    return result, kept.T.contiguous()


def _keep(columns: Tensor, importance: Tensor, count: int) -> Tensor:
    """(columns, O) bool, False for the `count` entries of a block to prune; ties by row, then by column."""
    if count == 0:
        return torch.ones_like(columns, dtype=torch.bool)
    scores = columns.square().mul_(importance.unsqueeze(1))
    threshold = kth_smallest(scores.view(-1), count)
    pruned, ties = scores < threshold, scores == threshold
    missing = count - int(pruned.count_nonzero())
    if missing == int(ties.count_nonzero()):
        return ~pruned.logical_or_(ties)
    first = ties.T.nonzero()[:missing]
    pruned[first[:, 1], first[:, 0]] = True
    return ~pruned


def block_width(target: Target, width: int = COLUMN_BLOCK) -> int:
    """Columns of a block: `width`, or for n:m the nearest multiple of m below it."""
    return max(target.group, width - width % target.group) if isinstance(target, NM) else width
