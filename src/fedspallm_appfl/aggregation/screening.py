"""What an honest upload of one matrix cannot be, seen against the dense weights that the server holds.

Pruning changes the weights that it keeps about as much as what it takes away: that, as a norm, is the unit of all facts of
weights. Single columns, one for each input feature, may go far: where a client's text hardly uses a feature, least squares
find almost any weight good, though others' text needs it. So columns beyond `FAR` units are brought back towards the dense
weights. An upload with many of them, or one that has gone far as a whole, is of no honest client. Nor is one some of whose
rows have another sign or size than the dense ones, or whose mask keeps the small weights.

Each fact is of one upload and the dense model alone, so nothing depends on who else sends what, nor on the order of
arrival. Limits lie outside what `benchmarks/hostile.py --honest` has measured on honest clients.

Legend: O out features, I in features, T tokens.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedspallm_appfl.devices import side_by_side, threads
from fedspallm_appfl.tensors import bitmask, native
from fedspallm_appfl.tensors.exact_sum import sum_of_squares

FAR = 5.0  # units that a column may move before it is brought back
LEAST_UNIT = 0.01  # of the sum of squares of a matrix: what counts as pruned away at least
PARTS = 16  # groups of rows that are looked at by themselves, fewer in small matrices and more in large ones
SMALLEST, LARGEST = 2**12, 2**18  # entries of such a group
EMPTY = 0.05  # of the mean group's sum of squares: a group of less says nothing of its scale


@dataclass(frozen=True)
class Limit:
    """Between what two values a fact of an honest upload lies.

    Attributes:
        what: the fact in words.
        low: the least.
        high: the most.
        fitted: the most where kept weights come of least squares, which little text leaves free.
    """

    what: str
    low: float
    high: float
    fitted: float | None = None

    def most(self, fitted: bool) -> float:
        """The upper limit."""
        return self.high if self.fitted is None or not fitted else self.fitted


LIMITS: dict[str, Limit] = {
    "far": Limit(f"share of columns that changed more than {FAR:g} times what pruning takes away", 0.0, 0.25, 0.7),
    "moved": Limit("change of kept weights over what was pruned away", 0.0, 2.5, 4.3),
    "shrunk": Limit("smallest growth of a group of rows over what was pruned away", -0.4, math.inf),
    "grown": Limit("largest growth of a group of rows over what was pruned away", -math.inf, 1.3),
    "pruned": Limit("mean square of the dense weights that a mask prunes over that of all", 0.0, 1.05),
    "square": Limit("mean square of the features over that of random tokens", 0.0, 8.0),
    "tokens": Limit("tokens that statistics are of over those that were asked for", 0.0, 1.5),
    "drift": Limit("norm of the drift over the trace of the Gram matrix", 0.0, 0.8),
    "learnt": Limit("norm of what recovery changes over that of the weights", 0.0, 0.4),
}


@dataclass(frozen=True)
class Outlier:
    """A fact of an upload outside its limits.

    Attributes:
        what: the fact in words.
        value: what it is.
        low: the least that it may be.
        high: the most.
    """

    what: str
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.what} is {self.value:.4g}, of honest clients {self.low:g} to {self.high:g}"


def outliers(facts: Mapping[str, float], fitted: bool = False) -> list[Outlier]:
    """The facts of an upload that lie outside their limits; NaN does.

    Args:
        facts: name in `LIMITS` -> value.
        fitted: kept weights come of least squares.
    """
    found = [(value, LIMITS[fact].low, LIMITS[fact].most(fitted), LIMITS[fact].what) for fact, value in facts.items()]
    return [Outlier(what, value, low, high) for value, low, high, what in found if not low <= value <= high]


@dataclass(frozen=True)
class Seen:
    """What screening has seen of an upload.

    Attributes:
        facts: name in `LIMITS` -> value.
        values: (kept,) the values with far columns brought back; None where none was far.
        columns: how many were.
    """

    facts: dict[str, float]
    values: Tensor | None = None
    columns: int = 0


def look_at_values(values: Tensor, bits: Tensor, dense: Tensor, square: float, own_mask: bool = True) -> Seen:
    """Facts of kept weights.

    Args:
        values: (kept,) float, the kept entries.
        bits: (ceil(O * I / 8),) uint8, the mask (see `bitmask`).
        dense: (O, I) contiguous, the dense matrix in the dtype of the values.
        square: `sum_of_squares` of it.
        own_mask: the mask is the client's; else others made it too.
    """
    sizes, moves = _measured(values, bits, dense)
    kept = math.fsum(before for _, before in sizes)
    unit = max(square - kept, LEAST_UNIT * square)
    most = FAR**2 * unit / len(moves)
    columns, back = int((moves > most).count_nonzero()), None
    if columns:
        back = _brought_back(values, bits, dense, _shares(moves, most))
        sizes, _ = _measured(back, bits, dense)
    moved = math.sqrt(_ratio(float(moves.clamp(max=most).sum()), unit))
    grown = [(scale - 1) * math.sqrt(_ratio(kept, unit)) for scale in _scales(sizes)]
    facts = {"far": columns / len(moves), "moved": moved, "shrunk": min(grown), "grown": max(grown)}
    mask = _facts_of_mask(len(values), kept, dense.numel(), square) if own_mask else {}
    return Seen(facts | mask, back, columns)


def look_at_mask(bits: Tensor, dense: Tensor, square: float) -> Seen:
    """Facts of a mask; arguments as of `look_at_values`."""
    there = bitmask.gather(dense, bits)
    return Seen(_facts_of_mask(len(there), sum_of_squares(there), dense.numel(), square))


def _facts_of_mask(count: int, kept: float, entries: int, square: float) -> dict[str, float]:
    """Of how many dense weights it keeps, and of their sum of squares."""
    gone = entries - count
    pruned = max(0.0, square - kept)  # both are rounded: where only zeros are pruned it may be less than nothing
    return {"pruned": _ratio(pruned, square * gone / entries)} if gone else {}


def look_at_statistics(
    tokens: int, diagonal: Tensor, typical: float | None, asked: int | None = None, drift: float | None = None
) -> Seen:
    """Facts of statistics, whose correlations were checked already.

    Args:
        tokens: T, as the client says.
        diagonal: (I,) float32, sums of squares.
        typical: mean square of the features on random tokens; None where nobody knows.
        asked: tokens in the windows that the client was asked for; None where any number may come.
        drift: norm of the drift, where there is one.
    """
    mean = float(diagonal.double().mean())
    facts = {} if typical is None else {"square": _ratio(mean / tokens, typical)}
    facts |= {} if asked is None else {"tokens": tokens / asked}
    return Seen(facts | ({} if drift is None else {"drift": _ratio(drift, mean * len(diagonal))}))


def look_at_changes(changes: Tensor, before: Tensor) -> Seen:
    """Facts of what recovery changes: (kept,) float each, the change and the weights before it."""
    return Seen({"learnt": math.sqrt(_ratio(sum_of_squares(changes), sum_of_squares(before)))})


def _measured(values: Tensor, bits: Tensor, dense: Tensor) -> tuple[list[tuple[float, float]], Tensor]:
    """For each group of rows (values times dense weights, squares of these); (I,) float64, squares of columns' moves."""

    def measure(group: tuple[Tensor, Tensor, Tensor]) -> tuple[tuple[float, float], Tensor]:
        part, some, mine = group
        there, mine = bitmask.gather(part, some).float(), mine.float()
        moved = bitmask.scatter(mine - there, some, (len(part), columns)).square_().sum(0)
        return (float(mine.dot(there)), float(there.dot(there))), moved

    sizes, columns, moves = [], dense.shape[1], torch.zeros(dense.shape[1], dtype=torch.float64)
    with threads(None if dense.numel() >= native.SHORT else 1):  # groups of a small matrix are not worth a thread each
        measured = side_by_side(measure, list(_groups(values, bits, dense)))
    for size, moved in measured:
        sizes.append(size)
        moves += moved
    return sizes, moves


