"""Run clients in worker processes beside the server, each with one or more of them.

Messages travel through a socket of the file system: a description as JSON, then the memory of each tensor, as under MPI.
The server takes a message as it is made. It answers a worker when all of its clients can go on.
"""

import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

from fedspallm_appfl.adaptors import registration
from fedspallm_appfl.devices import choose_devices
from fedspallm_appfl.events import Event, OnEvent
from fedspallm_appfl.rounds.client import forget
from fedspallm_appfl.rounds.participants import client_settings, participants
from fedspallm_appfl.runs.absence import spare, spares
from fedspallm_appfl.runs.placement import batches, describe
from fedspallm_appfl.runs.processes import Workers, result
from fedspallm_appfl.runs.rank import Message, all_rounds
from fedspallm_appfl.runs.run_dir import AGREED, CLIENTS
from fedspallm_appfl.settings import plugins
from fedspallm_appfl.settings.schema import ClientSettings, Config
from fedspallm_appfl.wire.as_bytes import Inbox, memory, take_apart

POLL = 0.1  # seconds between two looks at whether a worker has failed
Groups = list[list[ClientSettings]]


class Line:
    """One end of a connection that carries payloads with tensors."""

    def __init__(self, connection: Connection, inbox: Inbox) -> None:
        self.connection, self._inbox = connection, inbox

    def send(self, **payload: Any) -> None:
        """Send a payload."""
        description, tensors = take_apart(payload)
        self.connection.send_bytes(description)
        for tensor in tensors:
            self.connection.send_bytes(memory(tensor))

    def receive(self) -> dict[str, Any]:
        """The next payload; its tensors hold until another is received into the same inbox.

        Raises:
            EOFError: the other end is closed.
            OSError: it was closed in the middle of a message.
        """
        received: dict[str, Any] = self._inbox.receive(self.connection.recv_bytes(), self.connection.recv_bytes_into)
        return received


class ToServer:
    """The line of a worker, known by its number, to the server."""

    def __init__(self, line: Line, number: int, clients: list[str]) -> None:
        self._line, self._number, self._clients = line, number, clients

    def tell(self, event: Event) -> None:
        """Let the server hear of an event; there is no answer."""
        self._line.send(worker=self._number, asked={"event": event})

    def get_global_model(self, **asked: Any) -> Any:
        """What the server has for the clients of this process: a payload, with metadata if there is some."""
        self._line.send(worker=self._number, asked={"get": {"_client_ids": self._clients, **asked}})
        answer = self._line.receive()
        return (answer["payload"], answer["metadata"]) if answer["metadata"] else answer["payload"]

    def exchange(self, messages: Iterator[Message], meanwhile: Callable[[], None]) -> tuple[Any, dict[str, Any]]:
        """Send one message of each client as it is made; returns (payload for all, client -> metadata).

        Nothing is done meanwhile: the server, beside it, needs the cores, and one message at a time lies in memory.
        """
        for client, update, metadata in messages:
            self._line.send(worker=self._number, asked={"client": client, "metadata": metadata}, update=update)
            del update  # not kept while the next is made
        self._line.send(worker=self._number, asked={})
        answer = self._line.receive()
        return answer["payload"], answer["metadata"]


def run(config: Config, state_dir: Path, on_event: OnEvent, workers: Workers) -> Any:
    """Run all rounds.

    Args:
        config: the experiment.
        state_dir: folder for the server's packed blocks and sums, and what was sent down.
        on_event: called with a dict for each event.
        workers: the processes.

    Returns:
        The aggregator, with the global model in it.

    Raises:
        FederationError: a worker was ended from outside.
    """
    shutil.rmtree(state_dir / AGREED, ignore_errors=True)  # of an earlier start, maybe not whole
    groups = _placed(config, state_dir, on_event, workers)
    with _listening() as (listener, address):
        whose: dict[Future[Any], str] = {}
        ended: list[Future[Any]] = []  # asking a future takes a lock, and a Ctrl-C at that moment would leave it taken
        for number, group in enumerate(groups):
            future = workers.submit(len(groups), _work, address, number, group, config.plugins, spares(config))
            whose[future] = f"clients {', '.join(settings.client_id for settings in group)}"
            future.add_done_callback(ended.append)
        server = registration.agents().server_agent(config, state_dir)
        server.aggregator.on_event = on_event
        spare(server, config)
        with _Desks(server, listener) as desks:
            while desks.is_open or whose:
                desks.take()
                while ended:
                    future = ended.pop()
                    result(future, whose.pop(future))
    return server.aggregator


