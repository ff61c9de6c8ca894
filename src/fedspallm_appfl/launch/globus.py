"""Run the clients at other institutions over Globus Compute: the server here, each client a task at its endpoint.

A task makes the messages of one exchange; for FedSpaLLM that is a round. What has arrived is fed to the scheduler message
by message, each client's next one once the one before is answered, so that the server holds sums of few blocks although
clients answer with a whole round at once.

An exchange ends when `min_clients` have answered, or `round_deadline` has passed, or nobody is left to wait for. Clients
that have not answered by then, have failed, or have sent what was not assigned, are given up for the round: the blocks
that others sent are aggregated without them.
"""

import dataclasses
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedspallm_appfl.config import Client, Config
from fedspallm_appfl.data_store import DataStore, open_store
from fedspallm_appfl.errors import DataStoreError, FederationError, UpdateError
from fedspallm_appfl.events import OnEvent
from fedspallm_appfl.launch.globus_results import Failure, Message, printable, read_result
from fedspallm_appfl.model_identity import model_hash

POLL = 1.0  # seconds between two looks at deadlines
Unit = tuple[int, str, str]


class Connection:
    """What a run and its preflight share.

    Attributes:
        config: the experiment, as `globus_rules.prepared` makes it.
        run: the run's name in the data store.
        wire: sends tasks and takes results.
        store: the data store; None if everything travels with the tasks.
    """

    def __init__(self, config: Config, wire: Any, store: DataStore | None, run: str, dense: str) -> None:
        self.config = config
        self.wire = wire
        self.store = store
        self.run = run
        self._dense = dense

    def request(self, client: Client, name: str) -> dict[str, Any]:
        """What every task of a client is told.

        Args:
            client: the client.
            name: what the objects that it places are called; a message's number is added.
        """
        from omegaconf import OmegaConf

        from fedspallm_appfl.appfl_adaptors.agents import client_agent_config

        limit = self.config.client_configs.comm_configs.max_message_bytes
        made = client_agent_config(self.config, client, client.train_configs.device, limit)
        agent: Any = OmegaConf.to_container(made, resolve=True)
        agent["train_configs"]["model"]["hash"] = self._dense
        store = vars(client.comm_configs.store)
        return {"client": client.client_id, "config": agent, "store": store, "run": self.run, "name": name}

    def place(self, payload: Any, name: str) -> dict[str, Any]:
        """Place a payload for clients; it stays until the run ends or `remove` is called."""
        from fedspallm_appfl.appfl_adaptors.globus_worker import placed

        return placed(payload, self.store, name)

    def remove(self, names: set[str]) -> None:
        """Remove objects of the store that are there."""
        for name in names if self.store else ():
            self.store.evict(name)  # type: ignore[union-attr]

    def close(self) -> None:
        """Let go of everything, and remove what is left in the store."""
        self.wire.shutdown_all_clients()
        if self.store:
            self.store.close(clear=True)


@contextmanager
def connected(config: Config) -> Iterator[Connection]:
    """Log in to Globus Compute and open the data store.

    Raises:
        FederationError: the service cannot be used.
        DataStoreError: the store cannot be reached.
    """
    from fedspallm_appfl.appfl_adaptors import registration
    from fedspallm_appfl.checkpoint_files import resolve_model

    registration.register()
    from fedspallm_appfl.appfl_adaptors.globus_communicator import GlobusServer

    run = uuid.uuid4().hex
    dense = model_hash(resolve_model(config.model.path))
    store = open_store(vars(config.client_configs.comm_configs.store), run, create=True)
    try:
        wire = GlobusServer({client.client_id: str(client.endpoint_id) for client in config.clients})
    except BaseException:
        if store:
            store.close(clear=True)
        raise
    connection = Connection(config, wire, store, run, dense)
    try:
        yield connection
    finally:
        connection.close()


def run(config: Config, connection: Connection, state_dir: Path, on_event: OnEvent) -> Any:
    """Run all rounds.

    Args:
        config: the experiment.
        connection: to the clients.
        state_dir: folder for the server's packed blocks and sums.
        on_event: called with a dict for each thing that happens.

    Returns:
        The aggregator, with the global model in it.

    Raises:
        FederationError: too few clients answered in a round.
    """
    from fedspallm_appfl.appfl_adaptors import registration

    registration.register()
    from fedspallm_appfl.appfl_adaptors.agents import server_agent

    registration.freeze()
    server = server_agent(config, state_dir)
    server.aggregator.on_event = on_event
    server.scheduler.spare_others = True
    down = Downlink(connection)
    instructions: dict[str, Any] = {}
    number = 0
    while not server.training_finished():
        exchange = Exchange(connection, server, on_event, number)
        answers = exchange.run(down.places, instructions)
        payload = next(iter(answers.values()))[0]
        if not server.training_finished():
            pieces = range(1, payload.get("pieces", 1))
            down.add(payload, *(server.get_parameters(init_model=False, piece=piece)[0] for piece in pieces))
        instructions = {client: metadata for client, (_, metadata) in answers.items()}
        number += 1
    return server.aggregator


