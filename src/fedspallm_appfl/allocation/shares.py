"""Targets of all matrices from their loss curves, so that pruning one entry more costs the same everywhere.

The loss of a matrix is known at a few levels. Between them its logarithm is the polynomial through them. The marginal loss,
the derivative with respect to the number of zeros, is made to grow with the level. Then there is one marginal loss at
which all matrices together have as many zeros as are wanted: the minimum of the sum of losses. Counts are exact.

Legend: K matrices, L levels, P points of a curve.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

POINTS = 257  # of a curve
HALVINGS = 80  # of the range in which the common marginal loss lies
Floats = NDArray[np.float64]
Bounds = tuple[Fraction | float, Fraction | float]


@dataclass(frozen=True)
class Curve:
    """The loss of one matrix.

    Attributes:
        entries: how many it has.
        levels: (L,) shares at which its loss is known, growing.
        losses: (L,) the loss there, at least 0.
    """

    entries: int
    levels: Sequence[float]
    losses: Sequence[float]

    def known(self) -> bool:
        """Whether there is a loss at all levels: none of a matrix that no token reaches, or that is sparse already."""
        return all(0 < loss < np.inf for loss in self.losses)


def counts(curves: Sequence[Curve], bounds: Sequence[Bounds], total: int) -> list[int]:
    """Zeros of each matrix, `total` together.

    Args:
        curves: of the K matrices.
        bounds: (least, most) share of each; the total lies between the sums of both.
        total: zeros of all matrices.

    Raises:
        ValueError: bounds and total do not go together.
    """
    least = np.array([int(low * curve.entries) for curve, (low, _) in zip(curves, bounds, strict=True)])
    most = np.array([int(high * curve.entries) for curve, (_, high) in zip(curves, bounds, strict=True)])
    if not least.sum() <= total <= most.sum():
        raise ValueError(f"{total} zeros are not between {least.sum()} and {most.sum()}")
    below, above = _around(curves, bounds, total)
    share = (total - below.sum()) / max(above.sum() - below.sum(), 1e-9)
    wanted = below + (above - below) * min(1.0, max(0.0, share))
    return _whole(wanted, least, most, total)


def _around(curves: Sequence[Curve], bounds: Sequence[Bounds], total: int) -> tuple[Floats, Floats]:
    """Zeros of each matrix at two marginal losses that are as near as numbers go, with the total between them."""
    grids = [np.linspace(float(low), float(high), POINTS) for low, high in bounds]
    slopes = [_marginal(curve, grid) for curve, grid in zip(curves, grids, strict=True)]
    entries = np.array([curve.entries for curve in curves])

    def at(slope: float) -> Floats:
        return np.array([np.interp(slope, s, g) for s, g in zip(slopes, grids, strict=True)]) * entries

    low, high = min(s[0] for s in slopes) - 1.0, max(s[-1] for s in slopes) + 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle).sum() <= total else (low, middle)
    return at(low), at(high)


def _marginal(curve: Curve, grid: Floats) -> Floats:
    """(P,) logarithm of the marginal loss at points of a curve, growing."""
    levels = np.asarray(curve.levels)
    fitted = np.polynomial.Polynomial.fit(levels, np.log(curve.losses), len(levels) - 1)
    rise = np.maximum(fitted.deriv()(grid), 1e-6)
    return np.maximum.accumulate(fitted(grid) + np.log(rise) - np.log(curve.entries)) + 1e-9 * np.arange(len(grid))


def _whole(wanted: Floats, least: Floats, most: Floats, total: int) -> list[int]:
    """Whole numbers near the wanted ones, with this sum: what is missing goes to the largest fractions first."""
    made = np.clip(np.floor(wanted), least, most).astype(np.int64)
    order = np.argsort(-(wanted - made), kind="stable")
    while (missing := total - int(made.sum())) != 0:
        step = 1 if missing > 0 else -1
        able = [k for k in order[::step] if (made[k] < most[k] if step > 0 else made[k] > least[k])]
        for k in able[: abs(missing)]:
            made[k] += step
    return [int(count) for count in made]