def _placed(config: Config, state_dir: Path, on_event: OnEvent, workers: Workers) -> Groups:
    """What the clients of each worker are told."""
    clients, limit = participants(config), config.client_configs.comm_configs.max_message_bytes
    by_id, groups = {client.client_id: client for client in clients}, []
    together = batches(list(by_id), min(workers.count, len(by_id)))
    for number, names in enumerate(together):
        placed = [(by_id[name], choose_devices(by_id[name].train_configs, number)) for name in names]
        for place in describe(number + 1, placed, workers.threads(len(together))):
            on_event({"event": "place", **vars(place)})
        agreed, kept = state_dir / AGREED / str(number), state_dir / CLIENTS
        groups.append([client_settings(config, client, devices, limit, agreed, kept) for client, devices in placed])
    return groups


@contextmanager
def _listening() -> Iterator[tuple[socket.socket, str]]:
    """A socket that workers connect to, in a folder of this user alone; and where it is."""
    with tempfile.TemporaryDirectory(prefix="fedspallm-") as folder, socket.socket(socket.AF_UNIX) as listener:
        address = str(Path(folder) / "server")
        listener.bind(address)
        listener.listen()
        yield listener, address


class _Desks:
    """The server's side of all lines."""

    def __init__(self, server: Any, listener: socket.socket) -> None:
        from fedspallm_appfl.adaptors.desk import Desk

        self._server, self._listener = server, listener
        self._desk, self._inbox = Desk(server), Inbox()
        self._lines: dict[Connection, Line] = {}
        self._waiting: dict[int, Line] = {}  # worker -> its line, if it waits for an answer

    def __enter__(self) -> "_Desks":
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._lines:  # whoever waits for an answer that will not come ends
            connection.close()

    @property
    def is_open(self) -> bool:
        """Whether a worker may still send something."""
        return bool(self._lines)

    def take(self) -> None:
        """Take what has come, and answer whoever can go on; waits a moment if nothing has."""
        for ready in wait([self._listener, *self._lines], POLL):
            if ready is self._listener:
                connection = Connection(self._listener.accept()[0].detach())
                self._lines[connection] = Line(connection, self._inbox)
                continue
            line = self._lines.get(cast(Connection, ready))
            if line is None:  # closed since, as an answer to it failed
                continue
            try:
                heard = line.receive()
            except (EOFError, OSError):  # the second if it was killed in the middle of a message
                self._close(line)
            else:
                self._hear(line, **heard)

    def _close(self, line: Line) -> None:
        """Its worker has ended, well or not, which its future tells."""
        self._lines.pop(line.connection, None)
        self._waiting = {worker: other for worker, other in self._waiting.items() if other is not line}
        line.connection.close()

    def _answer(self, line: Line, **payload: Any) -> None:
        try:
            line.send(**payload)
        except ConnectionError:
            self._close(line)

    def _hear(self, line: Line, worker: int, asked: dict[str, Any], update: Any = None) -> None:
        if "event" in asked:
            self._server.aggregator.on_event(asked["event"])
            return
        if "get" in asked:
            payload, metadata = self._server.get_parameters(**asked["get"], blocking=False)
            self._answer(line, payload=payload, metadata=metadata)
            return
        if "client" in asked:
            self._desk.take(worker, asked["client"], update, asked["metadata"])
        else:
            self._waiting[worker] = line
        status = {"status": "DONE" if self._server.training_finished() else "RUNNING"}
        for ready, payload, answers in self._desk.answers(self._waiting):
            told = {client: answer | status for client, answer in answers.items()}
            self._answer(self._waiting.pop(ready), payload=payload, metadata=told)


def _work(address: str, number: int, told: list[ClientSettings], named: list[str], sparing: bool) -> None:
    """What a worker does: run its clients through all rounds."""
    try:
        plugins.load(named)
        agents_of = registration.agents()
        with socket.socket(socket.AF_UNIX) as end:
            end.connect(address)
            with Connection(end.detach()) as connection:
                agents = {settings.client_id: agents_of.client_agent(settings) for settings in told}
                all_rounds(ToServer(Line(connection, Inbox()), number, list(agents)), agents, sparing)
    finally:
        forget()
