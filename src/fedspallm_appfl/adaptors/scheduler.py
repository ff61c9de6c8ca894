"""APPFL scheduler that streams: every upload is folded on arrival and answered as soon as the client may go on.

A message in the middle of an exchange is answered at once, unless more than `max_open_blocks` blocks have sums in memory
and the client owes none of them anything; then it waits until one of those that it sent to is complete. A client on whom
an open block still waits is always let on, so nothing can lock up, also where a block is split over messages. The last
message of an exchange is answered when all clients have sent theirs.

If anything fails, every waiting client gets the error; APPFL's own scheduler would leave them hanging. A launcher that can
go on without a client sets `spare_others` and calls `give_up`, or `leave_out` where the client waits for an answer.
"""

import threading
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from appfl.algorithm.scheduler import BaseScheduler

from fedspallm_appfl.adaptors.aggregator import FedSpaLLMAggregator
from fedspallm_appfl.errors import FederationError, UpdateError
from fedspallm_appfl.rounds.folds.intake import Receipt


def _blocks_of(update: Any) -> set[int]:
    """Blocks of which a message, or one that was folded elsewhere, has something."""
    return update.blocks if isinstance(update, Receipt) else {int(block) for block in update.get("blocks", {})}


class FedSpaLLMScheduler(BaseScheduler):
    """Fold on arrival, one barrier an exchange.

    Attributes:
        spare_others: an upload that is refused fails for its client alone.
        all_attend: clients that are left out wait for the end of each exchange as well, and none ends before they do: who
            comes late would be taken for one that fails in the next round.
        least: clients that must take part, for `leave_out`.
    """

    aggregator: FedSpaLLMAggregator

    def __init__(self, scheduler_configs: Any, aggregator: FedSpaLLMAggregator, logger: Any) -> None:
        super().__init__(scheduler_configs, aggregator, logger)
        self.max_open_blocks = int(scheduler_configs.get("max_open_blocks", 2))
        self._lock = threading.Lock()
        self._held: dict[str, tuple[Future, set[int]]] = {}
        self._at_barrier: dict[str, Future] = {}
        self._open: set[int] = set()  # blocks, when all who are held were last looked at
        self.spare_others = self.all_attend = False
        self.least = 1

    def schedule(self, client_id: str | int, local_model: Any, **kwargs: Any) -> Future:
        """Take one message of one client.

        Args:
            client_id: who sent it.
            local_model: the payload.
            **kwargs: its metadata.

        Returns:
            A future of (payload, metadata) for that client.

        Raises:
            UpdateError: the message is not what was assigned; all waiting clients get the same error, unless they are
                to be spared.
        """
        client = str(client_id)
        future: Future[tuple[dict, dict]] = Future()
        with self._lock:
            try:
                if self.aggregator.receive(client, local_model, kwargs):
                    self._at_barrier[client] = future
                else:
                    self._held[client] = (future, _blocks_of(local_model))
                self._go_on()
            except BaseException as error:
                if not (self.spare_others and isinstance(error, UpdateError)):
                    self._fail(error)
                raise
        return future

    def give_up(self, client: str) -> None:
        """Go on without a client for the rest of the round: nobody waits for it, what it has sent counts."""
        with self._lock:
            self._held.pop(client, None)
            self._at_barrier.pop(client, None)
            self.aggregator.give_up(client)
            self._go_on()

    def leave_out(self, client: str, why: Mapping[str, str], waits: bool) -> Future:
        """Go on without a client that failed, and that goes on in the next round.

        Args:
            client: who failed.
            why: facts for the event.
            waits: it has nothing more to do before the exchange has ended; else it is answered at once.

        Returns:
            A future of (payload, metadata) for it.

        Raises:
            FederationError: fewer clients are left than must take part.
        """
        future: Future[tuple[dict, dict]] = Future()
        with self._lock:
            if client not in self.aggregator.given_up():
                self.aggregator.give_up(client)
                self.aggregator.on_event({"event": "absent", "round": self.aggregator.round, "client": client, **why})
                self._require_enough(client, why)
            self._held.pop(client, None)
            if waits:
                self._at_barrier[client] = future
            else:
                future.set_result(({}, {"left_out": True}))
            self._go_on()
        return future

    def _require_enough(self, client: str, why: Mapping[str, str]) -> None:
        every, absent = self.aggregator.settings.roster, self.aggregator.given_up()
        if len(every) - len(absent) < self.least:
            error = FederationError(
                f"round {self.aggregator.round + 1}: {len(every) - len(absent)} of {len(every)} clients are left, at least "
                f"{self.least} must take part (server_configs.min_clients); the last that failed is {client}: {why['why']}"
            )
            self._fail(error)
            raise error

    def _go_on(self) -> None:
        """End the exchange if everybody has, and answer who may go on."""
        here = not self.all_attend or self.aggregator.given_up() <= self._at_barrier.keys()
        ended = self.aggregator.end_exchange() if here and self.aggregator.all_ended() else None
        self._release()
        if ended is not None:
            self._answer_all(ended)

    def get_num_global_epochs(self) -> int:
        """Rounds that are done."""
        return self.aggregator.round

    def get_parameters(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """First instructions of a client. No barrier: there are no initial weights that would have to be equal."""
        return self.aggregator.get_parameters(**kwargs)

    def _release(self) -> None:
        """Answer who may go on: all are looked at when blocks were opened or closed, else the last alone."""
        model = self.aggregator.global_model
        open_blocks = model.open_blocks()
        held = list(self._held.items()) if open_blocks != self._open else list(self._held.items())[-1:]
        self._open = open_blocks
        for client, (future, sent) in held:
            owes = any(model.owes(client, block) for block in open_blocks)
            if len(open_blocks) <= self.max_open_blocks or not sent & open_blocks or owes:
                del self._held[client]
                future.set_result(({}, {}))

    def _answer_all(self, changes: dict[str, Any]) -> None:
        waiting, self._at_barrier = self._at_barrier, {}
        for client, future in waiting.items():
            future.set_result((changes, self.aggregator.instructions([client])))

    def _fail(self, error: BaseException) -> None:
        waiting = [future for future, _ in self._held.values()] + list(self._at_barrier.values())
        self._held, self._at_barrier = {}, {}
        for future in waiting:
            future.set_exception(error)
