"""Folds of matrices: weights, masks, and values under masks that were agreed on.

Legend: O out features, I in features.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedspallm_appfl.aggregation.l0_mean import LARGEST_SUM, MOST_WEIGHT, L0Sums, l0_mean, largest_magnitude
from fedspallm_appfl.aggregation.mask_expansion import Votes, agreement
from fedspallm_appfl.aggregation.screening import Seen, look_at_mask, look_at_values
from fedspallm_appfl.algorithms import registry
from fedspallm_appfl.algorithms.algorithm import Algorithm, Exchange, Make
from fedspallm_appfl.errors import PruningError
from fedspallm_appfl.pruning.pruner import check_mask, named
from fedspallm_appfl.rounds.folds.context import DOWN, GLOBAL, MASKS, Context, Fold, Stores, UnitBytes
from fedspallm_appfl.rounds.folds.earlier import with_earlier_rounds
from fedspallm_appfl.rounds.folds.unreached import without_clients
from fedspallm_appfl.tensors import bitmask
from fedspallm_appfl.tensors.exact_sum import sum_of_squares
from fedspallm_appfl.tensors.sparsity import row_counts
from fedspallm_appfl.tensors.target import NM
from fedspallm_appfl.wire.packed import Packed, pack, pack_mask, packed_size
from fedspallm_appfl.wire.store import PackedStore
from fedspallm_appfl.wire.update import Check, check_matrix, check_values


class MatrixFold(Fold):
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

    def _entries(self, block: int, unit: str) -> int:
        return self._context.layout.linear(block, unit).entries

    def _kept(self, block: int, unit: str) -> int:
        """Entries that its target keeps."""
        entries = self._entries(block, unit)
        return entries - self._context.target(block, unit).zeros(entries)

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


class _MeanFold(MatrixFold):
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
        settings = self._context.settings
        shares = max(1, len(settings.roster)) * (settings.rounds if self._context.cumulative else 1)
        largest = packed.largest
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
        self._mask_only = frozenset(context.settings.mask_only)

    def bytes_of(self, block: int, unit: str, clients: int) -> UnitBytes:
        """Sums of all entries; a packed matrix for each store."""
        entries, made = self._entries(block, unit), len(self._makes) * self._context.packed_bytes(block, [unit])
        each = L0Sums.entry_bytes(self._weights(block, unit), clients)
        return UnitBytes(each * entries, self._closing * entries, made)

    def check(self, client: str, block: int, unit: str) -> Check:
        """The right shape and sparsity; values are put in where the client's pruner left weights alone."""
        context, alone = self._context, client in self._mask_only

        def check(packed: Any, where: str) -> Packed:
            shape, target = context.shape(block, unit), context.target(block, unit)
            checked = check_matrix(packed, where, shape, context.dtype, target, alone)
            return checked.with_values(context.dense(block, unit)) if alone else checked

        return check

    def look(self, client: str, block: int, unit: str, packed: Packed) -> Seen:
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
        sums.add_packed(packed.values.to(device), packed.bits.to(device), weight, packed.largest)

    def keep(self, client: str, block: int, unit: str, packed: Packed) -> None:
        """For comparison."""
        for algorithm in self._apart:
            keep(self._context, algorithm, client, block, {unit: packed})

    def close(self, block: int, unit: str, sums: L0Sums) -> tuple[Stores, dict[str, int]]:
        """Combine for each store."""
        if self._context.cumulative:
            sums = with_earlier_rounds(self._context, sums, block, unit)
        facts = agreement(sums.votes, sums.clients)
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


class VoteFold(MatrixFold):
    """Masks into votes, from which the mask of all is made, with or without weights."""

    def bytes_of(self, block: int, unit: str, clients: int) -> UnitBytes:
        """Votes of all entries; what is made is a mask, or a matrix."""
        entries, shape = self._entries(block, unit), self._context.shape(block, unit)
        mask = packed_size(shape, entries, self._context.dtype)
        made = mask if self._exchange.down == "masks" else self._context.packed_bytes(block, [unit])
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

    def look(self, client: str, block: int, unit: str, packed: Packed) -> Seen:
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
        facts = agreement(sums.pruned, sums.clients)
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
        return UnitBytes(sums, self._algorithm.closing_bytes * kept, self._context.packed_bytes(block, [unit]))

    def check(self, client: str, block: int, unit: str) -> Check:
        """As many values as the mask keeps."""
        return lambda packed, where: check_values(packed, where, self._agreed(block, unit), self._context.dtype)

    def open(self, block: int, unit: str, clients: int) -> L0Sums:
        """Sums of kept entries alone, (1, kept): nobody votes any more."""
        kept, weighted = self._agreed(block, unit).kept, self._weights(block, unit)
        return L0Sums.empty((1, kept), weighted, clients, self._context.device)

    def look(self, client: str, block: int, unit: str, packed: Packed) -> Seen:
        """At weights."""
        return self._look(block, unit, packed, own_mask=False)

    def add(self, sums: L0Sums, client: str, block: int, unit: str, packed: Packed, weight: int) -> None:
        """Fold values."""
        assert packed.values is not None
        values = packed.values.to(self._context.device)
        sums.add_packed(values, bitmask.to_bits(torch.ones_like(values, dtype=torch.bool)), weight, packed.largest)

    def close(self, block: int, unit: str, sums: L0Sums) -> tuple[Stores, dict[str, int]]:
        """The mean of the values."""
        return self.stored(block, unit, l0_mean(sums).view(-1))

    def stored(self, block: int, unit: str, mean: Tensor) -> tuple[Stores, dict[str, int]]:
        """The matrix with a mean, (kept,), rounded to the dtype of the checkpoint."""
        values = mean.to(self._context.dtype).cpu()
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
        return UnitBytes(0, 0, self._context.packed_bytes(block, [unit]))

    def open(self, block: int, unit: str, clients: int) -> L0Sums:
        """Nothing is summed."""
        return self._no_sums

    def look(self, client: str, block: int, unit: str, packed: Packed) -> Seen:
        """At nothing: it is in nobody else's model."""
        return Seen({})

    def keep(self, client: str, block: int, unit: str, packed: Packed) -> None:
        """All there is to do."""
        keep(self._context, self._algorithm, client, block, {unit: packed})

    def add(self, sums: L0Sums, client: str, block: int, unit: str, packed: Packed, weight: int) -> None:
        """Nothing is summed."""

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
