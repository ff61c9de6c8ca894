"""The fold of Gram matrices: the server prunes with their sum.

Legend: O out features, I in features.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from fedspallm_appfl.aggregation.gram_sum import GramSum
from fedspallm_appfl.aggregation.screening import Seen, look_at_statistics
from fedspallm_appfl.algorithms.algorithm import Exchange
from fedspallm_appfl.errors import PruningError
from fedspallm_appfl.pruning import from_sums
from fedspallm_appfl.pruning.from_sums import Sums
from fedspallm_appfl.rounds.folds.context import GLOBAL, STATISTICS, Context, Fold, Stores, UnitBytes
from fedspallm_appfl.rounds.folds.unreached import without_clients
from fedspallm_appfl.settings.schema import Pruning
from fedspallm_appfl.wire.grams import PackedGram, parts_of
from fedspallm_appfl.wire.packed import Packed, pack
from fedspallm_appfl.wire.store import GramStore
from fedspallm_appfl.wire.update import Check, check_gram


class GramFold(Fold):
    """Statistics into their sum, with which all matrices that take the input are pruned."""

    def __init__(self, context: Context, exchange: Exchange) -> None:
        self._context = context
        self._rounded = context.settings.gram.precision != "fp32"
        self._features = {
            (block, names[0]): context.shape(block, names[0])[1]
            for block, inputs in enumerate(context.groups)
            for names in inputs
        }

    def unreached(self, block: int, unit: str) -> Stores:
        """All matrices that take the input."""
        names = self._linears(block, unit)
        return {GLOBAL: {name: without_clients(self._context, GLOBAL, block, name) for name in names}}

    def bytes_of(self, block: int, unit: str, clients: int) -> UnitBytes:
        """Sums are first made a square, which is then pruned with; the sums are gone by then."""
        context, settings, features = self._context, self._context.settings, self._features[block, unit]
        linears = self._linears(block, unit)
        shapes = [context.shape(block, name) for name in linears]
        sums = GramSum.nbytes(features, settings.gram.drift)
        pruning = from_sums.working_bytes(shapes, settings, settings.gram.drift) - sums
        closing = max(GramSum.closing_bytes(features, settings.gram.drift), pruning)
        return UnitBytes(sums, closing, context.packed_bytes(block, linears))

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

    def look(self, client: str, block: int, unit: str, packed: PackedGram) -> Seen:
        """At sums of squares, their number, and the drift."""
        typical, asked = self._context.typical(block, unit), self._context.settings.tokens.get(client)
        drift = None if packed.drift is None else packed.norm_of("drift")
        return look_at_statistics(packed.tokens, packed.diagonal, typical, asked, drift)

    def add(self, sums: GramSum, client: str, block: int, unit: str, packed: PackedGram, weight: int) -> None:
        """Fold statistics; every token counts the same, whoever has it."""
        packed.add_to(sums)

    def close(self, block: int, unit: str, sums: GramSum) -> tuple[Stores, dict[str, int]]:
        """Prune the matrices that take the input, and keep the sums for further targets where they hold for any."""
        return self.pruned(block, unit, sums.result())

    def pruned(self, block: int, unit: str, total: Sums) -> tuple[Stores, dict[str, int]]:
        """What is made of complete sums."""
        context, linears = self._context, self._linears(block, unit)
        if context.settings.gram.propagate == "dense":
            if context.cumulative:
                total = GramStore(context.folder / STATISTICS).added(block, unit, total)
            GramStore(context.making(block) / STATISTICS).save(block, linears, total, self._rounded)
        weights = {name: context.dense_float(block, name) for name in linears}
        pruned = prune_input(
            weights,
            total,
            context.settings,
            self._rounded,
            context.settings.threads,
            (block, unit),
            context.settings.prune.keep_zeros,
            context.dtype,
        )
        return {GLOBAL: pruned}, {}


def prune_input(
    weights: Mapping[str, Tensor],
    sums: Sums,
    settings: Pruning,
    rounded: bool,
    threads: int | None,
    unit: tuple[int, str],
    keep_zeros: bool,
    dtype: torch.dtype,
) -> dict[str, Packed]:
    """Prune all matrices that take one input with the server's threads (see `pruning.from_sums.prune`).

    Raises:
        PruningError: a matrix cannot be pruned, or the checkpoint's dtype cannot hold it; names block and input.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    where = f"block {unit[0]}, {unit[1]}"
    try:
        pruned = from_sums.prune(weights, sums, settings, rounded, unit[0], keep_zeros)
    except PruningError as error:
        raise PruningError(f"server, {where}: {error}") from error
    packed = {name: pack(*made, dtype) for name, made in pruned.items()}
    for name, one in packed.items():
        if one.values is not None and not bool(one.values.isfinite().all()):
            if not bool(weights[name].isfinite().all()):
                raise PruningError(
                    f"server, {where}: the weights of {name} in the checkpoint hold NaN or infinity; fetch the model again"
                )
            raise PruningError(f"server, {where}: pruning {name} gave NaN or infinity; raise `damping`")
    return packed
