"""The fold of changes of kept weights in recovery.

Legend: O out features, I in features.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from fedspallm_appfl.aggregation.screening import Seen, look_at_changes
from fedspallm_appfl.aggregation.step_length import step_length
from fedspallm_appfl.algorithms.algorithm import Exchange
from fedspallm_appfl.rounds.folds.context import GLOBAL, Context, Stores, UnitBytes
from fedspallm_appfl.rounds.folds.matrices import MatrixFold
from fedspallm_appfl.tensors.exact_sum import ExactSum, sum_of_squares
from fedspallm_appfl.wire.deltas import PackedDelta
from fedspallm_appfl.wire.packed import Packed
from fedspallm_appfl.wire.store import PackedStore
from fedspallm_appfl.wire.update import Check, check_delta


@dataclass
class DeltaSums:
    """Changes of the kept entries of a matrix, added up.

    Attributes:
        total: (kept,), each client's change times its weight.
        weight: of all clients.
        squares: of each client's change, summed over its entries.
    """

    total: ExactSum
    weight: int = 0
    squares: list[float] = field(default_factory=list)


class DeltaFold(MatrixFold):
    """Changes of kept weights into their mean, along which the global model goes (see `step_length`)."""

    def __init__(self, context: Context, exchange: Exchange) -> None:
        super().__init__(context, exchange)
        self._store = PackedStore(context.folder / GLOBAL)

    def bytes_of(self, block: int, unit: str, clients: int) -> UnitBytes:
        """Two doubles a kept entry; then the mean and the weight, in doubles and floats."""
        kept = self._kept(block, unit)
        return UnitBytes(16 * kept, 16 * kept, self._context.packed_bytes(block, [unit]))

    def check(self, client: str, block: int, unit: str) -> Check:
        """A change of each kept entry, none larger than the largest weight of the matrix."""

        def check(packed: Any, where: str) -> PackedDelta:
            before = self._before(block, unit)
            return check_delta(packed, where, before.kept, self._exchange.delta, before.largest)

        return check

    def open(self, block: int, unit: str, clients: int) -> DeltaSums:
        """Empty sums."""
        return DeltaSums(ExactSum(self._before(block, unit).kept, device=self._context.device))

    def look(self, client: str, block: int, unit: str, packed: PackedDelta) -> Seen:
        """At how much it changes; single entries were checked."""
        before = self._before(block, unit)
        assert before.values is not None, "the global model has weights"
        return look_at_changes(packed.changes(before.kept), before.values)

    def add(self, sums: DeltaSums, client: str, block: int, unit: str, packed: PackedDelta, weight: int) -> None:
        """Fold a change."""
        changes = packed.changes(len(sums.total.high))
        sums.total.add(changes.to(self._context.device).double() * weight)
        sums.weight += weight
        sums.squares.append(sum_of_squares(changes))

    def close(self, block: int, unit: str, sums: DeltaSums) -> tuple[Stores, dict[str, int]]:
        """Go along the mean, and round the weights to the dtype of the checkpoint."""
        before, mean = self._before(block, unit), sums.total.value().cpu() / sums.weight
        assert before.values is not None, "the global model has weights"
        step = step_length(sums.squares, sum_of_squares(mean))
        values = before.values.float().add_(mean, alpha=step).to(self._context.dtype)
        return {GLOBAL: {unit: replace(before, values=values)}}, {}

    def unreached(self, block: int, unit: str) -> Stores:
        """It stays as it is."""
        return {}

    def _before(self, block: int, unit: str) -> Packed:
        return (self._store.get(block, unit) or {})[unit]
