"""The inner loop of SparseGPT: visit the columns of one block and compensate each error in the columns to the right.

Source: Frantar & Alistarh, "SparseGPT", ICML 2023, algorithm 1, inner loop. For each column j in order, with U the upper
factor of the block: the error of a pruned entry is `w_j / U_jj`, and `U_jk` times it is subtracted from every column k > j.

There are three implementations: compiled loops and torch give the same bits, the Triton kernel rounds differently.

Legend: B columns of the block, O out features. Everything is transposed, so a column is contiguous in memory.
"""

from fractions import Fraction

import torch
from torch import Tensor

from fedspallm_appfl.pruning import triton_block
from fedspallm_appfl.tensors import native
from fedspallm_appfl.tensors.sparsity import select
from fedspallm_appfl.tensors.target import NM, Ratio, Target

TILE = 64  # rows that the compiled loop takes at a time
GIVEN = Ratio(Fraction(0))  # any ratio works as the target of an existing mask


def solve(columns: Tensor, kept: Tensor, upper: Tensor, importance: Tensor, target: Target) -> None:
    """Prune and compensate the columns of one block in place.

    Args:
        columns: (B, O) float32, the weights; pruned and compensated afterwards.
        kept: (B, O) bool, True = kept; given for a ratio. For n:m it is written, and entries that are False when it comes
            in go first, and always.
        upper: (B, B) float32, the block's factor U.
        importance: (B,) float32, cost of a squared weight of each column, `1 / U_jj^2`.
        target: ratio or n:m; for n:m, B is a multiple of m.
    """
    on_gpu = columns.is_cuda and len(columns) <= triton_block.LARGEST_BLOCK and triton_block.supports(target)
    if on_gpu and triton_block.available():
        triton_block.solve(columns, kept, upper, importance, target)
    elif native.serves(columns, kept, upper, importance) and len(columns) <= native.WIDEST_BLOCK:
        group, pruned = (target.group, target.group - target.kept) if isinstance(target, NM) else (0, 0)
        width, rows = columns.shape
        given = columns, kept, width, rows, upper, importance, group, pruned
        parts = native.ranges(columns.numel(), TILE * width)
        rows_of = [(part.start // width, min(part.stop // width, rows)) for part in parts]
        native.call_in_parts("sparsegpt_block", [(*given, *part) for part in rows_of])
    else:
        _column_by_column(columns, kept, upper, importance, target)


def _column_by_column(columns: Tensor, kept: Tensor, upper: Tensor, importance: Tensor, target: Target) -> None:
    diagonal = upper.diagonal().tolist()
    changes = torch.empty_like(columns)
    for j in range(len(columns)):
        if isinstance(target, NM) and j % target.group == 0:
            group = slice(j, j + target.group)
            scores = columns[group].square() * importance[group].unsqueeze(1)
            scores.masked_fill_(~kept[group], -1.0)
            kept[group] &= ~select(scores.T, target, per_row=True).T
        error = (columns[j] / diagonal[j]).masked_fill_(kept[j], 0.0)
        columns[j].masked_fill_(~kept[j], 0.0)
        columns[j + 1 :] -= torch.mul(upper[j, j + 1 :].unsqueeze(1), error, out=changes[j + 1 :])
