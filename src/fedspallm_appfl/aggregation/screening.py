"""What an honest upload of one matrix cannot be, seen against the dense weights that the server holds.

Pruning leaves most of a matrix as it was: kept weights point where the dense ones do, are about as long, and none is much
larger than the largest there was; a mask keeps more of the dense magnitude than chance would. Each fact is of one upload
and the dense model alone, so it does not depend on who else sends what, nor on the order of arrival. Limits lie outside
what `benchmarks/hostile.py --honest` has measured on honest clients.

Legend: O out features, I in features, T tokens.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from fedspallm_appfl.aggregation.l0_mean import largest_magnitude

TINY = 1e-30  # nothing
PART = 2**18  # entries converted at a time


@dataclass(frozen=True)
class Limit:
    """Between what two values a fact of an honest upload lies.

    Attributes:
        what: the fact in words.
        low: the least.
        high: the most.
    """

    what: str
    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Whether a value lies within; NaN does not."""
        return self.low <= value <= self.high


LIMITS: dict[str, Limit] = {
    "cosine": Limit("cosine of kept and dense weights", 0.02, 1.01),
    "norm": Limit("norm of kept weights over that of the dense ones there", 0.8, 9.5),
    "largest": Limit("largest kept weight over the largest dense one", 0.0, 5000.0),
    "energy": Limit("mean square of the dense weights that the mask keeps over that of all", 0.8, math.inf),
    "square": Limit("mean square of a feature", 0.0, 1e9),
}
FITTED = 30.0  # what the norm may be where kept weights come of least squares, which little text leaves free


@dataclass(frozen=True)
class Outlier:
    """A fact of an upload outside its limits.

    Attributes:
        limit: which.
        value: what it is.
    """

    limit: Limit
    value: float

    def __str__(self) -> str:
        limit = self.limit
        return f"{limit.what} is {self.value:.4g}, of honest clients {limit.low:g} to {limit.high:g}"


def outliers(facts: Mapping[str, float], fitted: bool = False) -> list[Outlier]:
    """The facts that lie outside their limits.

    Args:
        facts: of one upload.
        fitted: kept weights come of least squares.
    """
    limits = LIMITS | ({"norm": replace(LIMITS["norm"], high=FITTED)} if fitted else {})
    return [Outlier(limits[fact], value) for fact, value in facts.items() if not limits[fact].holds(value)]


@dataclass(frozen=True)
class Size:
    """How large the entries of a matrix are.

    Attributes:
        square: the sum of their squares.
        entries: how many there are.
        largest: their largest magnitude.
    """

    square: float
    entries: int
    largest: float

    @classmethod
    def of(cls, matrix: Tensor) -> "Size":
        """Measure a tensor of any shape and float dtype."""
        flat = matrix.reshape(-1)
        return cls(_dot(flat, flat), len(flat), largest_magnitude(flat))


def weight_facts(values: Tensor, there: Tensor, dense: Size) -> dict[str, float]:
    """Facts of kept weights.

    Args:
        values: (kept,) float, the kept entries.
        there: (kept,) float, the dense weights at the same places.
        dense: size of the whole dense matrix.
    """
    square, before, product = _dot(values, values), _dot(there, there), _dot(values, there)
    return {
        "cosine": _ratio(product, math.sqrt(square) * math.sqrt(before)),
        "norm": _ratio(math.sqrt(square), math.sqrt(before)),
        "largest": _ratio(largest_magnitude(values), dense.largest),
    }


def mask_facts(there: Tensor, dense: Size) -> dict[str, float]:
    """Facts of a mask.

    Args:
        there: (kept,) float, the dense weights that it keeps.
        dense: size of the whole dense matrix.
    """
    return {"energy": _ratio(_dot(there, there), dense.square * len(there) / max(1, dense.entries))}


def gram_facts(tokens: int, diagonal: Tensor) -> dict[str, float]:
    """Facts of statistics, whose correlations were checked already.

    Args:
        tokens: T.
        diagonal: (I,) float32, sums of squares.
    """
    return {"square": float(diagonal.max()) / tokens}


def _dot(one: Tensor, other: Tensor) -> float:
    """Sum of products, in float32 a part at a time and in doubles over the parts."""
    parts = zip(one.split(PART), other.split(PART), strict=True)
    return math.fsum(float(a.float().dot(b.float())) for a, b in parts)


def _ratio(value: float, of: float) -> float:
    """A ratio; 1 of nothing to nothing, infinite of something to nothing."""
    if of > TINY:
        return value / of
    return 1.0 if abs(value) <= TINY else math.inf
