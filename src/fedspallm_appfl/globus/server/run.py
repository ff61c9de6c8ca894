"""Run clients at other institutions over Globus Compute: the server here, each client as a task at its endpoint.

A task makes the messages of one exchange; for FedSpaLLM that is a round. The scheduler gets them message by message, a
client's next one once the previous one is answered. The server thus holds the sums of few blocks, although
clients send a whole round at once.

An exchange ends when `min_clients` have answered, `round_deadline` has passed, or no client is left to wait for. Clients
that have not answered by then, have failed, or have sent something not assigned, are left out of the round: the blocks
that others sent are aggregated without them.
"""

import logging
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedspallm_appfl.errors import DataStoreError
from fedspallm_appfl.events import OnEvent
from fedspallm_appfl.globus.server import ledger
from fedspallm_appfl.globus.server.ledger import Ledger
from fedspallm_appfl.globus.server.measuring import measure
from fedspallm_appfl.globus.server.turn import Turn
from fedspallm_appfl.globus.store.data_store import DataStore, open_store
from fedspallm_appfl.globus.store.places import placed
from fedspallm_appfl.models.storage.checkpoint import model_hash
from fedspallm_appfl.rounds.participants import client_settings
from fedspallm_appfl.settings.schema import Client, Config

Unit = tuple[str | None, str, str]
logger = logging.getLogger(__name__)


class Connection:
    """The state that a run and its preflight share.

    Attributes:
        config: the experiment, as `rules.prepared_for_globus` makes it.
        run: the run's name in the data store.
        wire: sends tasks and receives results.
        store: the data store; None if everything is sent with the tasks.
        ledger: what is written down for a later start, once the run has a folder.
    """

    ledger: Ledger

    def __init__(
        self, config: Config, wire: Any, store: DataStore | None, run: str, dense: str, state: Path | None = None
    ) -> None:
        self.config = config
        self._state = state
        self.wire = wire
        self.store = store
        self.run = run
        self._dense = dense
        self._places: dict[str, dict[str, Any]] = {}

    def request(
        self, client: Client, reads: list[str], writes: list[str], seconds: float | None = None
    ) -> dict[str, Any]:
        """The request of every task of a client.

        Args:
            client: the client.
            reads: names of the objects in the store that it reads.
            writes: names of the objects that it may write.
            seconds: how long it may do so; None for the maximum.
        """
        from omegaconf import OmegaConf

        from fedspallm_appfl.adaptors.agents import client_agent_config

        limit = self.config.client_configs.comm_configs.max_message_bytes
        settings = client_settings(self.config, client, client.train_configs.devices, limit)
        settings.model.hash = self._dense
        agent: Any = OmegaConf.to_container(client_agent_config(settings), resolve=True)
        del agent["train_configs"]["comm"]["store"]  # the worker opens it
        store = self.store.lend(reads, writes, seconds) if self.store else {"connector": "none"}
        return {"client": client.client_id, "config": agent, "store": store, "run": self.run, "names": writes}

    def place(self, payload: Any, name: str) -> dict[str, Any]:
        """Place a payload for clients; it stays until the run ends or `remove` is called."""
        return placed(payload, self.store, name)

    def place_once(self, name: str, make: Callable[[], Any]) -> dict[str, Any]:
        """Place a payload for several clients at the first call for its name."""
        if name not in self._places:
            self._places[name] = self.place(make(), name)
        return self._places[name]

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects of the store that are there."""
        if self.store is None:
            return
        for name in names:
            try:
                self.store.evict(name)
            except DataStoreError as error:  # the end of the run may remove it with the rest
                logger.warning("%s", error)

    def note(self) -> None:
        """Write down which tasks are out."""
        self.ledger.note(self.wire.task_ids(), self.store.names if self.store else ())

    def close(self) -> None:
        """Close everything, and remove what is left in the store, unless the run was cut off and may go on."""
        busy = ", ".join(sorted(self.wire.busy()))
        if busy:
            logger.warning("a task may still be running at %s; its endpoint accepts no other work until it ends", busy)
        try:
            self.wire.shutdown_all_clients()
        finally:
            if self.store and self._state and ledger.read(self._state):
                self.store.close()
            elif self.store:
                _clear(self.store)


def _clear(store: DataStore) -> None:
    """Remove the objects of a run; a failure to do so must not hide the result or error of the run."""
    try:
        store.close(clear=True)
    except DataStoreError as error:
        logger.warning("%s; objects of the run %s may be left", error, store.run)


@contextmanager
def connected(config: Config, state: Path | None = None, resume: bool = False) -> Iterator[Connection]:
    """Log in to Globus Compute and open the data store.

    Args:
        config: the experiment.
        state: folder of the server's state, where an earlier start may have left its ledger; None if there is none.
        resume: a run that was cut off goes on, with what it has in the store; else that is removed.

    Raises:
        FederationError: the service cannot be used.
        DataStoreError: the store cannot be reached.
    """
    from fedspallm_appfl.adaptors import registration
    from fedspallm_appfl.models.storage.checkpoint import resolve_model

    registration.register()
    from fedspallm_appfl.globus.server.communicator import GlobusServer

    dense = model_hash(resolve_model(config.model.path))
    run, store = _store_of(config, state, resume)
    try:
        endpoints = {client.client_id: str(client.endpoint_id) for client in config.clients}
        patience = config.server_configs.connection_deadline
        wire = GlobusServer(endpoints, vars(config.server_configs.functions), patience)
    except BaseException:
        if store:
            _clear(store)
        raise
    connection = Connection(config, wire, store, run, dense, state)
    try:
        yield connection
    finally:
        connection.close()


def _store_of(config: Config, state: Path | None, resume: bool) -> tuple[str, DataStore | None]:
    """A run's name and its data store: those of a run that goes on, or new ones."""
    settings = vars(config.client_configs.comm_configs.store)
    before = ledger.read(state) if state else None
    run = before["run"] if before and resume else uuid.uuid4().hex
    if before and not resume and (old := open_store(settings, before["run"], create=True)):
        old.names.update(before["objects"])
        _clear(old)
    store = open_store(settings, run, create=True)
    if before and resume and store:
        store.names.update(before["objects"])
    return run, store


