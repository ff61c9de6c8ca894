"""What the server makes of each kind of upload: it checks a unit, folds it into sums, and closes the sums.

A unit is what clients send under one name: a matrix, or the statistics of an input that several matrices take. A fold is
one exchange's. Which fold it is follows from what goes up; what is made of complete sums says the exchange.

Legend: O out features, I in features.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fedspallm_appfl.aggregation.gram_sum import GramSum
from fedspallm_appfl.aggregation.l0_mean import LARGEST_SUM, MOST_WEIGHT, L0Sums, l0_mean, largest_magnitude
from fedspallm_appfl.aggregation.mask_expansion import Votes, unexpanded_zeros
from fedspallm_appfl.aggregation.screening import Seen, look_at_mask, look_at_squares, look_at_values, sum_of_squares
from fedspallm_appfl.algorithms import registry
from fedspallm_appfl.algorithms.algorithm import DELTAS, NOTHING, Algorithm, Exchange, Groups, Make, Matrix
from fedspallm_appfl.errors import PruningError, UpdateError
from fedspallm_appfl.models.layout import Layout
from fedspallm_appfl.pruning import from_sums, magnitude
from fedspallm_appfl.pruning.from_sums import Sums
from fedspallm_appfl.pruning.pruner import Pruned, check_mask, named
from fedspallm_appfl.rounds.journal import Journal
from fedspallm_appfl.settings.schema import Pruning, ServerSettings
from fedspallm_appfl.tensors import bitmask
from fedspallm_appfl.tensors.exact_sum import ExactSum
from fedspallm_appfl.tensors.sparsity import row_counts
from fedspallm_appfl.tensors.target import NM, Target
from fedspallm_appfl.wire.deltas import PackedDelta
from fedspallm_appfl.wire.grams import PackedGram, parts_of
from fedspallm_appfl.wire.packed import Packed, pack, pack_mask, packed_size
from fedspallm_appfl.wire.store import GramStore, PackedStore, SumsT, load_sums, save_sums
from fedspallm_appfl.wire.update import Check, check_delta, check_gram, check_matrix, check_values

GLOBAL, MASKS, STATISTICS = "global", "masks", "statistics"  # folders of the server's state
DOWN = {None: GLOBAL, "weights": GLOBAL, "masks": MASKS}  # what goes down -> the store that it comes from
TOKENS_A_UNIT = 64  # of a client's weight in the mean of an expert's matrix: sums have a range
Stores = dict[str, dict[str, Packed]]  # store -> linear -> what was made of it


@dataclass(frozen=True)
class Context:
    """What folds share.

    Attributes:
        layout: blocks and linears of the model.
        dtype: dtype of the checkpoint.
        settings: how to combine uploads.
        folder: a folder of its own.
        device: where sums are kept and combined.
        dense: (block, linear) -> its dense weight (O, I) in `dtype`.
        groups: linears that share an input, for algorithms that gather statistics.
        typical: (block, linear) -> mean square of its inputs on random tokens, None where nobody knows; for the same.
    """

    layout: Layout
    dtype: torch.dtype
    settings: ServerSettings
    folder: Path
    device: str
    dense: Callable[[int, str], Tensor]
    groups: Groups = ()
    typical: Callable[[int, str], float | None] = lambda block, name: None

    def making(self, block: int) -> Path:
        """The folder for what an exchange makes of a block; what earlier ones made is in `folder`."""
        return Journal(self.folder).making(block)

    def dense_float(self, block: int, name: str) -> Tensor:
        """A dense weight, (O, I) float32, where sums are."""
        return self.dense(block, name).to(self.device, torch.float32)

    def matrix(self, block: int, name: str) -> Matrix:
        """What the arithmetic of an exchange may ask of a matrix."""
        return Matrix(self.target(block, name), self.settings.expansion, partial(self.dense_float, block, name))

    def target(self, block: int, name: str) -> Target:
        """The sparsity of a matrix."""
        return self.settings.sparsity.of(block, name)

    def shape(self, block: int, name: str) -> tuple[int, int]:
        """(O, I) of a linear."""
        return self.layout.linear(block, name).shape

    @property
    def cumulative(self) -> bool:
        """Whether sums of earlier rounds are added."""
        return self.settings.fold == "cumulative"


@dataclass(frozen=True)
class UnitBytes:
    """Memory that the server takes for one unit.

    Attributes:
        sums: bytes of its sums.
        closing: bytes at most, beside them, when it is closed.
        made: bytes of what is made of it, packed.
    """

    sums: int
    closing: int
    made: int


class Fold(Protocol):
    """The server's side of one exchange."""

    def bytes_of(self, block: int, unit: str, clients: int) -> UnitBytes:
        """What a unit takes that so many clients send."""

    def units(self, block: int) -> tuple[str, ...]:
        """What clients send of a block."""

    def check(self, client: str, block: int, unit: str) -> Check:
        """How an upload of a unit is checked."""

    def open(self, block: int, unit: str, clients: int) -> Any:
        """Empty sums of a unit that so many clients will send."""

    def guard(self, sums: Any, packed: Any, weight: int) -> None:
        """Refuse, with a ValueError, what would leave the range of the sums; they are None before the first upload."""

    def look(self, block: int, unit: str, packed: Any) -> Seen:
        """What screening sees of a checked upload (see `aggregation.screening`)."""

    def add(self, sums: Any, client: str, block: int, unit: str, packed: Any, weight: int) -> None:
        """Fold a checked upload."""

    def close(self, block: int, unit: str, sums: Any) -> tuple[Stores, dict[str, int]]:
        """What is made of complete sums: matrices for each store, and facts for the report. The sums are used up."""

    def leave_out(self, client: str, block: int, unit: str) -> None:
        """Go on without a client that sent nothing of an expert."""

    def unreached(self, block: int, unit: str) -> Stores:
        """What is made of an expert of which no client sent anything."""


