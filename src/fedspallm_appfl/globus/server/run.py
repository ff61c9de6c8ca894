"""Run the clients at other institutions over Globus Compute: the server here, each client a task at its endpoint.

A task makes the messages of one exchange; for FedSpaLLM that is a round. What has arrived is fed to the scheduler message
by message, each client's next one once the one before is answered, so that the server holds sums of few blocks although
clients answer with a whole round at once.

An exchange ends when `min_clients` have answered, or `round_deadline` has passed, or nobody is left to wait for. Clients
that have not answered by then, have failed, or have sent what was not assigned, are given up for the round: the blocks
that others sent are aggregated without them.
"""

import logging
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedspallm_appfl.errors import DataStoreError
from fedspallm_appfl.events import OnEvent
from fedspallm_appfl.globus.server.turn import Turn
from fedspallm_appfl.globus.store.data_store import DataStore, open_store
from fedspallm_appfl.globus.store.places import placed
from fedspallm_appfl.models.checkpoint import model_hash
from fedspallm_appfl.rounds.participants import client_settings
from fedspallm_appfl.settings.schema import Client, Config

Unit = tuple[int, str, str]
logger = logging.getLogger(__name__)


class Connection:
    """What a run and its preflight share.

    Attributes:
        config: the experiment, as `rules.prepared_for_globus` makes it.
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

    def request(
        self, client: Client, reads: list[str], writes: list[str], seconds: float | None = None
    ) -> dict[str, Any]:
        """What every task of a client is told.

        Args:
            client: the client.
            reads: names of the objects in the store that it reads.
            writes: names of those that it may place.
            seconds: how long it has for that; None for as long as can be.
        """
        from omegaconf import OmegaConf

        from fedspallm_appfl.adaptors.agents import client_agent_config

        limit = self.config.client_configs.comm_configs.max_message_bytes
        settings = client_settings(self.config, client, client.train_configs.device, limit)
        settings.model.hash = self._dense
        agent: Any = OmegaConf.to_container(client_agent_config(settings), resolve=True)
        del agent["train_configs"]["comm"]["store"]  # the worker opens it
        store = self.store.lend(reads, writes, seconds) if self.store else {"connector": "none"}
        return {"client": client.client_id, "config": agent, "store": store, "run": self.run, "names": writes}

    def place(self, payload: Any, name: str) -> dict[str, Any]:
        """Place a payload for clients; it stays until the run ends or `remove` is called."""
        return placed(payload, self.store, name)

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects of the store that are there."""
        if self.store is None:
            return
        for name in names:
            try:
                self.store.evict(name)
            except DataStoreError as error:  # it may be gone with the rest when the run ends
                logger.warning("%s", error)

    def close(self) -> None:
        """Let go of everything, and remove what is left in the store."""
        busy = ", ".join(sorted(self.wire.busy()))
        if busy:
            logger.warning("a task may still be at work at %s; until it ends its endpoint answers nobody else", busy)
        try:
            self.wire.shutdown_all_clients()
        finally:
            if self.store:
                _clear(self.store)


def _clear(store: DataStore) -> None:
    """Remove what is left of a run; what was computed, or went wrong, counts for more than what stays behind."""
    try:
        store.close(clear=True)
    except DataStoreError as error:
        logger.warning("%s; objects of the run %s may be left", error, store.run)


@contextmanager
def connected(config: Config) -> Iterator[Connection]:
    """Log in to Globus Compute and open the data store.

    Raises:
        FederationError: the service cannot be used.
        DataStoreError: the store cannot be reached.
    """
    from fedspallm_appfl.adaptors import registration
    from fedspallm_appfl.models.checkpoint import resolve_model

    registration.register()
    from fedspallm_appfl.globus.server.communicator import GlobusServer

    run = uuid.uuid4().hex
    dense = model_hash(resolve_model(config.model.path))
    store = open_store(vars(config.client_configs.comm_configs.store), run, create=True)
    try:
        endpoints = {client.client_id: str(client.endpoint_id) for client in config.clients}
        wire = GlobusServer(endpoints, vars(config.server_configs.functions))
    except BaseException:
        if store:
            _clear(store)
        raise
    connection = Connection(config, wire, store, run, dense)
    try:
        yield connection
    finally:
        connection.close()


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
    from fedspallm_appfl.adaptors import registration

    registration.register()
    from fedspallm_appfl.adaptors.agents import server_agent

    registration.freeze()
    server = server_agent(config, state_dir)
    server.aggregator.on_event = on_event
    server.scheduler.spare_others = True
    down = Downlink(connection)
    instructions: dict[str, Any] = {}
    number = 0
    while not server.training_finished():
        answers = Turn(connection, server, on_event, number).run(down.places, instructions)
        payload = next(iter(answers.values()))[0]
        if not server.training_finished():
            down.add(_all_pieces(server, payload))
        instructions = {client: metadata for client, (_, metadata) in answers.items()}
        number += 1
    return server.aggregator


def _all_pieces(server: Any, first: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What goes down, piece by piece, so that one is in memory at a time."""
    yield first
    for piece in range(1, first.get("pieces", 1)):
        yield server.get_parameters(init_model=False, piece=piece)[0]


class Downlink:
    """What the clients have to load before they start: all that went down so far, less what was replaced since.

    What a worker has kept of it nobody knows, so each task is told where everything lies.

    Attributes:
        places: where the payloads are, in the order in which they have to be loaded.
    """

    def __init__(self, connection: Connection) -> None:
        self.places: list[dict[str, Any]] = []
        self._units: list[set[Unit]] = []
        self._connection = connection
        self._made = 0

    def add(self, payloads: Iterable[Any]) -> None:
        """Place payloads and remove those all of whose matrices came again."""
        fresh = []
        for payload in payloads:
            if payload:
                fresh.append((self._connection.place(payload, f"down.{self._made}"), _units(payload)))
                self._made += 1
        newer: set[Unit] = set().union(*(units for _, units in fresh))
        kept = [(p, u) for p, u in zip(self.places, self._units, strict=True) if not u or u - newer]
        gone = {p["stored"] for p in self.places if "stored" in p} - {p.get("stored") for p, _ in kept}
        self.places, self._units = [p for p, _ in kept + fresh], [u for _, u in kept + fresh]
        self._connection.remove(gone)


def _units(payload: Mapping[str, Any]) -> set[Unit]:
    """The (exchange, block, linear) of a payload: masks do not take the place of weights."""
    exchange = payload.get("exchange", 0)
    return {(exchange, block, linear) for block, linears in payload.get("blocks", {}).items() for linear in linears}