def registered_functions() -> dict[str, str]:
    """Register the functions of this version with Globus Compute; look_around and prune -> id.

    Raises:
        FederationError: the service cannot be used.
    """
    from fedspallm_appfl.globus.server.communicator import GlobusServer

    wire = GlobusServer({})
    try:
        return wire.register()
    finally:
        wire.shutdown_all_clients()


def run(config: Config, state_dir: Path, on_event: OnEvent, connection: Connection) -> Any:
    """Run all rounds.

    Args:
        config: the experiment, which from now on is the connection's too.
        state_dir: folder for the server's packed blocks and sums.
        on_event: called with a dict for each event.
        connection: to the clients.

    Returns:
        The aggregator, with the global model in it.

    Raises:
        FederationError: too few clients answered in a round.
    """
    from fedspallm_appfl.adaptors import registration

    registration.register()
    from fedspallm_appfl.adaptors.agents import server_agent

    registration.freeze()
    connection.config = config
    server = server_agent(config, state_dir)
    server.aggregator.on_event = on_event
    server.scheduler.spare_others = True
    connection.ledger = Ledger(state_dir, connection.run)
    kinds = [exchange.down for exchange in server.aggregator.global_model.exchanges]
    down = Downlink(connection, kinds, f"down.{connection.ledger.starts}")  # tasks of an earlier start read its own
    pieces = server.get_parameters(serial_run=True)[1].get("held", 0)
    down.add(server.get_parameters(init_model=False, held=number)[0] for number in range(pieces))
    instructions: dict[str, Any] = {}
    while not server.training_finished():
        answers = Turn(connection, server, on_event).run(down.places, instructions)
        payload = next(iter(answers.values()))[0]
        if not server.training_finished():
            down.add(_all_pieces(server, payload))
        instructions = {client: metadata for client, (_, metadata) in answers.items()}
    measure(connection, server, down.places, on_event)
    return server.aggregator


def _all_pieces(server: Any, first: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The pieces that go down, with one in memory at a time."""
    yield first
    for piece in range(1, first.get("pieces", 1)):
        yield server.get_parameters(init_model=False, piece=piece)[0]


class Downlink:
    """The payloads that clients load before they start: all that went down so far, except what was replaced since.

    The server does not know what a worker has kept, so each task gets the places of all payloads.

    Attributes:
        places: where the payloads are, in the order of loading.
    """

    def __init__(self, connection: Connection, kinds: Sequence[str | None], name: str = "down") -> None:
        """Nothing has gone down.

        Args:
            connection: to the clients.
            kinds: what each exchange sends down.
            name: what names of objects begin with.
        """
        self._name = name
        self._kinds = kinds
        self.places: list[dict[str, Any]] = []
        self._units: list[set[Unit]] = []
        self._connection = connection
        self._made = 0

    def add(self, payloads: Iterable[Any]) -> None:
        """Place payloads, and remove earlier ones whose matrices are all replaced."""
        fresh = []
        for payload in payloads:
            if payload:
                place = self._connection.place(payload, f"{self._name}.{self._made}")
                fresh.append((place, self._units_of(payload)))
                self._made += 1
        newer: set[Unit] = set().union(*(units for _, units in fresh))
        kept = [(p, u) for p, u in zip(self.places, self._units, strict=True) if not u or u - newer]
        gone = {p["stored"] for p in self.places if "stored" in p} - {p.get("stored") for p, _ in kept}
        self.places, self._units = [p for p, _ in kept + fresh], [u for _, u in kept + fresh]
        self._connection.remove(gone)

    def _units_of(self, payload: Mapping[str, Any]) -> set[Unit]:
        """The (kind, block, linear) of a payload: masks do not replace weights."""
        kind = self._kinds[payload.get("exchange", 0)]
        return {(kind, block, linear) for block, linears in payload.get("blocks", {}).items() for linear in linears}