def expert_weight(tokens: int) -> int:
    """The weight of a client in the mean of an expert's matrix, by the tokens that reached it there."""
    return -(-tokens // TOKENS_A_UNIT)


def without_clients(context: Context, store: str, block: int, name: str) -> Packed:
    """An expert's matrix that no client sent: as an earlier round left it, else pruned by magnitude or dense.

    Args:
        context: what folds share.
        store: whose matrix.
        block: its block.
        name: its linear.
    """
    before = PackedStore(context.folder / store).get(block, name) or {}
    if name in before:
        return before[name]
    weight, settings = context.dense_float(block, name), context.settings
    return unseen(weight, context.target(block, name), settings.unreached == "dense", context.dtype)


def unseen(weight: Tensor, target: Target, dense: bool, dtype: torch.dtype) -> Packed:
    """An expert's matrix of whose inputs nobody knows enough.

    Args:
        weight: (O, I) float32, of the dense model.
        target: ratio or n:m.
        dense: it stays as it is; else its smallest weights go.
        dtype: dtype of the checkpoint.
    """
    if dense:
        return pack(weight, torch.ones_like(weight, dtype=torch.bool), dtype)
    return pack(*magnitude.prune(weight, target), dtype)


class _MatrixFold:
    """What folds of single matrices share."""

    def __init__(self, context: Context, exchange: Exchange) -> None:
        self._context = context
        self._exchange = exchange
        self._squares: dict[tuple[int, str], float] = {}

    def _dense(self, block: int, unit: str) -> tuple[Tensor, float]:
        """The dense weights, and the sum of their squares."""
        dense = self._context.dense(block, unit).contiguous()
        if (block, unit) not in self._squares:
            self._squares[block, unit] = sum_of_squares(dense)
        return dense, self._squares[block, unit]

    def units(self, block: int) -> tuple[str, ...]:
        """One for each linear."""
        return tuple(linear.name for linear in self._context.layout.blocks[block])

    def _is_expert(self, block: int, unit: str) -> bool:
        return self._context.layout.linear(block, unit).expert

    def leave_out(self, client: str, block: int, unit: str) -> None:
        """Its part is not in the sums."""

    def _entries(self, block: int, unit: str) -> int:
        rows, columns = self._context.shape(block, unit)
        return rows * columns

    def _kept(self, block: int, unit: str) -> int:
        """Entries that its target keeps."""
        entries = self._entries(block, unit)
        return entries - self._context.target(block, unit).zeros(entries)

    def _packed_bytes(self, block: int, unit: str) -> int:
        """Bytes of a matrix with values once packed."""
        context, entries = self._context, self._entries(block, unit)
        return packed_size(context.shape(block, unit), context.target(block, unit).zeros(entries), context.dtype)

    @property
    def _algorithm(self) -> Algorithm:
        return registry.find(self._context.settings.algorithm)

    def _made(self, make: Make, sums: L0Sums | Votes, block: int, unit: str) -> tuple[Tensor, Tensor] | Tensor:
        """What an exchange makes of sums, if it is what it has to be.

        Raises:
            PruningError: shape, dtype or number of zeros is wrong.
        """
        context = self._context
        who, shape = f"algorithm {context.settings.algorithm}, block {block}, {unit}", context.shape(block, unit)
        by_row = self._zeros_by_row(sums, block, unit)  # before the sums are used up
        with named(who):
            made = make(sums, context.matrix(block, unit))
        weight, mask = made if isinstance(made, tuple) and len(made) == 2 else (None, made)
        check_mask(who, mask, shape, context.target(block, unit), by_row)
        if (weight is None) != (self._exchange.down == "masks"):
            wanted = "a mask" if self._exchange.down == "masks" else "a weight and a mask"
            raise PruningError(f"{who}: the server makes {wanted} here, got {'a mask' if weight is None else 'both'}")
        if weight is None:
            return mask
        if (
            not isinstance(weight, Tensor)
            or tuple(weight.shape) != shape
            or not math.isfinite(largest_magnitude(weight))
        ):
            raise PruningError(f"{who}: the server makes a weight of shape {list(shape)} without NaN or infinity")
        return weight, mask

    def _zeros_by_row(self, sums: L0Sums | Votes, block: int, unit: str) -> int | None:
        """Zeros where rows are compared by themselves: all clients may have pruned more of a row than the target."""
        target, votes = self._context.target(block, unit), sums.votes if isinstance(sums, L0Sums) else sums.pruned
        if self._context.settings.expansion != "row" or isinstance(target, NM):
            return None
        counts = row_counts(target, *votes.shape).to(votes.device)
        return int(torch.maximum(counts, (votes == sums.clients).sum(1)).sum())


class _MeanFold(_MatrixFold):
    """What folds share that add values up."""

    def __init__(self, context: Context, exchange: Exchange) -> None:
        super().__init__(context, exchange)
        self._weighted = context.settings.weights == "sample_size"
        self._no_sums = L0Sums.empty((0, 0), True)

    def _weights(self, block: int, unit: str) -> bool:
        """Whether clients have other weights than 1 in the mean of a matrix."""
        return self._weighted or self._is_expert(block, unit)

    def guard(self, sums: L0Sums | None, packed: Packed, weight: int) -> None:
        """Ranges of the fixed-point sums, of which each client of each round that is summed may use its share."""
        assert packed.values is not None
        settings = self._context.settings
        shares = max(1, len(settings.roster)) * (settings.rounds if self._context.cumulative else 1)
        largest = largest_magnitude(packed.values)
        (sums or self._no_sums).check_range(largest, weight)
        if largest * weight * shares > LARGEST_SUM or weight * shares > MOST_WEIGHT:
            raise ValueError(
                f"a weight of {largest:g} that counts {weight} times exceeds the client's share of the sums: the product "
                f"is at most {LARGEST_SUM / shares:g}, and counts are at most {MOST_WEIGHT // shares}"
            )

    def _look(self, block: int, unit: str, packed: Packed, own_mask: bool) -> Seen:
        assert packed.values is not None
        return look_at_values(packed.values, packed.bits, *self._dense(block, unit), own_mask)


class WeightFold(_MeanFold):
    """Masks and weights into l0 sums, from which the global model is made, and others to compare it with."""

    def __init__(self, context: Context, exchange: Exchange) -> None:
        super().__init__(context, exchange)
        others = [registry.find(name) for name in context.settings.comparisons]
        self._apart = [algorithm for algorithm in others if algorithm.apart]
        self._makes = {one.name: one.round[0].make for one in others if not one.apart}
        self._makes[DOWN[exchange.down]] = exchange.make  # the last: it may use the sums up
        self._closing = max(one.closing_bytes for one in (*others, self._algorithm))

    def bytes_of(self, block: int, unit: str, clients: int) -> UnitBytes:
        """Sums of all entries; a packed matrix for each store."""
        entries, made = self._entries(block, unit), len(self._makes) * self._packed_bytes(block, unit)
        each = L0Sums.entry_bytes(self._weights(block, unit), clients)
        return UnitBytes(each * entries, self._closing * entries, made)

    def check(self, client: str, block: int, unit: str) -> Check:
        """The right shape and sparsity; values are put in where the client's pruner left weights alone."""
        context, alone = self._context, client in self._context.settings.mask_only

        def check(packed: Any, where: str) -> Packed:
            shape, target = context.shape(block, unit), context.target(block, unit)
            checked = check_matrix(packed, where, shape, context.dtype, target, alone)
            return checked.with_values(context.dense(block, unit)) if alone else checked

        return check

    def look(self, block: int, unit: str, packed: Packed) -> Seen:
        """At weights and mask."""
        return self._look(block, unit, packed, own_mask=True)

    def open(self, block: int, unit: str, clients: int) -> L0Sums:
        """Empty sums."""
        weighted = self._weights(block, unit)
        return L0Sums.empty(self._context.shape(block, unit), weighted, clients, self._context.device)

    def add(self, sums: L0Sums, client: str, block: int, unit: str, packed: Packed, weight: int) -> None:
        """Fold weights and mask."""
        device = self._context.device
        assert packed.values is not None
        sums.add_packed(packed.values.to(device), packed.bits.to(device), weight)
        for algorithm in self._apart:
            keep(self._context, algorithm, client, block, {unit: packed})

    def close(self, block: int, unit: str, sums: L0Sums) -> tuple[Stores, dict[str, int]]:
        """Combine for each store."""
        if self._context.cumulative:
            sums = with_earlier_rounds(self._context, sums, block, unit)
        facts = {"zeros_before_expansion": unexpanded_zeros(sums.votes, sums.clients)}
        stores = {}
        for store, make in self._makes.items():
            assert make is not None, "weights that are kept as they come have a fold of their own"
            stores[store] = {unit: self._packed(make, sums, block, unit)}
        return stores, facts

    def leave_out(self, client: str, block: int, unit: str) -> None:
        """Its own model has the matrix nevertheless."""
        for algorithm in self._apart:
            keep_unreached(self._context, algorithm, client, block, unit)

    def unreached(self, block: int, unit: str) -> Stores:
        """The same for each store."""
        return {store: {unit: without_clients(self._context, store, block, unit)} for store in self._makes}

    def _packed(self, make: Make, sums: L0Sums, block: int, unit: str) -> Packed:
        """What is made, packed; the rest of it is dropped before the next is made."""
        weight, mask = self._made(make, sums, block, unit)
        return pack(weight, mask, self._context.dtype)


class VoteFold(_MatrixFold):
    """Masks into votes, from which the mask of all is made, with or without weights."""

    def bytes_of(self, block: int, unit: str, clients: int) -> UnitBytes:
        """Votes of all entries; what is made is a mask, or a matrix."""
        entries, shape = self._entries(block, unit), self._context.shape(block, unit)
        mask = packed_size(shape, entries, self._context.dtype)
        made = mask if self._exchange.down == "masks" else self._packed_bytes(block, unit)
        return UnitBytes(Votes.entry_bytes(clients) * entries, self._algorithm.closing_bytes * entries, made)

    def check(self, client: str, block: int, unit: str) -> Check:
        """A mask of the right shape and sparsity."""
        context = self._context
        return lambda packed, where: check_matrix(
            packed, where, context.shape(block, unit), context.dtype, context.target(block, unit), mask_only=True
        )

    def open(self, block: int, unit: str, clients: int) -> Votes:
        """No votes."""
        return Votes.empty(self._context.shape(block, unit), clients, self._context.device)

    def guard(self, sums: Votes | None, packed: Packed, weight: int) -> None:
        """Votes have room for all clients from the start."""

    def look(self, block: int, unit: str, packed: Packed) -> Seen:
        """At a mask."""
        return look_at_mask(packed.bits, *self._dense(block, unit))

    def add(self, sums: Votes, client: str, block: int, unit: str, packed: Packed, weight: int) -> None:
        """Count a mask."""
        sums.add(packed.bits.to(self._context.device))

    def close(self, block: int, unit: str, sums: Votes) -> tuple[Stores, dict[str, int]]:
        """Decide."""
        if self._context.cumulative:
            sums = with_earlier_rounds(self._context, sums, block, unit)
        assert self._exchange.make is not None, "`Algorithm` refuses masks of which nothing is made"
        made = self._made(self._exchange.make, sums, block, unit)
        packed = pack_mask(made) if isinstance(made, Tensor) else pack(*made, self._context.dtype)
        facts = {"zeros_before_expansion": unexpanded_zeros(sums.pruned, sums.clients)}
        return {DOWN[self._exchange.down]: {unit: packed}}, facts

    def unreached(self, block: int, unit: str) -> Stores:
        """A mask, or a matrix."""
        store = DOWN[self._exchange.down]
        packed = without_clients(self._context, store, block, unit)
        return {store: {unit: replace(packed, values=None) if store == MASKS else packed}}


class ValueFold(_MeanFold):
    """Values under masks that were agreed on into their mean."""

    def __init__(self, context: Context, exchange: Exchange) -> None:
        super().__init__(context, exchange)
        self._masks = PackedStore(context.folder / MASKS)

    def bytes_of(self, block: int, unit: str, clients: int) -> UnitBytes:
        """Sums of kept entries alone."""
        kept = self._kept(block, unit)
        sums = L0Sums.entry_bytes(self._weights(block, unit), clients) * kept
        return UnitBytes(sums, self._algorithm.closing_bytes * kept, self._packed_bytes(block, unit))

    def check(self, client: str, block: int, unit: str) -> Check:
        """As many values as the mask keeps."""
        return lambda packed, where: check_values(packed, where, self._agreed(block, unit), self._context.dtype)

    def open(self, block: int, unit: str, clients: int) -> L0Sums:
        """Sums of kept entries alone, (1, kept): nobody votes any more."""
        kept, weighted = self._agreed(block, unit).kept, self._weights(block, unit)
        return L0Sums.empty((1, kept), weighted, clients, self._context.device)

    def look(self, block: int, unit: str, packed: Packed) -> Seen:
        """At weights."""
        return self._look(block, unit, packed, own_mask=False)

    def add(self, sums: L0Sums, client: str, block: int, unit: str, packed: Packed, weight: int) -> None:
        """Fold values."""
        assert packed.values is not None
        values = packed.values.to(self._context.device)
        sums.add_packed(values, bitmask.to_bits(torch.ones_like(values, dtype=torch.bool)), weight)

    def close(self, block: int, unit: str, sums: L0Sums) -> tuple[Stores, dict[str, int]]:
        """The mean of the values."""
        values = l0_mean(sums).view(-1).to(self._context.dtype).cpu()
        return {GLOBAL: {unit: replace(self._agreed(block, unit), values=values)}}, {}

    def unreached(self, block: int, unit: str) -> Stores:
        """What an earlier round has made under the same mask, else dense weights under it."""
        agreed = self._agreed(block, unit)
        before = (PackedStore(self._context.folder / GLOBAL).get(block, unit) or {}).get(unit)
        if before is None or not torch.equal(before.bits, agreed.bits):
            before = agreed.with_values(self._context.dense(block, unit))
        return {GLOBAL: {unit: before}}

    def _agreed(self, block: int, unit: str) -> Packed:
        return (self._masks.get(block, unit) or {})[unit]


class KeepFold(WeightFold):
    """Matrices kept as they come: each client's in its own store, or the one participant's as the global model."""

    def bytes_of(self, block: int, unit: str, clients: int) -> UnitBytes:
        """Nothing is summed."""
        return UnitBytes(0, 0, self._packed_bytes(block, unit))

    def open(self, block: int, unit: str, clients: int) -> L0Sums:
        """Nothing is summed."""
        return self._no_sums

    def add(self, sums: L0Sums, client: str, block: int, unit: str, packed: Packed, weight: int) -> None:
        """Store a matrix."""
        keep(self._context, self._algorithm, client, block, {unit: packed})

    def close(self, block: int, unit: str, sums: L0Sums) -> tuple[Stores, dict[str, int]]:
        """Nothing is left to do."""
        return {}, {}

    def leave_out(self, client: str, block: int, unit: str) -> None:
        """Its model has the matrix nevertheless."""
        keep_unreached(self._context, self._algorithm, client, block, unit)

    def unreached(self, block: int, unit: str) -> Stores:
        """Nothing is left to do."""
        return {}


def keep(context: Context, algorithm: Algorithm, client: str, block: int, linears: Mapping[str, Packed]) -> None:
    """Store matrices of one client."""
    PackedStore(context.folder / (algorithm.store_of(client) or GLOBAL)).add(block, linears)


def keep_unreached(context: Context, algorithm: Algorithm, client: str, block: int, unit: str) -> None:
    """Store what one client's model has of an expert that it sent nothing of."""
    store = algorithm.store_of(client) or GLOBAL
    keep(context, algorithm, client, block, {unit: without_clients(context, store, block, unit)})


class GramFold:
    """Statistics into their sum, with which all matrices that take the input are pruned."""

    def __init__(self, context: Context, exchange: Exchange) -> None:
        self._context = context
        self._rounded = context.settings.gram.precision != "fp32"
        self._features = {
            (block, names[0]): context.shape(block, names[0])[1]
            for block, inputs in enumerate(context.groups)
            for names in inputs
        }

    def leave_out(self, client: str, block: int, unit: str) -> None:
        """Its part is not in the sums."""

    def unreached(self, block: int, unit: str) -> Stores:
        """All matrices that take the input."""
        names = self._linears(block, unit)
        return {GLOBAL: {name: without_clients(self._context, GLOBAL, block, name) for name in names}}

    def bytes_of(self, block: int, unit: str, clients: int) -> UnitBytes:
        """Sums are first made a square, which is then pruned with; the sums are gone by then."""
        context, settings, features = self._context, self._context.settings, self._features[block, unit]
        shapes = [self._context.shape(block, name) for name in self._linears(block, unit)]
        sums = GramSum.nbytes(features, settings.gram.drift)
        pruning = from_sums.working_bytes(shapes, settings, settings.gram.drift) - sums
        linears = self._linears(block, unit)
        zeros = [
            context.target(block, name).zeros(rows * columns)
            for name, (rows, columns) in zip(linears, shapes, strict=True)
        ]
        made = sum(packed_size(shape, count, self._context.dtype) for shape, count in zip(shapes, zeros, strict=True))
        return UnitBytes(sums, max(GramSum.closing_bytes(features, settings.gram.drift), pruning), made)

    def _linears(self, block: int, unit: str) -> tuple[str, ...]:
        """The linears that take an input."""
        return next(names for names in self._context.groups[block] if names[0] == unit)

    def units(self, block: int) -> tuple[str, ...]:
        """One for each input, by its first linear."""
        return tuple(names[0] for names in self._context.groups[block])

    def check(self, client: str, block: int, unit: str) -> Check:
        """Statistics of the right size and precision."""
        gram = self._context.settings.gram
        return partial(check_gram, parts=parts_of(self._features[block, unit], gram.precision, gram.drift))

    def open(self, block: int, unit: str, clients: int) -> GramSum:
        """Empty sums."""
        return GramSum(self._features[block, unit], self._context.settings.gram.drift, self._context.device)

    def guard(self, sums: GramSum | None, packed: PackedGram, weight: int) -> None:
        """Sums of any magnitude fit."""

    def look(self, block: int, unit: str, packed: PackedGram) -> Seen:
        """At sums of squares."""
        return look_at_squares(packed.tokens, packed.diagonal, self._context.typical(block, unit))

    def add(self, sums: GramSum, client: str, block: int, unit: str, packed: PackedGram, weight: int) -> None:
        """Fold statistics; every token counts the same, whoever has it."""
        packed.add_to(sums)

    def close(self, block: int, unit: str, sums: GramSum) -> tuple[Stores, dict[str, int]]:
        """Prune the matrices that take the input, and keep the sums for further targets where they hold for any."""
        context, total = self._context, sums.result()
        linears = self._linears(block, unit)
        if context.settings.gram.propagate == "dense":
            rounded = self._rounded
            if context.cumulative:
                total, rounded = GramStore(context.folder / STATISTICS).added(block, unit, total, rounded)
            GramStore(context.making(block) / STATISTICS).save(block, linears, total, rounded)
        weights = {name: context.dense_float(block, name) for name in linears}
        pruned = prune_input(
            weights,
            total,
            context.settings,
            self._rounded,
            context.settings.threads,
            (block, unit),
            context.settings.prune.keep_zeros,
        )
        return {GLOBAL: {name: pack(*made, context.dtype) for name, made in pruned.items()}}, {}


def prune_input(
    weights: Mapping[str, Tensor],
    sums: Sums,
    settings: Pruning,
    rounded: bool,
    threads: int | None,
    unit: tuple[int, str],
    keep_zeros: bool = True,
) -> dict[str, Pruned]:
    """Prune all matrices that take one input with the server's threads (see `pruning.from_sums.prune`).

    Raises:
        PruningError: a matrix cannot be pruned; names block and input.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    where = f"block {unit[0]}, {unit[1]}"
    try:
        pruned = from_sums.prune(weights, sums, settings, rounded, unit[0], keep_zeros)
    except PruningError as error:
        raise PruningError(f"server, {where}: {error}") from error
    for name, (weight, _) in pruned.items():
        if not bool(weight.isfinite().all()):
            if not bool(weights[name].isfinite().all()):
                raise PruningError(
                    f"server, {where}: the weights of {name} in the checkpoint hold NaN or infinity; fetch the model again"
                )
            raise PruningError(f"server, {where}: pruning {name} gave NaN or infinity; raise `damping`")
    return pruned


def with_earlier_rounds(context: Context, sums: SumsT, block: int, unit: str) -> SumsT:
    """Sums of a matrix with those of earlier rounds added, which are kept in a file.

    Raises:
        UpdateError: the sums leave their range.
    """
    name = Path("sums") / f"{block:04d}-{unit}.safetensors"
    if (context.folder / name).is_file():
        try:
            sums.merge(load_sums(type(sums), context.folder / name, context.device))
        except ValueError as error:
            raise UpdateError(f"block {block}, {unit}: the sums of all rounds: {error}") from error
    save_sums(sums, context.making(block) / name)
    return sums


@dataclass
class DeltaSums:
    """Changes of the kept entries of a matrix, added up.

    Attributes:
        total: (kept,), each client's change times its weight.
        weight: of all clients.
    """

    total: ExactSum
    weight: int = 0


class DeltaFold(_MatrixFold):
    """Changes of kept weights into their mean, which is added to the global model."""

    def __init__(self, context: Context, exchange: Exchange) -> None:
        super().__init__(context, exchange)
        self._store = PackedStore(context.folder / GLOBAL)

    def bytes_of(self, block: int, unit: str, clients: int) -> UnitBytes:
        """Two doubles a kept entry; then the mean and the weight, in doubles and floats."""
        kept = self._kept(block, unit)
        return UnitBytes(16 * kept, 16 * kept, self._packed_bytes(block, unit))

    def check(self, client: str, block: int, unit: str) -> Check:
        """A change of each kept entry, none larger than the largest weight of the matrix."""

        def check(packed: Any, where: str) -> PackedDelta:
            before = self._before(block, unit)
            assert before.values is not None, "the global model has weights"
            largest = largest_magnitude(before.values)
            return check_delta(packed, where, before.kept, self._exchange.delta, largest)

        return check

    def open(self, block: int, unit: str, clients: int) -> DeltaSums:
        """Empty sums."""
        return DeltaSums(ExactSum(self._before(block, unit).kept, device=self._context.device))

    def guard(self, sums: DeltaSums | None, packed: PackedDelta, weight: int) -> None:
        """Sums of any magnitude fit."""

    def look(self, block: int, unit: str, packed: PackedDelta) -> Seen:
        """At nothing: a change that is too large is not accepted anyway."""
        return Seen({})

    def add(self, sums: DeltaSums, client: str, block: int, unit: str, packed: PackedDelta, weight: int) -> None:
        """Fold a change."""
        changes = packed.changes(len(sums.total.high)).to(self._context.device)
        sums.total.add(changes.double() * weight)
        sums.weight += weight

    def close(self, block: int, unit: str, sums: DeltaSums) -> tuple[Stores, dict[str, int]]:
        """Add the mean to the weights, and round them to the dtype of the checkpoint."""
        before, mean = self._before(block, unit), sums.total.value().cpu() / sums.weight
        assert before.values is not None, "the global model has weights"
        values = (before.values.float() + mean).to(self._context.dtype)
        return {GLOBAL: {unit: replace(before, values=values)}}, {}

    def unreached(self, block: int, unit: str) -> Stores:
        """It stays as it is."""
        return {}

    def _before(self, block: int, unit: str) -> Packed:
        return (self._store.get(block, unit) or {})[unit]


_FOLDS: dict[str, Callable[[Context, Exchange], Fold]] = {
    "weights": lambda context, exchange: (WeightFold if exchange.make else KeepFold)(context, exchange),
    "masks": VoteFold,
    "values": ValueFold,
    "grams": GramFold,
    DELTAS: DeltaFold,
    NOTHING: KeepFold,  # of no upload
}


def folds(context: Context, exchanges: Sequence[Exchange]) -> tuple[Fold, ...]:
    """The fold of each exchange; a single one serves all exchanges of a sweep."""
    made: dict[Exchange, Fold] = {}
    for exchange in (replace(one, only=None) for one in exchanges):
        if exchange not in made:
            made[exchange] = _FOLDS[exchange.up](context, exchange)
    return tuple(made[replace(one, only=None)] for one in exchanges)