class Downlink:
    """What the clients have to load before they start: all that went down so far, less what was replaced since.

    A client keeps nothing between two tasks, so each of them is told where everything lies.

    Attributes:
        places: where the payloads are, in the order in which they have to be loaded.
    """

    def __init__(self, connection: Connection) -> None:
        self.places: list[dict[str, Any]] = []
        self._units: list[set[Unit]] = []
        self._connection = connection
        self._made = 0

    def add(self, *payloads: Any) -> None:
        """Place payloads and remove those all of whose matrices came again."""
        fresh = [payload for payload in payloads if payload]
        newer: set[Unit] = set().union(*map(_units, fresh))
        kept = [(p, u) for p, u in zip(self.places, self._units, strict=True) if not u or u - newer]
        gone = {p["stored"] for p in self.places if "stored" in p} - {p.get("stored") for p, _ in kept}
        for payload in fresh:
            kept.append((self._connection.place(payload, f"down.{self._made}"), _units(payload)))
            self._made += 1
        self.places, self._units = [p for p, _ in kept], [u for _, u in kept]
        self._connection.remove(gone)


def _units(payload: Mapping[str, Any]) -> set[Unit]:
    """The (exchange, block, linear) of a payload: masks do not take the place of weights."""
    exchange = payload.get("exchange", 0)
    return {(exchange, block, linear) for block, linears in payload.get("blocks", {}).items() for linear in linears}


class Exchange:
    """One task of every client and what becomes of it."""

    def __init__(self, connection: Connection, server: Any, on_event: OnEvent, number: int) -> None:
        self._connection = connection
        self._config = connection.config
        self._server = server
        self._on_event = on_event
        self._number = number
        self._round = server.aggregator.round
        self._arrived: dict[str, deque[tuple[str, Message]]] = {}
        self._answers: dict[str, Future] = {}
        self._given_up = dict.fromkeys(server.aggregator.given_up(), "it was given up in an earlier exchange")

    def run(self, down: list[dict[str, Any]], instructions: Mapping[str, Any]) -> dict[str, tuple[Any, dict]]:
        """Send the tasks, fold what comes back, end when it is time.

        Args:
            down: where the payloads lie that clients load first.
            instructions: client -> what the server told it last.

        Returns:
            Client -> (payload, metadata) of the server's answer to its last message.

        Raises:
            FederationError: too few have answered.
        """
        self._send(down, instructions)
        deadline = time.monotonic() + (self._config.server_configs.round_deadline or float("inf"))
        while self._waiting() and not self._enough() and time.monotonic() < deadline:
            left = deadline - time.monotonic()
            outcome = self._connection.wire.recv_result_from_one_client(timeout=max(0.0, min(POLL, left)))
            if outcome is not None:
                self._take(outcome)
                self._feed()
        why = "it had not answered when enough others had" if self._enough() else "it had not answered in time"
        self._require_quorum()
        for client in sorted(self._waiting()):
            self._give_up(client, Failure(why))
        self._feed()
        self._require_quorum()
        return {client: future.result(timeout=0) for client, future in self._answers.items()}

    def _send(self, down: list[dict[str, Any]], instructions: Mapping[str, Any]) -> None:
        busy = self._connection.wire.busy()
        for client in self._config.clients:
            name = client.client_id
            if name in self._given_up:
                continue
            if name in busy:
                self._give_up(name, Failure("it is still at work on an earlier round"))
                continue
            told = instructions.get(name) or self._server.get_parameters(serial_run=True, client_id=name)[1]
            request = self._connection.request(client, f"{name}.{self._number}") | {"down": down, "instructions": told}
            try:
                self._connection.wire.send_task_to_one_client(name, "prune", metadata=request)
            except FederationError as error:
                self._give_up(name, Failure(str(error)))

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
        if client in self._given_up:  # of an earlier exchange, or too late for this one
            self._discard(request, outcome.result)
            return
        read: list[Message] | Failure = Failure(printable(outcome.problem), printable(outcome.details))
        if outcome.result is not None:
            try:
                read = read_result(client, outcome.result)
            except UpdateError as error:
                read = Failure(str(error))
        if isinstance(read, Failure):
            self._give_up(client, read)
        else:
            self._arrived[client] = deque((_object_name(request, n), message) for n, message in enumerate(read))

    def _feed(self) -> None:
        """Give the scheduler every message that may go on."""
        while ready := [client for client in self._arrived if self._may_go_on(client)]:
            for client in ready:
                self._feed_one(client, *self._arrived[client].popleft())

    def _may_go_on(self, client: str) -> bool:
        return bool(self._arrived[client]) and (client not in self._answers or self._answers[client].done())

    def _feed_one(self, client: str, name: str, message: Message) -> None:
        from fedspallm_appfl.appfl_adaptors.globus_worker import fetched

        place = {**message.place, "stored": name} if "stored" in message.place else message.place
        try:
            payload = fetched(place, self._connection.store, f"client {client}")
            self._connection.remove({name})
            answer = self._server.global_update(client, payload, blocking=False, **message.metadata)
            self._answers[client] = answer
        except (UpdateError, DataStoreError) as error:
            self._give_up(client, Failure(str(error), host=message.metadata["host"]))

    def _give_up(self, client: str, failure: Failure) -> None:
        """Go on without a client for the rest of the round."""
        self._given_up[client] = failure.why
        self._connection.remove({name for name, _ in self._arrived.pop(client, ())})
        self._answers.pop(client, None)
        what = {"event": "absent", "round": self._round, "client": client}
        self._on_event(what | dataclasses.asdict(failure))
        self._server.scheduler.give_up(client)

    def _discard(self, request: Mapping[str, Any], result: Any) -> None:
        """Remove what a task has placed whose result nobody waits for."""
        messages = result.get("messages") if isinstance(result, dict) else None
        if isinstance(messages, list):
            self._connection.remove({_object_name(request, number) for number in range(len(messages))})


def _object_name(request: Mapping[str, Any], number: int) -> str:
    from fedspallm_appfl.appfl_adaptors.globus_worker import object_name

    return object_name(request["name"], number)
