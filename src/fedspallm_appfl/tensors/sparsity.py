"""The exact choice of the entries to prune: as many as the target says, ties broken by index.

The authors' SparseGPT code thresholds with `<=` and removes one entry too many in each column block; here the count is met
exactly.

Legend: O out features, I in features.
"""

import math
import operator
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedspallm_appfl.tensors.target import NM, Ratio, Target

Array = np.ndarray[Any, Any]
SPACING = 61  # of the sample; shares no factor with widths of matrices
MARGIN = 2  # times the square root of the sample: four standard errors of a rank
LEAST_SAMPLE = 256
FEW_RANKS = 4  # for more different ranks rows are sorted
DIGITS = ((21, 11), (10, 11), (0, 10))  # lowest bit and width of each digit of a float32, the highest first


def kth_smallest(scores: Tensor, k: int) -> Tensor:
    """The k-th smallest score, counted from 1.

    Args:
        scores: (n,) float tensor without NaN.
        k: in [1, n].

    Returns:
        A tensor without dimensions.
    """
    if scores.device.type == "cpu":  # numpy's partition is much faster than torch's kthvalue
        return torch.as_tensor(_ranked(scores.numpy(), k), dtype=scores.dtype)
    return by_digits(scores, k)


def by_digits(scores: Tensor, k: int) -> Tensor:
    """`kth_smallest` by counting: the highest digit of the score of that rank first, then the next of those that share it.

    On a GPU `torch.kthvalue` leaves a single row to one thread block. This reads all scores three times, with every
    multiprocessor, and waits for nothing.

    Args:
        scores: (n,) float32 without NaN.
        k: in [1, n].

    Returns:
        A tensor without dimensions.
    """
    keys = scores.float().view(torch.int32)
    keys = keys ^ ((keys >> 31) & 0x7FFFFFFF)  # as integers in the order of the floats
    rank = torch.tensor(k, device=scores.device)
    found = torch.zeros((), dtype=torch.int32, device=scores.device)
    for shift, bits in DIGITS:
        digit = keys >> shift  # arithmetic: the first digit has a sign
        digit = digit + (1 << bits - 1) if shift + bits == 32 else digit & ((1 << bits) - 1)
        if shift + bits < 32:  # scores of another prefix go to a bin behind the last
            digit = digit.masked_fill_((keys >> shift + bits) != (found >> shift + bits), 1 << bits)
        below = torch.bincount(digit, minlength=1 << bits)[: 1 << bits].cumsum(0)
        place = torch.searchsorted(below, rank)
        rank = rank - torch.where(place > 0, below[place - 1], 0)
        offset = 1 << bits - 1 if shift + bits == 32 else 0
        found = found + ((place - offset) << shift).to(torch.int32)
    return (found ^ ((found >> 31) & 0x7FFFFFFF)).view(torch.float32).to(scores.dtype)


def _ranked(scores: Array, k: int) -> np.generic:
    """`kth_smallest` of an array: a sample says between which values it lies, and only those are ordered.

    Source: Floyd & Rivest, "Expected time bounds for selection", CACM 1975.
    """
    sample = scores[::SPACING]
    if len(sample) > LEAST_SAMPLE:
        rank, margin = (k - 1) // SPACING, MARGIN * math.isqrt(len(sample))
        ends = [max(0, rank - margin), min(len(sample) - 1, rank + margin)]
        low, high = np.partition(sample, ends)[ends]
        below, near = int(np.count_nonzero(scores < low)), scores[(scores >= low) & (scores <= high)]
        if below < k <= below + len(near):
            return _ordered(near, k - below)
    return _ordered(scores, k)


def _ordered(scores: Array, k: int) -> np.generic:
    return np.partition(scores, k - 1)[k - 1]


def smallest(scores: Tensor, count: int) -> Tensor:
    """Choose the `count` smallest scores exactly; among equal scores the lowest index wins.

    Args:
        scores: (n,) float tensor without NaN.
        count: how many, in [0, n].

    Returns:
        (n,) bool, True at the chosen entries.
    """
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if count >= scores.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = kth_smallest(scores, count)
    if scores.is_cuda:
        return with_ties(scores, threshold, count)
    chosen = compared(operator.le, scores, threshold)
    if int(chosen.count_nonzero()) == count:
        return chosen
    chosen = scores < threshold
    missing = count - int(chosen.count_nonzero())
    chosen[(scores == threshold).nonzero().flatten()[:missing]] = True
    return chosen


def with_ties(scores: Tensor, threshold: Tensor, count: int) -> Tensor:
    """(n,) bool, `count` scores up to the threshold, of those at it the first; without waiting for a number."""
    chosen, ties = scores < threshold, scores == threshold
    missing = count - chosen.count_nonzero()
    return chosen.logical_or_(ties & (ties.cumsum(0, dtype=torch.int32) <= missing))


def compared(how: Callable[[Any, Any], Any], one: Tensor, other: Tensor | int) -> Tensor:
    """`how(one, other)`, such as `operator.lt`, for each entry; on a CPU numpy compares several times faster than torch."""
    if one.device.type == "cpu":
        return torch.from_numpy(how(one.numpy(), other.numpy() if isinstance(other, Tensor) else other))
    return torch.as_tensor(how(one, other))


