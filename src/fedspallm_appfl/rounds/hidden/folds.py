"""What the server makes of sums that were opened: the same as of uploads that it has added up itself.

Legend: O out features, I in features.
"""

from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from fedspallm_appfl.aggregation.l0_mean import vote_dtype
from fedspallm_appfl.aggregation.mask_expansion import Votes
from fedspallm_appfl.aggregation.screening import Seen
from fedspallm_appfl.algorithms.algorithm import SQUARES, Exchange
from fedspallm_appfl.errors import UpdateError
from fedspallm_appfl.pruning.from_sums import Sums
from fedspallm_appfl.rounds.folds.changes import DeltaFold
from fedspallm_appfl.rounds.folds.context import Context, Fold, Stores, UnitBytes
from fedspallm_appfl.rounds.folds.matrices import ValueFold, VoteFold
from fedspallm_appfl.rounds.folds.statistics import GramFold
from fedspallm_appfl.rounds.hidden.coding import (
    Coding,
    farthest,
    from_correlations,
    from_levels,
    of_linear,
    step,
    summed_squares,
)
from fedspallm_appfl.wire.hidden import check_words
from fedspallm_appfl.wire.packed import Packed, pack, packed_size
from fedspallm_appfl.wire.store import PackedStore
from fedspallm_appfl.wire.update import Check

Made = tuple[Stores, dict[str, int]]  # matrices for each store, and facts for the report


class NoFold(Fold):
    """The server's side of an exchange that it folds nothing of: an exchange of keys, which has no unit."""

    def __init__(self, context: Context, exchange: Exchange) -> None:
        self._context, self._exchange = context, exchange

    def units(self, block: int) -> tuple[str, ...]:
        """None."""
        return ()

    def bytes_of(self, block: int, unit: str, clients: int) -> UnitBytes:
        """Nothing."""
        return UnitBytes(0, 0, 0)

    def check(self, client: str, block: int, unit: str) -> Check:
        """Nothing may be sent."""
        raise UpdateError(f"refused an update from client {client}: in an exchange of keys there is no {unit}")

    def open(self, block: int, unit: str, clients: int) -> Any:
        """Nothing is folded here."""
        raise AssertionError("what is hidden is added up by `hidden.server`")

    def look(self, client: str, block: int, unit: str, packed: Any) -> Seen:
        """At nothing: masked words say nothing."""
        return Seen({})

    def add(self, sums: Any, client: str, block: int, unit: str, packed: Any, weight: int) -> None:
        """Nothing is folded here."""
        raise AssertionError("what is hidden is added up by `hidden.server`")

    def close(self, block: int, unit: str, sums: Any) -> Made:
        """Nothing is folded here."""
        raise AssertionError("what is hidden is opened by `hidden.server`")

    def unreached(self, block: int, unit: str) -> Stores:
        """Models with experts are refused."""
        return {}


class HiddenFold(NoFold):
    """The server's side of an exchange of which it sees sums alone."""

    def check(self, client: str, block: int, unit: str) -> Check:
        """As many words as the unit takes."""
        return partial(check_words, size=self._coding(block, unit).size)

    def made(self, block: int, unit: str, words: Tensor, clients: int) -> Made:
        """What is made of the opened sum over so many clients."""
        raise NotImplementedError

    def _coding(self, block: int, unit: str) -> Coding:
        return of_linear(self._exchange, self._context.shape(block, unit), self._context.target(block, unit))


InnerT = TypeVar("InnerT", bound=VoteFold | ValueFold | GramFold | DeltaFold)


class _Opened(HiddenFold, Generic[InnerT]):
    """What ends as another fold does, once the sums are known."""

    def __init__(self, context: Context, exchange: Exchange, inner: InnerT) -> None:
        super().__init__(context, exchange)
        self._inner = inner

    def units(self, block: int) -> tuple[str, ...]:
        """Those of the other fold."""
        return self._inner.units(block)

    def bytes_of(self, block: int, unit: str, clients: int) -> UnitBytes:
        """Words stay until all are opened; then they become sums, and these are closed."""
        inner = self._inner.bytes_of(block, unit, clients)
        return UnitBytes(8 * self._coding(block, unit).size, inner.sums + inner.closing, inner.made)


