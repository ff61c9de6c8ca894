"""A sparsity target, the exact number of zeros it means, and the exact choice of entries with ties.

Two kinds of target (docs/method.md section 1): a ratio `s` asks for exactly `floor(s * O * I)` zeros in a matrix of shape
(O, I); a pattern `n:m` asks for exactly n non-zero entries in every m consecutive entries of a row (2:4, 4:8).

A decimal such as 0.7 is read as the fraction 7/10, not as the nearest binary number, so that 70 % of ten entries is
seven. The authors' SparseGPT code thresholds with `<=` and removes one entry too many in each column block; here the
count is met exactly and ties are broken by index.

Legend: O out features, I in features.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ratio:
    """Unstructured sparsity: a share of all entries of a matrix.

    Attributes:
        share: fraction of entries that are zero, in [0, 1).
    """

    share: Fraction

    def zeros(self, entries: int) -> int:
        """Zeros in the first `entries` entries: `floor(share * entries)`; differences of it distribute a count exactly."""
        return self.share.numerator * entries // self.share.denominator

    def __str__(self) -> str:
        return f"{float(self.share):g}"


@dataclass(frozen=True)
class NM:
    """Semi-structured sparsity: `kept` non-zero entries in every `group` consecutive entries of a row."""

    kept: int
    group: int

    def zeros(self, entries: int) -> int:
        """Zeros in `entries` entries, a whole number of groups."""
        return entries // self.group * (self.group - self.kept)

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}"


Target = Ratio | NM


def parse_target(text: str | float | int) -> Target:
    """Read a target as it stands in a configuration.

    Args:
        text: a share such as `0.5`, or a pattern such as `2:4`.

    Returns:
        A `Ratio` or an `NM`.

    Raises:
        ValueError: the text is neither, the share is outside [0, 1), or the pattern is not 0 < n < m.
    """
    words = str(text).strip()
    if pattern := re.fullmatch(r"([0-9]+):([0-9]+)", words):
        kept, group = int(pattern[1]), int(pattern[2])
        if not 0 < kept < group:
            raise ValueError(f"a pattern n:m needs 0 < n < m (n non-zero in every m), got {words}; 2:4 is one")
        return NM(kept, group)
    try:
        share = Fraction(words.encode("ascii").decode())  # digits of other scripts are hardly meant
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"sparsity is a share in [0, 1) such as 0.5 or a pattern such as 2:4, got {words!r}") from None
    if not 0 <= share < 1:
        raise ValueError(f"sparsity is a share in [0, 1), got {words}; 50 % is written 0.5")
    return Ratio(share)


def check_divides(target: Target, in_features: int) -> str | None:
    """What is wrong with pruning rows of `in_features` entries to `target`, or None."""
    if isinstance(target, NM) and in_features % target.group:
        return f"{target} needs rows that are a multiple of {target.group} long, got {in_features}"
    return None


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
    threshold = torch.kthvalue(scores, count).values
    chosen = scores < threshold
    missing = count - int(chosen.sum())
    ties = (scores == threshold).nonzero().flatten()
    chosen[ties[:missing]] = True
    return chosen


def smallest_in_rows(scores: Tensor, counts: Tensor) -> Tensor:
    """Choose the `counts[i]` smallest scores of each row exactly; among equal scores the lowest index wins.

    Args:
        scores: (rows, n) float tensor without NaN.
        counts: (rows,) int64, how many in each row.

    Returns:
        (rows, n) bool, True at the chosen entries.
    """
    order = scores.argsort(dim=1, stable=True)
    first = torch.arange(scores.shape[1], device=scores.device) < counts.unsqueeze(1)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, first)


def row_counts(target: Ratio, rows: int, columns: int) -> Tensor:
    """Zeros of each row, cumulative so that their sum over all rows is `target.zeros(rows * columns)`. (rows,) int64."""
    ends = [target.zeros(row * columns) for row in range(rows + 1)]
    return torch.tensor(ends).diff()


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
        groups = scores.reshape(-1, target.group)
        counts = torch.full((len(groups),), target.group - target.kept, device=scores.device)
        return smallest_in_rows(groups, counts).view(rows, columns)
    if per_row:
        return smallest_in_rows(scores, row_counts(target, rows, columns).to(scores.device))
    return smallest(scores.flatten(), target.zeros(scores.numel())).view(rows, columns)