def smallest_in_rows(scores: Tensor, counts: Tensor) -> Tensor:
    """Choose the `counts[i]` smallest scores of each row exactly; among equal scores the lowest index wins.

    Args:
        scores: (rows, n) float tensor without NaN.
        counts: (rows,) int64, how many in each row; a few different numbers are fastest.

    Returns:
        (rows, n) bool, True at the chosen entries.
    """
    counts = counts.unsqueeze(1)
    threshold = _kth_smallest_in_rows(scores, counts)
    chosen = scores < threshold
    ties = scores == threshold
    missing = counts - chosen.sum(1, keepdim=True)
    crowded = (ties.sum(1, keepdim=True) > missing).flatten()
    ties[crowded] &= ties[crowded].cumsum(1) <= missing[crowded]
    return chosen.logical_or_(ties)


def _kth_smallest_in_rows(scores: Tensor, counts: Tensor) -> Tensor:
    """(rows, 1): the score of rank counts[i] in row i, -infinity where that is 0. `counts` is (rows, 1)."""
    ranks = [int(rank) for rank in counts.unique() if rank > 0]
    threshold = torch.full_like(scores[:, :1], -torch.inf)
    if not ranks:
        return threshold
    if len(ranks) > FEW_RANKS:
        return torch.where(counts > 0, scores.sort(1).values.gather(1, (counts - 1).clamp_(min=0)), threshold)
    if scores.device.type == "cpu":
        ordered = torch.from_numpy(np.partition(scores.numpy(), [rank - 1 for rank in ranks], axis=1))
        found = {rank: ordered[:, rank - 1 : rank] for rank in ranks}
    else:
        found = {rank: torch.kthvalue(scores, rank, dim=1, keepdim=True).values for rank in ranks}
    for rank in ranks:
        threshold = torch.where(counts == rank, found[rank], threshold)
    return threshold


def first_in_groups(
    size: int, count: int, sooner: Callable[[int, int], Tensor], shape: tuple[int, int], device: torch.device
) -> Tensor:
    """Choose the first `count` entries of every group of `size` consecutive entries of a row, by comparing pairs.

    Args:
        size: entries in a group, m.
        count: how many to choose in each.
        sooner: of two places a < b in a group, where the entry at b comes before the one at a: (groups,) bool. Entries
            that are equal stay in the order of their index.
        shape: (O, I); I is a multiple of m.
        device: where.

    Returns:
        (O, I) bool, True at the chosen entries.
    """
    kind = torch.int8 if size <= torch.iinfo(torch.int8).max else torch.int16
    place = torch.arange(size, dtype=kind, device=device).unsqueeze(1).repeat(1, shape[0] * shape[1] // size)
    for b in range(size):
        for a in range(b):
            overtakes = sooner(a, b).view(torch.int8)
            place[a] += overtakes
            place[b] -= overtakes
    return (place < count).T.reshape(shape)


def row_counts(target: Ratio, rows: int, columns: int) -> Tensor:
    """Zeros of each row, cumulative so that their sum over all rows is `target.zeros(rows * columns)`. (rows,) int64."""
    ends = [target.zeros(row * columns) for row in range(rows + 1)]
    return torch.tensor(ends).diff()


def already_zero(weight: Tensor) -> Tensor | None:
    """(O, I) bool, the entries of a dense weight that are exactly zero; None if there are none."""
    return weight == 0 if int(weight.count_nonzero()) < weight.numel() else None


def spread(target: Ratio, sizes: Sequence[int], already: Sequence[int]) -> list[int]:
    """Zeros of the parts of a matrix, as many together as the target says, or as there are already if that is more.

    Without any they are cumulative; else what is missing is spread over the entries that are not zero.

    Args:
        target: the share.
        sizes: entries of each part, in order.
        already: of these, how many are zero already.
    """
    ends, room = list(accumulate(sizes)), list(accumulate(n - zeros for n, zeros in zip(sizes, already, strict=True)))
    if not any(already):
        cumulative = [target.zeros(end) for end in ends]
    else:
        missing = max(0, target.zeros(ends[-1]) - sum(already))
        cumulative = [missing * place // max(1, room[-1]) for place in room]
    counts = [end - start for start, end in zip([0, *cumulative], cumulative, strict=False)]
    return [count + zeros for count, zeros in zip(counts, already, strict=True)]


def exact(mask: Tensor, zero: Tensor, target: Target) -> Tensor:
    """A mask of exactly the target size from one that prunes at least that, by keeping some entries that are zero.

    Args:
        mask: (O, I) bool, True = kept; False at all entries of `zero`.
        zero: (O, I) bool, entries that may be kept, as they are zero whatever a mask says.
        target: ratio or n:m.

    Returns:
        (O, I) bool, True = kept; the first of the zeros are pruned.
    """
    if mask.numel() - int(mask.count_nonzero()) == target.zeros(mask.numel()):
        return mask
    order = torch.zeros_like(mask, dtype=torch.uint8).masked_fill_(zero, 1).masked_fill_(mask, 2)
    return ~select(order, target, per_row=False)


def select(scores: Tensor, target: Target, per_row: bool) -> Tensor:
    """The entries of a matrix to prune: the smallest scores, as many as the target says.

    Args:
        scores: (O, I) float tensor without NaN.
        target: ratio or n:m; for n:m, I is a multiple of m.
        per_row: compare scores within each row (Wanda) instead of over the whole matrix; n:m compares within groups.

    Returns:
        (O, I) bool, True at the pruned entries, `target.zeros(O * I)` of them.
    """
    rows, columns = scores.shape
    if isinstance(target, NM):
        groups = scores.reshape(-1, target.group).T.contiguous()
        pruned = target.group - target.kept
        return first_in_groups(target.group, pruned, lambda a, b: groups[b] < groups[a], (rows, columns), scores.device)
    if per_row:
        return smallest_in_rows(scores, row_counts(target, rows, columns).to(scores.device))
    return smallest(scores.flatten(), target.zeros(scores.numel())).view(rows, columns)
