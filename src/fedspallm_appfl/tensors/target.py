"""A sparsity target and the exact number of zeros it means. Needs no torch, so that a configuration is read without it.

Two kinds of target (docs/method.md section 1): a ratio `s` asks for exactly `floor(s * O * I)` zeros in a matrix of shape
(O, I); a pattern `n:m` asks for exactly n non-zero entries in every m consecutive entries of a row (2:4, 4:8).

A decimal such as 0.7 is read as the fraction 7/10, not as the nearest binary number: 70 % of ten entries is seven.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

from fedspallm_appfl.errors import quoted

T = TypeVar("T")
LEAST_PERCENT = 2  # a share from here on was meant as a percentage
PERCENT = re.compile(r"(\d+(?:\.\d*)?) ?%", re.ASCII)
NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d{1,3})?|[-+]?\d+/\d+", re.ASCII)


class _Single:
    """One target for all matrices, asked as `targets.Targets` is."""

    def of(self: T, block: int, name: str) -> T:
        """The target of a matrix: this one."""
        return self

    @property
    def default(self: T) -> T:
        """The target of matrices of which nothing else is said: this one."""
        return self

    def with_default(self, default: "Target") -> "Target":
        """Another target of all matrices."""
        return default


@dataclass(frozen=True)
class Ratio(_Single):
    """Unstructured sparsity: a share of all entries of a matrix.

    Attributes:
        share: fraction of entries that are zero, in [0, 1).
    """

    share: Fraction

    def zeros(self, entries: int) -> int:
        """Zeros in the first `entries` entries: `floor(share * entries)`; differences of it distribute a count exactly."""
        return self.share.numerator * entries // self.share.denominator

    def __str__(self) -> str:
        """Always the same spelling: 0.50 and 1/2 are 0.5; what no decimal says exactly stays a fraction."""
        decimal = f"{float(self.share):.15g}"
        return decimal if Fraction(decimal) == self.share else str(self.share)


@dataclass(frozen=True)
class NM(_Single):
    """Semi-structured sparsity: `kept` non-zero entries in every `group` consecutive entries of a row."""

    kept: int
    group: int

    @property
    def share(self) -> Fraction:
        """Fraction of entries that are zero."""
        return 1 - Fraction(self.kept, self.group)

    def zeros(self, entries: int) -> int:
        """Zeros in `entries` entries, a whole number of groups."""
        return entries // self.group * (self.group - self.kept)

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}"


Target = Ratio | NM


def share_of(zeros: int, entries: int) -> Ratio:
    """The shortest decimal share that asks for exactly so many zeros; 1 if there is nothing else."""
    for digits in range(len(str(entries)) + 1):  # one of them lies in any interval of 1 / entries
        share = Fraction(-(-zeros * 10**digits // entries), 10**digits)
        if share < 1 and Ratio(share).zeros(entries) == zeros:
            return Ratio(share)
    return Ratio(Fraction(zeros, entries))


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
        share = Fraction(words if NUMBER.fullmatch(words) else "")
    except (ValueError, ZeroDivisionError):
        percent = PERCENT.fullmatch(words)
        fix = f"; write {float(percent[1]) / 100:g}" if percent and float(percent[1]) < 100 else ""
        raise ValueError(
            f"sparsity is a share in [0, 1) such as 0.5 or a pattern such as 2:4, got {quoted(words)}{fix}"
        ) from None
    if not 0 <= share < 1:
        meant = share if LEAST_PERCENT <= share < 100 else Fraction(50)
        raise ValueError(
            f"sparsity is a share in [0, 1), got {words}; {float(meant):g} % is written {float(meant / 100):g}"
        )
    return Ratio(share)


def check_divides(target: Target, in_features: int) -> str | None:
    """What is wrong with pruning rows of `in_features` entries to `target`, or None."""
    if isinstance(target, NM) and in_features % target.group:
        return f"{target} needs rows that are a multiple of {target.group} long, got {in_features}"
    return None
