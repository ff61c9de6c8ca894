"""What becomes of uploads on arrival: they are checked and added up, and complete sums are closed.

This is the part of the server that touches tensors. It knows who was assigned what, and keeps no account of who still owes
something: that is `rounds.server`'s, which hears of each upload by its receipt. So both may be in different processes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fedspallm_appfl.aggregation.screening import outliers
from fedspallm_appfl.algorithms.algorithm import Exchange
from fedspallm_appfl.devices import give_back
from fedspallm_appfl.errors import UpdateError
from fedspallm_appfl.events import OnEvent
from fedspallm_appfl.rounds.folds.context import Context, Fold, Stores
from fedspallm_appfl.rounds.folds.received import Received
from fedspallm_appfl.rounds.folds.unreached import expert_weight
from fedspallm_appfl.wire.messages import Unit
from fedspallm_appfl.wire.packed import Packed, Unreached
from fedspallm_appfl.wire.update import Check, Units, block_nbytes, check_expert, check_update, update_nbytes


@dataclass(frozen=True)
class Standing:
    """Where the run stands.

    Attributes:
        round_index: the round that is on, from 0.
        exchange: its exchange that is on, from 0.
        assigned: client -> blocks.
        given_up: clients of whom nothing more is taken.
        finished: blocks of the exchange that an earlier start has finished; what comes of them is dropped.
    """

    round_index: int
    exchange: int
    assigned: Mapping[str, list[int]]
    given_up: frozenset[str] = frozenset()
    finished: frozenset[int] = frozenset()

    def clients_of(self, block: int) -> set[str]:
        """Clients that are expected to send a block."""
        return {name for name, blocks in self.assigned.items() if block in blocks and name not in self.given_up}

    def require_expected(self, client: str) -> None:
        """See that something is expected of a client.

        Raises:
            UpdateError: nothing is.
        """
        if client not in self.assigned:
            raise UpdateError(f"refused an update from {client}: it is not in the roster {sorted(self.assigned)}")
        if client in self.given_up:
            raise UpdateError(f"refused an update from client {client}: round {self.round_index} goes on without it")


@dataclass
class Receipt:
    """What an upload was.

    Attributes:
        units: what of it was added up; each with False where too few tokens reached it for a part in the sums.
        nbytes: bytes of its tensors as they came.
        block_bytes: the same by block.
        refused: why some of it was not added up.
    """

    units: dict[Unit, bool] = field(default_factory=dict)
    nbytes: int = 0
    block_bytes: dict[int, int] = field(default_factory=dict)
    refused: str = ""

    def add(self, part: "Receipt") -> None:
        """Add the receipt of another part of the upload."""
        self.refused = self.refused or part.refused
        self.units |= part.units
        self.nbytes += part.nbytes
        for block, nbytes in part.block_bytes.items():
            self.block_bytes[block] = self.block_bytes.get(block, 0) + nbytes

    @property
    def blocks(self) -> set[int]:
        """Blocks of which something came, whether it was needed or not."""
        return set(self.block_bytes)


class Intake:
    """Sums of the exchange that is on.

    Attributes:
        standing: where the run stands.
    """

    def __init__(
        self, context: Context, exchanges: tuple[Exchange, ...], folds: tuple[Fold, ...], on_event: OnEvent
    ) -> None:
        """Nothing has come.

        Args:
            context: what folds share.
            exchanges: what travels in a round.
            folds: how each is added up.
            on_event: called with a dict for each upload that differs from what honest clients send.
        """
        self._context, self._settings = context, context.settings
        self._exchanges, self._folds = exchanges, folds
        self._on_event = on_event
        self._fitted = frozenset(context.settings.fitted)
        self._sums: dict[Unit, Any] = {}
        self._received = Received()
        self.standing = Standing(-1, 0, {})

    def stand(self, standing: Standing) -> None:
        """Go on with another exchange, or with other clients."""
        now = self.standing
        if (standing.round_index, standing.exchange) != (now.round_index, now.exchange):
            self._sums.clear()
            self._received.clear()
        self.standing = standing

    @property
    def _exchange(self) -> Exchange:
        return self._exchanges[self.standing.exchange]

    @property
    def _fold(self) -> Fold:
        return self._folds[self.standing.exchange]

    def take(self, client: str, update: Any, samples: int) -> Receipt:
        """Check and add up one upload.

        Args:
            client: who sent it.
            update: what arrived; `{}` for a message without matrices.
            samples: calibration windows of the client.

        Raises:
            UpdateError: the upload is not what was assigned, and nothing of it was folded; or, with `cumulative`, the
                sums of all rounds leave their range.
        """
        self.standing.require_expected(client)
        if isinstance(update, Mapping) and not update:
            return Receipt()
        came, checked, weight = self.checked(client, update, samples)
        for block, name, packed in came:
            if not isinstance(packed, Unreached):
                self._fold.keep(client, block, name, packed)
        for block, name, packed in checked:
            self._received.add((client, block, name))
            self._add(client, block, name, packed, weight)
        reached = {(block, name): not isinstance(packed, Unreached) for block, name, packed in checked}
        return Receipt(reached, update_nbytes(update), block_nbytes(update))

    def checked(self, client: str, update: Any, samples: int) -> tuple[Units, Units, int]:
        """An upload as it came and as it is added up, without what is finished, and the client's weight.

        Raises:
            UpdateError: it is not what was assigned, or not what honest clients send.
        """
        now, fold = self.standing, self._fold
        expected = {
            block: {
                unit: self._check_of(client, block, unit) for unit in self._exchange.units_of(block, fold.units(block))
            }
            for block in now.assigned[client]
            if self._exchange.concerns(block)
        }
        came = check_update(update, f"client {client}", now.round_index, now.exchange, expected)
        came = tuple(unit for unit in came if unit[0] not in now.finished)  # they came before the run was cut off
        for block, name, _ in came:
            if (client, block, name) in self._received:
                raise UpdateError(f"refused an update from client {client}: block {block}, {name} was sent before")
        weight = self._client_weight(client, samples)
        for block, name, packed in came:
            self._guard(client, block, name, packed, weight)
        if self._settings.screening == "off":
            return came, came, weight
        return came, tuple((block, name, self._screened(client, block, name, one)) for block, name, one in came), weight

    def close(self, block: int, unit: str) -> tuple[Stores, dict[str, int]]:
        """Make matrices of the sums of a unit, which are used up; returns them for each store, and facts for the report."""
        give_back()  # what the uploads left behind; the steps to come are the largest
        if (block, unit) not in self._sums:
            return self._fold.unreached(block, unit), {"unreached": 1}
        return self._fold.close(block, unit, self._sums.pop((block, unit)))

    def _check_of(self, client: str, block: int, unit: str) -> Check:
        """How an upload of a unit is checked."""
        check = self._fold.check(client, block, unit)
        expert = self._context.layout.linear(block, unit).expert
        if not expert or self._exchange.recovers:
            return check
        return check_expert(check, statistics=self._exchange.up == "grams")

    def _client_weight(self, client: str, samples: int) -> int:
        if samples < 1:
            raise UpdateError(
                f"refused an update from client {client}: its sample size is {samples}, at least 1 is needed"
            )
        asked = self._settings.windows.get(client, samples)
        if samples != asked:
            raise UpdateError(
                f"refused an update from client {client}: its sample size is {samples}, and `data.windows` asks for {asked}"
            )
        return samples if self._settings.weights == "sample_size" else 1

    @staticmethod
    def _weight(packed: Any, weight: int) -> int:
        """The weight of an upload: of an expert's matrix by the tokens that reached it."""
        tokens = packed.tokens if isinstance(packed, Packed) else None
        return weight if tokens is None else expert_weight(tokens)

    def _guard(self, client: str, block: int, name: str, packed: Any, weight: int) -> None:
        if isinstance(packed, Unreached):
            return
        try:
            self._fold.guard(self._sums.get((block, name)), packed, self._weight(packed, weight))
        except ValueError as error:
            raise UpdateError(f"refused an update from client {client}, block {block}, {name}: {error}") from error

    def _screened(self, client: str, block: int, name: str, packed: Any) -> Any:
        """An upload as it is folded; what no honest client sends is refused, or reported only."""
        if isinstance(packed, Unreached):
            return packed
        seen, refuses = self._fold.look(client, block, name, packed), self._settings.screening == "refuse"
        found = list(map(str, outliers(seen.facts, client in self._fitted)))
        if found and refuses:
            raise UpdateError(
                f"refused an update from client {client}, block {block}, {name}: {'; '.join(found)}; with "
                "`server_configs.aggregator_kwargs.screening: report` it is folded and reported"
            )
        where = {"round": self.standing.round_index, "client": client, "block": block, "unit": name}
        for why in found:
            self._on_event({"event": "outlier", **where, "why": why})
        if not (seen.columns and refuses):
            return packed
        self._on_event({"event": "brought_back", **where, "columns": seen.columns})
        return replace(packed, values=seen.values)

    def _add(self, client: str, block: int, unit: str, packed: Any, weight: int) -> None:
        if isinstance(packed, Unreached):
            self._fold.leave_out(client, block, unit)
            return
        if (block, unit) not in self._sums:
            clients = len(self.standing.clients_of(block))
            self._sums[block, unit] = self._fold.open(block, unit, clients)
        self._fold.add(self._sums[block, unit], client, block, unit, packed, self._weight(packed, weight))
