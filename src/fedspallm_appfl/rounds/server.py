"""The server's side of a round: fold uploads as they come, and make each part of the global model when it is complete.

A unit - a matrix, or an input's statistics - is open from the first upload for it to the last. While it is open its sums
are in memory; then the algorithm's fold makes matrices of them (`folds`), which are packed and stored on disk, and the sums
are dropped. So the server holds the sums of the open blocks, their finished matrices packed, and one message, whatever the
number of clients and rounds, and never the model.

Aggregated weights are rounded to the dtype of the checkpoint, which is also what clients send and receive.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fedspallm_appfl.algorithms import registry
from fedspallm_appfl.algorithms.algorithm import OPENING, Exchange, of_round
from fedspallm_appfl.devices import give_back
from fedspallm_appfl.errors import FederationError, UpdateError
from fedspallm_appfl.events import OnEvent, ignore
from fedspallm_appfl.rounds.folds.context import DOWN, GLOBAL, Context, Fold, Stores
from fedspallm_appfl.rounds.folds.intake import Intake, Receipt, Standing
from fedspallm_appfl.rounds.folds.received import Received
from fedspallm_appfl.rounds.folds.registry import folds
from fedspallm_appfl.rounds.hidden.folds import HiddenFold
from fedspallm_appfl.rounds.hidden.places import exchanges_of, numbered, roster_of, summed_in
from fedspallm_appfl.rounds.hidden.server import Sums
from fedspallm_appfl.rounds.hidden.view import Sent
from fedspallm_appfl.rounds.journal import BROKEN, Journal, Latest, require_of_run
from fedspallm_appfl.rounds.pieces import Piece, Pieces
from fedspallm_appfl.rounds.uploads import sizes
from fedspallm_appfl.wire.messages import Unit, plan
from fedspallm_appfl.wire.packed import Packed
from fedspallm_appfl.wire.store import PackedStore
from fedspallm_appfl.wire.update import block_nbytes, update_nbytes

HIDDEN = "hidden"  # folder of secure sums


@dataclass
class Round:
    """Who prunes what in the round that is on.

    Attributes:
        index: the round, from 0.
        assigned: client -> blocks.
        exchange: the exchange that is on, from 0.
        changed: blocks of which some matrix was completed in the round.
        closed: linears that were completed in the exchange: block -> names.
        given_up: clients of whom nothing more is expected.
        bytes_down: what has gone down to each client.
    """

    index: int
    assigned: Mapping[str, list[int]]
    exchange: int = 0
    changed: set[int] = field(default_factory=set)
    closed: dict[int, list[str]] = field(default_factory=dict)
    given_up: set[str] = field(default_factory=set)
    bytes_down: int = 0

    def clients_of(self, block: int) -> set[str]:
        """Clients that prune a block, or have before they were given up."""
        return {client for client, blocks in self.assigned.items() if block in blocks}


class GlobalModel:
    """Sums of open units, and the packed matrices that are done.

    Attributes:
        done: the global model's pruned blocks.
        round: the round that is on.
        exchanges: what travels in the last round; those of recovery are not in earlier ones.
        pieces: what goes down.
        resumed: blocks of the exchange that is on that an earlier start has finished; None if this is the first start.
    """

    def __init__(self, context: Context, on_event: OnEvent = ignore) -> None:
        """Start with nothing pruned, or where an earlier start in the same folder was cut off.

        Args:
            context: model, settings and folder.
            on_event: called with a dict for each block that is done.
        """
        self.context = context
        self.settings = context.settings
        self.folder = context.folder
        self.on_event = on_event
        self.done: PackedStore = Latest(self.folder, GLOBAL)
        self.round = Round(-1, {})
        self._roster = roster_of(self.settings)
        self.exchanges = exchanges_of(self.settings, context.groups)
        self.pieces = Pieces(context.folder, self.exchanges, self.settings.compression == "zstd")
        self._folds = folds(context, self.exchanges)
        self._intake = Intake(context, self.exchanges, self._folds, lambda event: self.on_event(event))
        self._hidden: Sums | None = None  # of the round that is on
        self._sent = Sent(self.exchanges, context.dtype)
        self._open: dict[Unit, set[str]] = {}  # unit of which something came -> clients that still owe it
        self._ready: dict[int, Stores] = {}
        self._closed: dict[int, set[str]] = {}  # units of blocks that are open
        self._received = Received()
        self._facts: dict[int, dict[str, Any]] = {}
        self._held: set[Unit] = set()  # matrices of the global model that clients have as they are
        self._replaced: set[Unit] = set()  # by this exchange
        self._opened: set[int] = set()  # exchanges of the round whose sums were
        self._position: dict[str, Any] = {}
        self._journal = Journal(self.folder)
        self.resumed: set[int] | None = None
        self.resumed = self._restored()
        self._stand()

    @property
    def exchange(self) -> Exchange:
        """The exchange that is on."""
        return self.exchanges[self.round.exchange]

    def messages(self, blocks_per_message: int, limit: int) -> list[list[Unit]]:
        """The messages that every client sends in the exchange that is on, each as its (block, unit) pairs.

        Args:
            blocks_per_message: blocks in a message, fewer where they exceed the limit.
            limit: bytes of a message.
        """
        return plan(self._sizes_of(self.exchange), blocks_per_message, limit) or [[]]

    def _sizes_of(self, exchange: Exchange) -> dict[int, dict[str, int]]:
        """Bytes of each unit of an exchange, by block."""
        context, settings = self.context, self.settings
        return sizes(exchange, context.layout.pruned, settings.sparsity, context.dtype, context.groups, settings.gram)

    def begin_round(self, index: int, assigned: Mapping[str, list[int]]) -> None:
        """Expect from each client its assigned blocks.

        Raises:
            RuntimeError: blocks of the round before are still open.
        """
        self.end_exchange()
        self._facts.clear()  # of blocks that nobody could complete
        self.round = Round(index, assigned)
        if self.settings.secure_sums:
            self._begin_hidden()
        if self.exchange.begins:
            self.round.assigned = {client: [] for client in assigned}
            self.round.closed = {block: self.done.names(block) for block in self.done.blocks()}
        self._note_position()

    def end_exchange(self) -> None:
        """Put what the exchange has made in the place of what was there.

        Raises:
            RuntimeError: blocks of it are still open.
        """
        self._require_closed()
        if self.exchange.up == OPENING and self._hidden is not None and self.round.exchange not in self._opened:
            self._open_sums()
        self._journal.end()
        self._held -= self._replaced
        self._replaced = set()

    def _begin_hidden(self) -> None:
        """Ask for new keys."""
        self._opened = set()
        assert self._roster is not None
        folder = self.folder / HIDDEN
        self._hidden = Sums(
            self.round.index, self.exchanges, self._roster, numbered(self.exchanges, self._sizes_of), folder
        )

    def told(self, client: str) -> dict[str, Any]:
        """What a client has to know of secure sums before the exchange that is on, in plain types.

        Raises:
            FederationError: too few clients take part.
        """
        if self._hidden is None or client in self.round.given_up:
            return {}
        return self._hidden.tell(self.round.exchange, client)

    def _open_sums(self) -> None:
        """Make what the exchange before has sent, of which only sums are known now."""
        assert self._hidden is not None
        self._opened.add(self.round.exchange)
        before = summed_in(self.exchanges, self.round.exchange)
        fold = self._folds[before]
        assert isinstance(fold, HiddenFold)
        for block, unit, words, clients in self._hidden.opened(before, self._sent.view(self.round.index, before)):
            give_back()
            stores, facts = fold.made(block, unit, words, clients)
            self._file(block, unit, stores, facts, len(fold.units(block)))

    def end(self) -> None:
        """Note that all rounds are done."""
        self.round = replace(self.round, index=self.settings.rounds)
        self._note_position()

    def next_exchange(self) -> bool:
        """Begin the next exchange of the round; whether there is one.

        Raises:
            RuntimeError: blocks of this one are still open.
        """
        self.end_exchange()
        if self.round.exchange + 1 == len(self._of_this_round):
            return False
        self.round.exchange += 1
        self.round.closed = {}
        if self.exchange.trains:
            if self.exchange.turn == 0 and not self.settings.recovery.model:
                self.on_event({"event": "pruned"})
            blocks = self._whole_blocks()  # whoever pruned them: the weights of all belong together
            self.round.assigned = {client: list(blocks) for client in self.round.assigned}
        self._note_position()
        if self.exchange.trains:
            clients = sorted(self.round.assigned.keys() - self.round.given_up)
            self.on_event({"event": "training", "turn": self.exchange.turn, "clients": clients})
        return True

    @property
    def _of_this_round(self) -> tuple[Exchange, ...]:
        return of_round(self.exchanges, self.round.index + 1 == self.settings.rounds)

    def _whole_blocks(self) -> list[int]:
        """Blocks of the global model of which every matrix is there."""
        pruned = self.context.layout.pruned
        return [block for block in self.done.blocks() if set(self.done.names(block)) == set(pruned[block])]

    def _require_closed(self) -> None:
        if self.open_blocks():
            raise RuntimeError(
                f"round {self.round.index} cannot end: blocks {sorted(self.open_blocks())} are not complete"
            )
        self._received.clear()

    def _note_position(self) -> None:
        """Write down where the run stands, for a later start."""
        now = self.round
        self._position = {
            "exchange": [now.index, now.exchange],
            "assigned": now.assigned,
            "given_up": sorted(now.given_up),
            "changed": sorted(now.changed),
            "closed": now.closed if self.exchange.begins else {},
            "bytes_down": now.bytes_down,
            "held": sorted(self._held),
            "facts": copy.deepcopy(self._facts),
        }
        self._journal.begin(self._position)
        self.resumed = self.resumed and set()
        self._stand()

    @property
    def _standing(self) -> Standing:
        now, finished = self.round, frozenset(self.resumed or ())
        return Standing(now.index, now.exchange, now.assigned, frozenset(now.given_up), finished)

    def fold_elsewhere(self, intake: Any) -> None:
        """Let others take uploads in from now on, of which nothing has come yet.

        Args:
            intake: has `stand` and `close` of `Intake`.
        """
        self._intake = intake
        self._stand()

    def _stand(self) -> None:
        """Tell those who take uploads in where the run stands."""
        self._intake.stand(self._standing)

    def _restored(self) -> set[int] | None:
        """Go on where an earlier start stood; the blocks that it has finished.

        Raises:
            ModelError: what it wrote is damaged.
        """
        found = self._journal.restored()
        try:
            if found is None or not self.settings.secure_sums:
                return None if found is None else self._stand_at(*found)
            self._stand_at(_at_first_exchange(found[0]), {})
            self._begin_hidden()
            self._note_position()
            return set()
        except BROKEN as error:
            raise self._journal.damaged(error) from error

    def _stand_at(self, position: dict[str, Any], finished: Mapping[int, dict[str, Any]]) -> set[int]:
        """Take over what was written down."""
        require_of_run(position, finished, self.context.layout.pruned, len(self.exchanges))
        self._position = position
        index, exchange = position["exchange"]
        closed = {int(block): names for block, names in position["closed"].items()}
        closed |= {block: record["closed"] for block, record in finished.items()}
        self.round = Round(
            index,
            {
                client: [block for block in blocks if client not in position["given_up"] or block in finished]
                for client, blocks in position["assigned"].items()
            },
            exchange,
            set(position["changed"]) | {block for block, record in finished.items() if record["last"]},
            closed,
            set(position["given_up"]),
            position["bytes_down"],
        )
        self._facts = {int(block): facts for block, facts in position["facts"].items()}
        self._facts |= {block: record["facts"] for block, record in finished.items() if not record["last"]}
        self._held = {(block, name) for block, name in position["held"]}
        self._replaced = {(block, name) for block, record in finished.items() for name in record["made"]}
        self._received.update(
            (client, block, unit)
            for block in finished
            for client in self.round.clients_of(block)
            for unit in self._units(block)
        )
        return set(finished)

    def held(self, limit: int) -> list[Piece]:
        """All that clients were sent before the exchange that is on and need in it or later, in pieces.

        Raises:
            ConfigError: one matrix exceeds the limit.
        """
        pieces = self.pieces.before(self.round.exchange, self._held, limit)
        self._note_sent(pieces)
        return pieces

    def receive(self, client: str, update: Any, samples: int, said: str = "") -> Receipt:
        """Check and fold one upload, or take note of one that was folded elsewhere.

        Args:
            client: who sent it.
            update: what arrived, `{}` for a message without matrices, or the receipt of it.
            samples: calibration windows of the client.
            said: what it says of keys of secure sums.

        Returns:
            What it was.

        Raises:
            UpdateError: the upload is not what was assigned, and nothing of it was folded; or, with `cumulative`, the
                sums of all rounds leave their range.
            FederationError: a part of it was refused elsewhere.
        """
        self._standing.require_expected(client)
        if self._hidden is not None and self.exchange.speaks:
            self._hidden.hear(self.exchange.up, client, said)
        if isinstance(update, Mapping) and not update:
            return Receipt(nbytes=len(said))
        if self._hidden is not None and self.exchange.hidden:
            return self._receive_hidden(self._hidden, client, update, samples, said)
        receipt = update if isinstance(update, Receipt) else self._intake.take(client, update, samples)
        if receipt.refused:
            raise FederationError(
                f"{receipt.refused}; other parts of it are in the sums of fold ranks already, and cannot be taken out: run "
                "again with server_configs.fold_ranks: 0, or without this client"
            )
        for (block, unit), reached in receipt.units.items():
            self._came(client, block, unit, reached)
        return receipt

    def _receive_hidden(self, hidden: Sums, client: str, update: Any, samples: int, said: str) -> Receipt:
        """Take an upload that tells nothing by itself."""
        _, checked, _ = self._intake.checked(client, update, samples)
        hidden.require_view(client, said, self._sent.view(self.round.index, self.round.exchange))
        hidden.add(client, self.round.exchange, {(block, name): one.words for block, name, one in checked})
        self._received.update((client, block, name) for block, name, _ in checked)
        return Receipt({}, update_nbytes(update), block_nbytes(update))

    def give_up(self, client: str) -> None:
        """Expect nothing more from a client in this round; what it has sent counts, unit by unit.

        Units that lacked only its part are finished. A block of which some units can no longer come stays as it was.
        """
        self.round.given_up.add(client)
        sent = self._received.blocks_of(client)
        mine = [block for block in self.round.assigned.get(client, []) if block in sent]
        self.round = replace(self.round, assigned={**self.round.assigned, client: mine})
        self._stand()
        for (block, unit), missing in list(self._open.items()):
            missing.discard(client)
            if not missing:
                self._close(block, unit)
        for block in [block for block in self._closed if not self._can_be_finished(block)]:
            del self._closed[block], self._ready[block], self._facts[block]
        self._position["given_up"] = sorted(self.round.given_up)
        self._journal.amend(self._position)

    def _can_be_finished(self, block: int) -> bool:
        return any(self.owes(client, block) for client in self.round.assigned)

    @property
    def _fold(self) -> Fold:
        return self._folds[self.round.exchange]

    def _units(self, block: int) -> tuple[str, ...]:
        """What a client sends of a block in this exchange."""
        return self.exchange.units_of(block, self._fold.units(block))

    def open_blocks(self) -> set[int]:
        """Blocks of which some client sent a unit and something is still missing."""
        return {block for block, _ in self._open} | set(self._closed)

    def owes(self, client: str, block: int) -> bool:
        """Whether a unit of a block that was assigned to a client has not come yet."""
        expected = client not in self.round.given_up and block in self.round.assigned.get(client, [])
        return expected and any((client, block, name) not in self._received for name in self._units(block))

    def check_complete(self, client: str) -> None:
        """Refuse to end an exchange for a client that owes something.

        Raises:
            UpdateError: names the first unit that is missing.
        """
        for block in self.round.assigned[client]:
            for unit in self._units(block):
                if (client, block, unit) not in self._received:
                    raise UpdateError(f"client {client} ended round {self.round.index} without block {block}, {unit}")

    def changes(self, limit: int) -> list[Piece]:
        """What goes down after this exchange, the matrices or masks made in it, in pieces of at most `limit` bytes.

        Raises:
            ConfigError: one matrix exceeds the limit.
        """
        if self.exchange.down is None:
            return []
        made = {(block, name) for block, names in self.round.closed.items() for name in names}
        if self._down_store == GLOBAL:
            self._held |= made
        pieces = self.pieces.of_exchange(self.round.index, self.round.exchange, made, limit)
        self._note_sent(pieces)
        return pieces

    def _note_sent(self, pieces: Iterable[Piece]) -> None:
        """Note what goes down to clients of secure sums."""
        for piece in pieces if self._hidden is not None else ():
            self._sent.note(self.pieces.load(piece))

    def final(self, client: str, limit: int) -> list[Piece]:
        """What a client lacks of the finished model, or of its own where each has one, in pieces.

        Raises:
            ConfigError: one matrix exceeds the limit.
        """
        own = registry.find(self.settings.algorithm).store_of(client)
        return self.pieces.of_store(own or GLOBAL, set() if own else self._held, self.settings.rounds, limit)

    def store(self, name: str) -> PackedStore:
        """The packed blocks of a store: the global model, masks, or a comparison: `fedavg` or `standalone/CLIENT`."""
        return Latest(self.folder, name)

    def _came(self, client: str, block: int, unit: str, reached: bool) -> None:
        """A client has sent a unit; close it if it was the last."""
        self._received.add((client, block, unit))
        if not reached:
            self._note(block, {}, {"left_out": 1})
        missing = self._open.setdefault((block, unit), self.round.clients_of(block) - self.round.given_up)
        missing.discard(client)
        if not missing:
            self._close(block, unit)

    def _close(self, block: int, unit: str) -> None:
        """Make matrices of the sums of a unit."""
        del self._open[block, unit]
        self._file(block, unit, *self._intake.close(block, unit), len(self._units(block)))

    def _file(self, block: int, unit: str, stores: Stores, facts: Mapping[str, int], units: int) -> None:
        """Keep what was made of a unit until all units of its block are there, and finish the block then."""
        ready = self._ready.setdefault(block, {})
        for store, linears in stores.items():
            ready.setdefault(store, {}).update(linears)
        self._note(block, stores.get(GLOBAL, {}), facts)
        closed = self._closed.setdefault(block, set())
        closed.add(unit)
        if len(closed) == units:
            self._finish_block(block)

    def _note(self, block: int, linears: Mapping[str, Packed], facts: Mapping[str, int]) -> None:
        """Add to what the report says of a block."""
        noted = self._facts.setdefault(block, {"zeros": 0, "zeros_before_expansion": 0, "over_target": 0})
        for name, count in facts.items():
            noted[name] = noted.get(name, 0) + count
        for name, packed in linears.items() if not self.exchange.recovers else ():  # its zeros were counted before
            zeros = packed.entries - packed.kept
            noted["zeros"] += zeros
            noted["over_target"] += max(0, zeros - self.context.target(block, name).zeros(packed.entries))

    def _finish_block(self, block: int) -> None:
        """Store what this exchange made of a block."""
        del self._closed[block]
        made = self._ready.pop(block)
        for store, linears in made.items():
            before = self.store(store).get(block) or {}
            PackedStore(self._journal.making(block) / store).save(block, before | linears)
        closed = list(made.get(self._down_store or "", ()))
        self.round.closed.setdefault(block, []).extend(closed)
        self._replaced |= {(block, name) for name in made.get(GLOBAL, ())}
        later = self.exchanges[self.round.exchange + 1 :]
        last = not (self.exchange.recovers or any(one.concerns(block) and not one.recovers for one in later))
        if last:
            self.round.changed.add(block)
            self.on_event(
                {
                    "event": "block",
                    "round": self.round.index,
                    "block": block,
                    "of": len(self.context.layout.pruned),
                    "clients": sorted(self.round.clients_of(block)),
                    **self._facts[block],
                }
            )
        record = {"closed": closed, "made": list(made.get(GLOBAL, ())), "last": last}
        self._journal.finish(block, record | {"facts": self._facts.get(block, {})})
        if last:
            del self._facts[block]

    @property
    def _down_store(self) -> str | None:
        return DOWN[self.exchange.down] if self.exchange.down else None


def _at_first_exchange(position: dict[str, Any]) -> dict[str, Any]:
    """A round of secure sums is begun anew with other keys: masks are used once."""
    return {**position, "exchange": [position["exchange"][0], 0], "closed": {}, "facts": {}}
