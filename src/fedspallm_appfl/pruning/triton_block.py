"""One column block of SparseGPT on a GPU in one launch, in Triton.

Source: Frantar & Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", ICML 2023,
algorithm 1, the loop over the columns of a block.

Output rows are independent: each program takes a few of them through all columns of the block, with the
weights in registers from the first column to the last, and no program waits for another.

Legend: B columns of the block, O out features.
"""

from __future__ import annotations

import functools
import os
import shutil
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedspallm_appfl.tensors.target import NM, Target

if TYPE_CHECKING:
    import triton.language as tl

LARGEST_BLOCK = 256  # columns; more would not fit into the registers, which for n:m also hold the scores
USUAL_BLOCK = 128  # a narrower block runs the code compiled for this one
# Out features of a program. Few, as the columns are a chain of short steps whose latency only other programs can hide: 4096
# out features make 512 programs, one for each of the four schedulers of the 132 multiprocessors of a large GPU. Not fewer,
# since 8 floats fill the 32 bytes that memory hands out at a time.
TILE = 8
# A column goes round a single warp by shuffles; several warps would need shared memory and two barriers for it.
WARPS = 1


def available() -> bool:
    """Whether `solve` can run here.

    Triton is installed, and either there is a CUDA device and the C compiler that Triton builds its launcher with, or
    Triton's interpreter is on (`TRITON_INTERPRET=1`).
    """
    if find_spec("triton") is None:
        return False
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return os.environ.get("TRITON_INTERPRET") == "1" or (torch.cuda.is_available() and compiler is not None)


def supports(target: Target) -> bool:
    """Whether a target can be solved: ratios, and patterns n:m whose group fits into the largest block."""
    return not isinstance(target, NM) or target.group <= LARGEST_BLOCK


def solve(columns: Tensor, kept: Tensor, upper: Tensor, importance: Tensor, target: Target) -> None:
    """Prune the columns of one block and compensate errors in the columns to the right within the block.

    Source: Frantar & Alistarh, "SparseGPT", ICML 2023, algorithm 1. All tensors are on one CUDA device.

    Args:
        columns: (B, O) float32, contiguous: the transposed weights, changed in place to the pruned, compensated ones.
        kept: (B, O) bool, contiguous, True = kept: read for a ratio; written for n:m, where the smallest
            `weight^2 * importance` of each group go when its first column is due, ties by lowest column; entries that are
            False when it comes in go first, and always.
        upper: (B, B) float32, upper triangular with zeros below, any strides: the block's part of U.
        importance: (B,) float32, contiguous, `1 / U_jj^2`, or 0 for dead inputs; read for n:m.
        target: a ratio, or n:m with m dividing B.

    Raises:
        ValueError: the block has more than `LARGEST_BLOCK` columns, is no whole number of groups, or is not contiguous.
    """
    width, out_features = columns.shape
    n, m = (target.kept, target.group) if isinstance(target, NM) else (0, 1)
    if width > LARGEST_BLOCK or width % m:
        raise ValueError(f"a block has at most {LARGEST_BLOCK} columns in groups of {m}, got {width}")
    if not (columns.is_contiguous() and kept.is_contiguous() and importance.is_contiguous()):
        raise ValueError("columns, kept and importance must be contiguous")
    lanes = max(USUAL_BLOCK, 1 << (width - 1).bit_length())
    with torch.cuda.device_of(columns):
        _kernel()[(-(-out_features // TILE),)](
            columns,
            kept,
            upper,
            importance,
            width,
            out_features,
            *upper.stride(),
            n=n,
            m=m,
            lanes=lanes,
            tile=TILE,
            num_warps=WARPS,
            enable_fp_fusion=True,  # one rounding for a product and its subtraction; versions differ in their default
        )


@functools.cache
def _kernel() -> Any:
    """The kernel for Triton's compiler, which looks for its language among the globals of this module."""
    global tl
    import triton
    import triton.language as tl

    return triton.jit(_solve_tile)


def _solve_tile(
    columns: tl.tensor,
    kept: tl.tensor,
    upper: tl.tensor,
    importance: tl.tensor,
    width: tl.tensor,
    out_features: tl.tensor,
    upper_row: tl.tensor,
    upper_column: tl.tensor,
    n: tl.constexpr,
    m: tl.constexpr,
    lanes: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """Take `tile` out features through all columns. n = 0: the mask is given. `lanes` is a power of 2, at least `width`."""
    out = tl.program_id(0) * tile + tl.arange(0, tile)
    column = tl.arange(0, lanes)[:, None]
    here = out < out_features
    weights = tl.load(columns + column * out_features + out[None, :], (column < width) & here[None, :], 0.0)
    costs = tl.load(importance + column, column < width, 0.0)
    if n > 0:
        free = tl.load(kept + column * out_features + out[None, :], (column < width) & here[None, :], True)
    tl.debug_barrier()  # all threads have read before any of them writes: a column may be written by other threads
    for first in range(0, width, m):
        scores = weights * weights * costs
        if n > 0:
            scores = tl.where(free, scores, -1.0)
        for j in range(first, first + m):
            reach = tl.load(upper + j * upper_row + column * upper_column, column < width, 0.0)
            diagonal = tl.load(upper + j * (upper_row + upper_column))
            # Registers cannot be indexed by a variable, so column j is a sum in which nothing else is left.
            weight = tl.sum(tl.where(column == j, weights, 0.0), 0)
            if n > 0:
                score = tl.sum(tl.where(column == j, scores, 0.0), 0)[None, :]
                before = (scores < score) | ((scores == score) & (column < j))
                group = (column >= first) & (column < first + m)
                keep = tl.sum((group & before).to(tl.int32), 0) >= m - n
                keep = keep & (tl.sum(((column == j) & free).to(tl.int32), 0) > 0)
                tl.store(kept + j * out_features + out, keep, here)
            else:
                keep = tl.load(kept + j * out_features + out, here, True)
            error = tl.where(keep, 0.0, weight / diagonal)
            tl.store(columns + j * out_features + out, tl.where(keep, weight, 0.0), here)
            # Columns up to j are in memory already; what this makes of them here is never read.
            weights -= reach * error[None, :]