def _groups(values: Tensor, bits: Tensor, dense: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(rows of the dense matrix, their bits, their values), a multiple of 8 rows at a time, so that bytes are whole."""
    rows, columns = dense.shape
    entries = min(max(dense.numel() // PARTS, SMALLEST), LARGEST)
    step, taken = max(8, entries // columns // 8 * 8), 0
    for start in range(0, rows, step):
        part = dense[start : start + step]
        some = bits[start * columns // 8 : -(-(start + len(part)) * columns // 8)]
        count = bitmask.count(some)
        yield part, some, values[taken : taken + count]
        taken += count


def _shares(moves: Tensor, most: float) -> Tensor:
    """(I,) float32, what is left of a column's move: a power of two, so that the sum's rounding does not show."""
    times = (moves / most).clamp(min=1.0)
    return torch.exp2(-(times.log2() / 2).ceil()).float()


def _brought_back(values: Tensor, bits: Tensor, dense: Tensor, shares: Tensor) -> Tensor:
    """The values with a share of each column's move."""
    made = []
    for part, some, mine in _groups(values, bits, dense):
        there = bitmask.gather(part, some).float()
        moved = bitmask.scatter(mine.float() - there, some, (len(part), len(shares))).mul_(shares)
        nearer = (bitmask.gather(moved, some) + there).to(values.dtype)
        near = bitmask.gather((shares == 1).expand(len(part), -1).float().contiguous(), some).bool()
        made.append(torch.where(near, mine, nearer))  # others keep their bits
    return torch.cat(made)


def _scales(sizes: list[tuple[float, float]]) -> list[float]:
    """How large the rows of each group are along the dense ones, whose scale is 1."""
    little = EMPTY * math.fsum(before for _, before in sizes) / len(sizes)
    return [_ratio(product + little, before + little) for product, before in sizes]


def _ratio(value: float, of: float) -> float:
    """A ratio; of nothing to nothing 1, infinite of something to nothing."""
    if of > 0:
        return value / of
    return 1.0 if value <= 0 else math.inf
