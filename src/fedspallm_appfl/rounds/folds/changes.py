"""The fold of changes in recovery: of kept weights themselves, or of their factors (see `recovery.low_rank`).

Legend: O out features, I in features.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from fedspallm_appfl.aggregation.screening import Seen, look_at_changes
from fedspallm_appfl.aggregation.step_length import step_length
from fedspallm_appfl.algorithms.algorithm import Exchange
from fedspallm_appfl.recovery.low_rank import Basis
from fedspallm_appfl.recovery.trained import largest_change
from fedspallm_appfl.rounds.folds.context import GLOBAL, Context, Stores, UnitBytes
from fedspallm_appfl.rounds.folds.matrices import MatrixFold
from fedspallm_appfl.tensors import bitmask
from fedspallm_appfl.tensors.exact_sum import ExactSum, sum_of_squares
from fedspallm_appfl.wire.deltas import PackedDelta, changed_entries
from fedspallm_appfl.wire.packed import Packed
from fedspallm_appfl.wire.store import PackedStore
from fedspallm_appfl.wire.update import Check, check_delta


@dataclass
class DeltaSums:
    """Changes of a matrix, added up.

    Attributes:
        total: a number for each entry that travels, those of each client times its weight.
        weight: of all clients.
        squares: of what each client sent, summed over its entries.
    """

    total: ExactSum
    weight: int = 0
    squares: list[float] = field(default_factory=list)


class DeltaFold(MatrixFold):
    """Changes of kept weights into their mean, along which the global model goes (see `step_length`)."""

    def __init__(self, context: Context, exchange: Exchange) -> None:
        super().__init__(context, exchange)
        self._store = PackedStore(context.folder / GLOBAL)
        assert exchange.turn is not None, "it is an exchange of recovery"
        self._basis = Basis(exchange.rank, context.settings.seed, exchange.turn) if exchange.rank else None

    def bytes_of(self, block: int, unit: str, clients: int) -> UnitBytes:
        """Two doubles an entry; then the mean, the product that it is of, and the weight, in doubles and floats."""
        kept, (out, features) = self._kept(block, unit), self._context.shape(block, unit)
        sums = 16 * changed_entries(kept, out, self._exchange.rank)
        product = 4 * out * features + 12 * kept if self._basis else 0
        return UnitBytes(sums, sums + product, self._context.packed_bytes(block, [unit]))

    def check(self, client: str, block: int, unit: str) -> Check:
        """As many entries as travel, none of which changes a weight by more than the largest of the matrix."""

        def check(packed: Any, where: str) -> PackedDelta:
            before = self.before(block, unit)
            return check_delta(
                packed, where, self.travels(before), self._exchange.delta, largest_change(before, self._exchange.rank)
            )

        return check

    def open(self, block: int, unit: str, clients: int) -> DeltaSums:
        """Empty sums."""
        return DeltaSums(ExactSum(self.travels(self.before(block, unit)), device=self._context.device))

    def look(self, client: str, block: int, unit: str, packed: PackedDelta) -> Seen:
        """At how much it changes; single entries were checked."""
        before = self.before(block, unit)
        assert before.values is not None, "the global model has weights"
        changes = packed.changes(self.travels(before))
        return look_at_changes(self._of_weights(block, unit, before, changes), before.values)

    def add(self, sums: DeltaSums, client: str, block: int, unit: str, packed: PackedDelta, weight: int) -> None:
        """Fold a change."""
        changes = packed.changes(len(sums.total.high))
        sums.total.add(changes.to(self._context.device).double() * weight)
        sums.weight += weight
        sums.squares.append(sum_of_squares(changes))

    def close(self, block: int, unit: str, sums: DeltaSums) -> tuple[Stores, dict[str, int]]:
        """Go along the mean."""
        return self.changed(block, unit, sums.total.value().cpu() / sums.weight, sums.squares)

    def changed(self, block: int, unit: str, mean: Tensor, squares: Sequence[float]) -> tuple[Stores, dict[str, int]]:
        """Go along a mean, and round the weights to the dtype of the checkpoint.

        Args:
            block: of the matrix.
            unit: its name.
            mean: of what travels, on the CPU.
            squares: for each client the sum of squares of what it sent.
        """
        before = self.before(block, unit)
        assert before.values is not None, "the global model has weights"
        change = self._of_weights(block, unit, before, mean)
        step = step_length(squares, sum_of_squares(mean))
        values = before.values.float().add_(change, alpha=step).to(self._context.dtype)
        return {GLOBAL: {unit: replace(before, values=values)}}, {}

    def unreached(self, block: int, unit: str) -> Stores:
        """It stays as it is."""
        return {}

    def travels(self, before: Packed) -> int:
        """How many entries travel."""
        return changed_entries(before.kept, before.shape[0], self._exchange.rank)

    def _of_weights(self, block: int, unit: str, before: Packed, changes: Tensor) -> Tensor:
        """The changes of kept weights, (kept,), that entries stand for."""
        if self._basis is None:
            return changes
        out, features = before.shape
        product = changes.float().view(out, self._basis.rank) @ self._basis.of(block, unit, features)
        return bitmask.gather(product, before.bits)

    def before(self, block: int, unit: str) -> Packed:
        """The matrix as this round of recovery began."""
        return (self._store.get(block, unit) or {})[unit]