class HiddenVotes(_Opened[VoteFold]):
    """Masks."""

    def __init__(self, context: Context, exchange: Exchange) -> None:
        super().__init__(context, exchange, VoteFold(context, exchange))

    def made(self, block: int, unit: str, words: Tensor, clients: int) -> Made:
        """Decide."""
        pruned = self._coding(block, unit).unpack(words).to(vote_dtype(clients)).view(self._context.shape(block, unit))
        return self._inner.close(block, unit, Votes(pruned.to(self._context.device), clients))


class HiddenValues(_Opened[ValueFold]):
    """Values under masks that were agreed on."""

    def __init__(self, context: Context, exchange: Exchange) -> None:
        super().__init__(context, exchange, ValueFold(context, exchange))

    def made(self, block: int, unit: str, words: Tensor, clients: int) -> Made:
        """The mean of the values."""
        unit_of_sum = step(self._context.dense(block, unit), self._exchange.hidden)
        mean = self._coding(block, unit).unpack(words).double() * (unit_of_sum / clients)
        return self._inner.stored(block, unit, mean)


class HiddenGrams(_Opened[GramFold]):
    """Gram matrices, of which the sum of the diagonals is known."""

    def __init__(self, context: Context, exchange: Exchange) -> None:
        super().__init__(context, exchange, GramFold(context, exchange))
        self._squares = PackedStore(context.folder / SQUARES)

    def made(self, block: int, unit: str, words: Tensor, clients: int) -> Made:
        """Prune the matrices that take the input."""
        total, tokens = read_squares((self._squares.get(block, unit) or {})[unit])
        sums = from_correlations(self._coding(block, unit).unpack(words), total, tokens, self._exchange.hidden)
        return self._inner.pruned(block, unit, Sums(sums.upper.to(self._context.device), tokens))


class HiddenDeltas(_Opened[DeltaFold]):
    """Changes in recovery."""

    def __init__(self, context: Context, exchange: Exchange) -> None:
        super().__init__(context, exchange, DeltaFold(context, exchange))

    def made(self, block: int, unit: str, words: Tensor, clients: int) -> Made:
        """Go along the mean; each client's change counts as being as long as they are in the mean of squares."""
        before = self._inner.before(block, unit)
        most = farthest(before, self._context.settings.recovery)
        mean, square = from_levels(self._coding(block, unit).unpack(words), most, clients)
        return self._inner.changed(block, unit, mean[: self._inner.travels(before)], [square] * clients)


class HiddenSquares(HiddenFold):
    """Diagonals of Gram matrices: their sum goes down to all clients, as a matrix of one row."""

    def units(self, block: int) -> tuple[str, ...]:
        """One for each input, by its first linear."""
        return tuple(names[0] for names in self._context.groups[block])

    def bytes_of(self, block: int, unit: str, clients: int) -> UnitBytes:
        """Words, then doubles."""
        size = self._coding(block, unit).size
        return UnitBytes(8 * size, 16 * size, 4 * size)

    def made(self, block: int, unit: str, words: Tensor, clients: int) -> Made:
        """The sum, for all."""
        return {SQUARES: {unit: packed_squares(*summed_squares(self._coding(block, unit).unpack(words)))}}, {}


def packed_squares(total: Tensor, tokens: int) -> Packed:
    """Summed squares and tokens as a matrix of one row, each double as two numbers of float32."""
    values = torch.cat([total, torch.tensor([float(tokens)], dtype=torch.float64)])
    high = values.float()
    row = torch.cat([high, (values - high.double()).float()]).view(1, -1)
    return pack(row, torch.ones_like(row, dtype=torch.bool), torch.float32)


def squares_size(features: int) -> int:
    """Bytes of what `packed_squares` makes."""
    return packed_size((1, 2 * features + 2), 0, torch.float32)


def read_squares(packed: Packed) -> tuple[Tensor, int]:
    """(I,) float64 and T of what `packed_squares` made."""
    assert packed.values is not None
    high, low = packed.values.double().chunk(2)
    values = high + low
    return values[:-1], int(values[-1])
