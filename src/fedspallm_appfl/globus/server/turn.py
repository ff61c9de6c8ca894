"""One exchange over Globus Compute: a task for every client, its result, and when to continue without a client."""

import dataclasses
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from fedspallm_appfl.errors import DataStoreError, FederationError, UpdateError
from fedspallm_appfl.events import OnEvent
from fedspallm_appfl.globus.server.outcome import Outcome
from fedspallm_appfl.globus.server.results import Failure, Message, read_result
from fedspallm_appfl.globus.store.places import fetched
from fedspallm_appfl.wire.metadata import printable

if TYPE_CHECKING:
    from fedspallm_appfl.globus.server.run import Connection

POLL = 1.0  # seconds between two checks of deadlines
REMIND = 300.0  # seconds without news
GRACE = 600.0  # seconds beyond the deadline that a site may use the data store, because clocks differ
DESCRIPTION = 2**24  # maximum bytes of a message besides its tensors


class Turn:
    """One task of every client and its outcome."""

    def __init__(self, connection: "Connection", server: Any, on_event: OnEvent) -> None:
        self._connection = connection
        self._config = connection.config
        self._server = server
        self._on_event = on_event
        self._model = server.aggregator.global_model
        self._round = server.aggregator.round
        self._name = f"{self._round}-{self._model.round.exchange}"
        self._planned: list[set[int]] = []  # blocks of each message
        self._folded: list[tuple[str, set[int]]] = []  # objects whose blocks may still be open, and these
        self._arrived: dict[str, deque[tuple[str, Message]]] = {}
        self._answers: dict[str, Future] = {}
        self._began = self._said = 0.0
        self._given_up = dict.fromkeys(server.aggregator.given_up(), "it was left out in an earlier exchange")

    def run(self, down: list[dict[str, Any]], instructions: Mapping[str, Any]) -> dict[str, tuple[Any, dict]]:
        """Send the tasks, fold the results, and end at the quorum or the deadline.

        Args:
            down: where the payloads are that clients load first.
            instructions: client -> the last instructions from the server.

        Returns:
            Client -> (payload, metadata) of the server's answer to its last message.

        Raises:
            FederationError: too few clients have answered.
        """
        self._began = time.monotonic()
        self._send(down, instructions)
        if self._waiting():
            self._say("sent", clients=sorted(self._waiting()))
        deadline = time.monotonic() + (self._config.server_configs.round_deadline or float("inf"))
        while self._waiting() and not self._enough() and time.monotonic() < deadline:
            self._remind()
            left = deadline - time.monotonic()
            outcome = self._connection.wire.recv_result_from_one_client(timeout=max(0.0, min(POLL, left)))
            self._connection.note()
            if outcome is not None:
                self._take(outcome)
                self._feed()
        why = "it had not answered when enough others had" if self._enough() else "it had not answered in time"
        self._require_quorum()
        for client in sorted(self._waiting()):
            self._give_up(client, Failure(why))
        self._feed()
        self._require_quorum()
        self._tidy()
        return {client: future.result(timeout=0) for client, future in self._answers.items()}

    def _send(self, down: list[dict[str, Any]], instructions: Mapping[str, Any]) -> None:
        busy, comm = self._connection.wire.busy(), self._config.client_configs.comm_configs
        planned = self._model.messages(comm.blocks_per_message, comm.max_message_bytes)
        self._planned = [{block for block, _ in units} for units in planned]
        self._connection.ledger.begin(self._name)
        reads = [place["stored"] for place in down if "stored" in place]
        deadline = self._config.server_configs.round_deadline
        for client in self._config.clients:
            name = client.client_id
            if name in self._given_up:
                continue
            if name in busy:
                self._give_up(name, Failure(self._why_busy(name)))
                continue
            told = instructions.get(name) or self._server.get_parameters(serial_run=True, client_id=name)[1]
            writes = [f"{name}.{self._name}.{message}" for message in range(len(planned))]
            try:
                request = self._connection.request(client, reads, writes, deadline and deadline + GRACE)
                self._ask(name, request | {"down": down, "instructions": told})
            except (FederationError, DataStoreError) as error:
                self._give_up(name, Failure(str(error)))

    def _ask(self, client: str, request: dict[str, Any]) -> None:
        """Send a task, unless an earlier start of the run has sent it."""
        ledger, wire = self._connection.ledger, self._connection.wire
        if (answer := ledger.answer(client)) is not None:
            self._take(Outcome(client, request, answer))
        elif client in ledger.tasks:
            wire.look_for(client, "prune", request, ledger.tasks[client])
        else:
            wire.send_task_to_one_client(client, "prune", metadata=request)

    def _say(self, event: str, **facts: Any) -> None:
        self._said = time.monotonic()
        self._on_event({"event": event, "round": self._round} | facts)

    def _remind(self) -> None:
        """Report from time to time which clients have not answered."""
        if time.monotonic() - self._said > REMIND:
            seconds = round(time.monotonic() - self._began)
            self._say("waiting", clients=sorted(self._waiting()), seconds=seconds)

    def _why_busy(self, client: str) -> str:
        """Why a client's earlier task has no answer; an offline endpoint has lost it, and can be asked again."""
        wire = self._connection.wire
        if wire.status_of(client) != "offline":
            return "it is still working on an earlier round"
        wire.forget(client)
        return "its endpoint is offline"

    def _waiting(self) -> set[str]:
        """Clients that may still answer."""
        return self._connection.wire.busy() - set(self._given_up) - set(self._arrived)

    def _enough(self) -> bool:
        return len(self._arrived) >= (self._config.server_configs.min_clients or len(self._config.clients))

    def _require_quorum(self) -> None:
        least = self._config.server_configs.min_clients or 1
        if len(self._arrived) < least:
            reasons = "".join(f"\n  - {client}: {why}" for client, why in sorted(self._given_up.items()))
            silent = "".join(f"\n  - {client}: no answer in time" for client in sorted(self._waiting()))
            raise FederationError(
                f"round {self._round + 1}: {len(self._arrived)} of {len(self._config.clients)} clients have answered, at "
                f"least {least} must (server_configs.min_clients, round_deadline){reasons}{silent}"
            )

    def _take(self, outcome: Any) -> None:
        """File what a task returned, or why it failed."""
        client, request = outcome.client, outcome.request
        if client in self._given_up:  # from an earlier exchange, or too late for this one
            self._connection.remove(request["names"])
            return
        read: list[Message] | Failure = Failure(printable(outcome.problem), printable(outcome.details))
        if outcome.result is not None:
            try:
                read = read_result(client, outcome.result, len(request["names"]))
            except UpdateError as error:
                read = Failure(str(error))
        if isinstance(read, Failure):
            self._connection.remove(request["names"])
            self._give_up(client, read)
        else:
            self._connection.ledger.keep(client, outcome.result)
            self._arrived[client] = deque(zip(request["names"], read, strict=True))
            self._say("answer", client=client, seconds=round(time.monotonic() - self._began, 1))

    def _feed(self) -> None:
        """Pass every message that is ready to the scheduler."""
        while ready := [client for client in self._arrived if self._may_go_on(client)]:
            for client in ready:
                self._feed_one(client, *self._arrived[client].popleft())

    def _may_go_on(self, client: str) -> bool:
        return bool(self._arrived[client]) and (client not in self._answers or self._answers[client].done())

    def _feed_one(self, client: str, name: str, message: Message) -> None:
        try:
            payload = self._payload(client, name, message)
            answer = self._server.global_update(client, payload, blocking=False, **message.metadata)
            self._answers[client] = answer
        except (UpdateError, DataStoreError) as error:
            self._give_up(client, Failure(str(error), host=message.metadata["host"]))

    def _payload(self, client: str, name: str, message: Message) -> Any:
        """What a message holds; nothing if all its blocks were finished before the run was cut off."""
        blocks = self._planned[message.metadata["_chunk_idx"]]
        if blocks and blocks <= (self._model.resumed or set()):
            return {}
        place = {**message.place, "stored": name} if "stored" in message.place else message.place
        most = self._config.client_configs.comm_configs.max_message_bytes + DESCRIPTION
        self._tidy()
        self._folded.append((name, blocks))
        return fetched(place, self._connection.store, f"client {client}", most)

    def _tidy(self) -> None:
        """Remove objects that nobody will read again: until its blocks are finished, a later start might."""
        open_ones = self._model.open_blocks()
        self._connection.remove({name for name, blocks in self._folded if not blocks & open_ones})
        self._folded = [(name, blocks) for name, blocks in self._folded if blocks & open_ones]

    def _give_up(self, client: str, failure: Failure) -> None:
        """Continue without a client for the rest of the round."""
        self._given_up[client] = failure.why
        self._connection.remove({name for name, _ in self._arrived.pop(client, ())})
        self._answers.pop(client, None)
        self._say("absent", client=client, **dataclasses.asdict(failure))
        self._server.scheduler.give_up(client)
