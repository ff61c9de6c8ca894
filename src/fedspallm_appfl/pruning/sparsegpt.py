"""SparseGPT: prune column by column and compensate errors in the columns to the right.

Source: Frantar & Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", ICML 2023,
algorithm 1. With `H = G + damping * mean(diag G) * I` and U the upper Cholesky factor of its inverse (`H^-1 = U^T U`):
columns are visited in blocks; at the start of a block the entries with the smallest `W^2 / U_jj^2` are chosen; each
pruned entry leaves an error `W_j / U_jj`, which `U` distributes over the remaining columns.

Where this differs from the authors' code:
* exactly the requested number of entries is pruned, counted cumulatively over column blocks, ties by index;
* weights of an input feature that is always zero have no cost: they are pruned first, and the remaining ones do not change
  (the authors set them all to zero, which would lower the mean over clients that do see the feature);
* only H is factored, never inverted: `H = R R^T` with R upper triangular, block by block from the last to the first, has
  `U = R^-1`. With D the loss of the finished columns, the next block of columns b is, before its own loop,
  `W_b + D R_b U_bb`, where R_b are the rows of R of the finished columns and U_bb the inverse of a small triangle. The
  `R_b U_bb` are computed once for all linears that share an input. A failed factorization is repeated with ten times
  the damping, up to `retries` times, and is then an error.

All work uses the transposed matrix, so a column is contiguous in memory.

Legend: O out features, I in features.
"""

import torch
from torch import Tensor

from fedspallm_appfl.errors import PruningError
from fedspallm_appfl.pruning import column_block
from fedspallm_appfl.pruning.pruner import Prepared, Pruner
from fedspallm_appfl.pruning.statistics import InputGram
from fedspallm_appfl.settings.schema import Pruning
from fedspallm_appfl.tensors.sparsity import kth_smallest, spread, with_ties
from fedspallm_appfl.tensors.target import NM, Ratio, Target

COLUMN_BLOCK = 128


class Factor:
    """One Gram matrix, factored for all linears that have the same input.

    Attributes:
        blocks: the blocks of columns, in order; the last one may be narrower.
        importance: (I,) float32, `1 / U_jj^2`, cost of a squared weight of each column; 0 for dead features.
        dead: (I,) bool, features that are always zero.
        damping: the damping that worked, as a share of mean(diag G).
        attempts: factorizations tried.
    """

    def __init__(self, gram: InputGram, damping: float, retries: int, width: int = COLUMN_BLOCK) -> None:
        """Factor a Gram matrix in place: the part below its diagonal is overwritten, the part above is kept.

        Raises:
            PruningError: the matrix could not be factored with any of the dampings tried.
        """
        features = len(gram.upper)
        self.blocks = [slice(start, min(start + width, features)) for start in range(0, features, width)]
        self._store = gram.upper
        self._corners = torch.zeros(features, min(width, features), device=self._store.device)
        diagonal = gram.diagonal().clone()
        self.dead = diagonal == 0
        mean = float(diagonal.mean()) or 1.0
        diagonal[self.dead] = mean
        for self.attempts in range(1, retries + 2):
            self.damping = damping * 10.0 ** (self.attempts - 1)
            if self._factor(diagonal + self.damping * mean):
                break
        else:
            raise PruningError(
                f"the Cholesky factorization failed {self.attempts} times, at last with damping {self.damping:g}; "
                "give more or more varied calibration text, a larger `damping`, or more `damping_retries`"
            )
        for block in self.blocks:
            self.carry(block).copy_(self.corner(block).T @ self.carry(block))
        inverse = torch.cat([self.corner(block).diagonal() for block in self.blocks])
        self.importance = inverse.square().reciprocal_().masked_fill_(self.dead, 0.0)

    def corner(self, block: slice) -> Tensor:
        """(B, B) float32 upper triangular, `U_bb` of a block."""
        return self._corners[block, : block.stop - block.start]

    def carry(self, block: slice) -> Tensor:
        """(B, start) float32, `(R_b U_bb)^T`: times the loss of the finished columns, it gives the gain of the block."""
        return self._store[block, : block.start]

    def _factor(self, diagonal: Tensor) -> bool:
        """Factor with this diagonal, from the last block to the first; returns whether it succeeded.

        Until all blocks are done, `carry(b)` holds the rows of R of the columns before b, transposed.
        """
        failed = []
        for block in reversed(self.blocks):
            behind = self._store[block.stop :, block]
            corner = self._store[block, block].triu(1)
            corner += corner.T.clone()
            corner.diagonal().copy_(diagonal[block])
            lower, info = torch.linalg.cholesky_ex(corner.addmm_(behind.T, behind, alpha=-1).flip(0, 1))
            failed.append(info)
            identity = torch.eye(len(corner), device=corner.device)
            inverse = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
            self.corner(block).copy_(inverse)
            rest = self._store[: block.start, block].T
            rest = torch.addmm(rest, behind.T, self._store[block.stop :, : block.start], alpha=-1)
            self.carry(block).copy_(inverse @ rest)
        return not bool(torch.stack(failed).any())


def prune(weight: Tensor, target: Target, factor: Factor, zero: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Prune one matrix and compensate.

    Args:
        weight: (O, I) float, not changed.
        target: ratio or n:m; for n:m, I and the width of a column block are multiples of m.
        factor: of the Gram matrix of the layer's inputs.
        zero: (O, I) bool, entries that are pruned first, and all of them; None for none.

    Returns:
        (pruned weight (O, I) float32, mask (O, I) bool with True = kept).
    """
    if zero is None:
        kept = torch.ones_like(weight.T, dtype=torch.bool, memory_format=torch.contiguous_format)
    else:
        kept = (~zero).T.contiguous()
    return _sweep(weight, kept, target, factor, zero), kept.T.contiguous()


def compensate(weight: Tensor, mask: Tensor, factor: Factor) -> Tensor:
    """Prune one matrix with a given mask, and compensate.

    Args:
        weight: (O, I) float, not changed.
        mask: (O, I) bool, True = kept, not changed.
        factor: of the Gram matrix of the layer's inputs.

    Returns:
        (O, I) float32, zero where the mask is False.
    """
    return _sweep(weight, mask.T.contiguous(), None, factor)


def _sweep(weight: Tensor, kept: Tensor, target: Target | None, factor: Factor, zero: Tensor | None = None) -> Tensor:
    """Go over the blocks of columns. `kept` (I, O) is written, or without a target read. Returns (O, I) float32."""
    # The dense columns; once visited, dense minus pruned.
    lost = weight.T.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    pruned = torch.empty_like(lost)
    counts = _counts(target, len(weight), zero, factor) if isinstance(target, Ratio) else []
    for number, block in enumerate(factor.blocks):
        columns, importance = pruned[block], factor.importance[block]
        columns.copy_(lost[block]).addmm_(factor.carry(block), lost[: block.start])
        if counts:
            kept[block] = _keep(columns, importance, counts[number], None if zero is None else kept[block])
        choice = target or column_block.GIVEN
        column_block.solve(columns, kept[block], factor.corner(block).contiguous(), importance, choice)
        lost[block] -= columns
    return lost.view(weight.shape).copy_(pruned.T)  # the losses are no longer needed


def _counts(target: Ratio, rows: int, zero: Tensor | None, factor: Factor) -> list[int]:
    """Entries to prune in each block of columns."""
    already = [0 if zero is None else int(zero[:, block].count_nonzero()) for block in factor.blocks]
    return spread(target, [(block.stop - block.start) * rows for block in factor.blocks], already)


def _keep(columns: Tensor, importance: Tensor, count: int, free: Tensor | None) -> Tensor:
    """(columns, O) bool, False for the `count` entries of a block to prune; ties by row, then by column.

    Entries that are not `free` go first.
    """
    if count == 0:
        return torch.ones_like(columns, dtype=torch.bool)
    scores = columns.square().mul_(importance.unsqueeze(1))
    if free is not None:
        scores.masked_fill_(~free, -1.0)
    threshold = kth_smallest(scores.view(-1), count)
    if scores.is_cuda:
        return ~with_ties(scores.T.flatten(), threshold, count).view(scores.T.shape).T
    pruned, ties = scores < threshold, scores == threshold
    missing = count - int(pruned.count_nonzero())
    if missing == int(ties.count_nonzero()):
        return ~pruned.logical_or_(ties)
    first = ties.T.nonzero()[:missing]
    pruned[first[:, 1], first[:, 0]] = True
    return ~pruned


def block_width(target: Target, width: int = COLUMN_BLOCK) -> int:
    """Columns of a block: `width`, or for n:m the largest multiple of m up to it."""
    return max(target.group, width - width % target.group) if isinstance(target, NM) else width


def _prepare(settings: Pruning, gram: InputGram) -> Prepared:
    factor = Factor(gram, settings.damping, settings.damping_retries, block_width(settings.own_target))
    return Prepared(
        lambda weight: prune(weight, settings.own_target, factor),
        lambda weight, mask: compensate(weight, mask, factor),
        {"damping": factor.damping} if factor.attempts > 1 else {},
        lambda weight, zero: prune(weight, settings.own_target, factor, zero),
    )


PRUNER = Pruner(
    "sparsegpt",
    needs=InputGram,
    prepare=_prepare,
    factors=True,
    working_bytes=lambda rows, features: 11 * rows * features,  # measured
    prepared_bytes=lambda features: 2 * 4 * min(COLUMN_BLOCK, features) * features,  # the corners
)
