"""APPFL's MPI communicators with other manners: how they answer and wait, and how, when and where tensors travel.

* A rank with several clients sends one message for all of them and waits for one answer. APPFL allows that with its own
  scheduler only, and answers as soon as one of the clients can go on; here any scheduler will do, and the answer goes
  out when all of them can go on.
* APPFL's server sleeps a tenth of a second before each message, its clients spin while they wait. Here both look every
  millisecond, at first more often.
* APPFL pickles a model several times over on its way. Here a dict goes ahead as JSON, in which every tensor is replaced by
  its dtype and shape; the tensors follow one by one, each straight from and into its own memory. MPI keeps messages between
  two ranks in order, so nothing has to be numbered.
* Where ranks fold for the server, tensors go to them (`adaptors.fold_ranks`), which the server hears from.
* While a message of clients is on its way, and until it is answered, they make the next one. A thread sends and waits:
  without calls MPI may move nothing of a large message. One message is on its way, never two.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import yaml
from appfl.comm.mpi import MPIClientCommunicator, MPIServerCommunicator
from appfl.comm.mpi.config import MPIServerStatus, MPITask, MPITaskRequest, MPITaskResponse
from appfl.comm.mpi.serializer import byte_to_request, byte_to_response, request_to_byte, response_to_byte
from mpi4py import MPI
from torch import Tensor

from fedspallm_appfl.adaptors.desk import Desk
from fedspallm_appfl.adaptors.parts import Note, Parts
from fedspallm_appfl.events import Event
from fedspallm_appfl.wire.as_bytes import Inbox, memory, take_apart
from fedspallm_appfl.wire.messages import Unit, shares

SERVER = 0  # its rank
FIRST_PAUSE, LONGEST_PAUSE = 1e-5, 1e-3  # seconds
LONGEST_SENDING = 1e-4  # over TCP each look sends what the socket takes, and no more


def send_tensors(comm: Any, tensors: list[Tensor], rank: int, tag: int) -> None:
    """Send the tensors of a payload, each below 2^31 bytes."""
    for tensor in tensors:
        comm.Send([memory(tensor), MPI.BYTE], dest=rank, tag=tag)


class BatchedMPIServer(MPIServerCommunicator):
    """APPFL's server, for ranks with any number of clients and a scheduler that answers clients one by one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._desk, self._inbox, self._parts = Desk(self.server_agent), Inbox(), Parts()

    def serve(self) -> None:
        """Take messages until all clients have closed their connection."""
        status = MPI.Status()
        while not self.server_agent.server_terminated():
            wait(self.comm, MPI.ANY_SOURCE, MPI.ANY_TAG, status)
            source, tag = status.Get_source(), status.Get_tag()
            if tag == tag_of(self.comm, "note"):
                self._hear(self.comm.recv(source=source, tag=tag))
                continue
            if tag == tag_of(self.comm, "event"):
                self.server_agent.aggregator.on_event(self.comm.recv(source=source, tag=tag))
                continue
            request = byte_to_request(receive(self.comm, status))
            response = self._request_handler(client_rank=source, request_tag=tag, request=request)
            if response is not None:
                self.comm.Send(response_to_byte(response), dest=source, tag=source)

    def _get_global_model(self, client_rank: int, request: MPITaskRequest) -> None:
        """Answer with what the aggregator has for this rank."""
        metadata = yaml.safe_load(request.meta_data)
        payload, answer = self.server_agent.get_parameters(**metadata, blocking=False)
        self._answer(client_rank, MPIServerStatus.RUN, payload, answer)

    def _update_global_model(self, client_rank: int, request: MPITaskRequest) -> None:
        """Take the messages of all clients of a rank, and answer every rank all of whose clients can go on."""
        metadata = yaml.safe_load(request.meta_data)
        updates = self._inbox.receive(request.payload, receiver(self.comm, client_rank))
        self._parts.waiting[client_rank] = metadata.pop("_parts", []), (metadata, updates)
        self._go_on(client_rank)

    def _hear(self, note: Note) -> None:
        """Take note of what a fold rank has taken in."""
        for event in note.events:
            self.server_agent.aggregator.on_event(event)
        self._parts.notes.setdefault(note.rank, []).append(note)
        self._go_on(note.rank)

    def _go_on(self, client_rank: int) -> None:
        """Take the messages of a rank if all of them is there, and answer who can go on."""
        whole = self._parts.whole(client_rank)
        if whole is None:
            return
        (metadata, updates), receipts = whole
        for client in metadata["_client_ids"]:
            self._desk.take(client_rank, client, receipts.get(client, updates.pop(client)), metadata[client])
        for rank, payload, answers in self._desk.answers(range(self.comm.Get_size())):
            status = MPIServerStatus.DONE if self.server_agent.training_finished() else MPIServerStatus.RUN
            self._answer(rank, status, payload, answers)

    def _answer(self, rank: int, status: MPIServerStatus, payload: Any, metadata: dict[str, Any]) -> None:
        description, tensors = take_apart(payload)
        response = MPITaskResponse(status.value, description, yaml.dump(metadata))
        self.comm.Send(response_to_byte(response), dest=rank, tag=rank)
        send_tensors(self.comm, tensors, rank, data_tag(self.comm))


class PoliteMPIClient(MPIClientCommunicator):
    """APPFL's client that does not take a core while it waits; for one rank with several clients."""

    def __init__(self, *args: Any, owner: Mapping[Unit, int] | None = None, **kwargs: Any) -> None:
        """As APPFL's.

        Args:
            *args: APPFL's.
            owner: the fold rank of each matrix, where the server does not fold itself.
            **kwargs: APPFL's.
        """
        super().__init__(*args, **kwargs)
        self._inbox, self._owner = Inbox(), owner
        self._now = [-1, 0]  # the round and the exchange that the server has told of
        self._thread = ThreadPoolExecutor(1, "messages") if MPI.Query_thread() >= MPI.THREAD_MULTIPLE else None

    def tell(self, event: Event) -> None:
        """Let the server hear of an event; there is no answer."""
        self.comm.send(event, dest=self.server_rank, tag=tag_of(self.comm, "event"))

    def get_global_model(self, **kwargs: Any) -> Any:
        """What the server has for the clients of this rank: a payload, with metadata if there is some."""
        self._ask(MPITask.GET_GLOBAL_MODEL, kwargs, {}, self.server_rank)
        _, payload, metadata = self._answer()
        self._note(metadata)
        return (payload, metadata) if metadata else payload

    def exchange(
        self, messages: Iterator[tuple[str, Any, dict[str, Any]]], meanwhile: Callable[[], None]
    ) -> tuple[Any, dict[str, Any]]:
        """Send messages of clients of this rank together: (client, update, metadata) of each.

        Args:
            messages: of each client.
            meanwhile: called while they are on their way, if MPI allows threads; it may `tell`, and must not wait for the
                server.

        Returns:
            As `update_global_model`.
        """
        all_of = list(messages)
        updates = {client: update for client, update, _ in all_of}
        told = {client: metadata for client, _, metadata in all_of}
        if self._thread is None:
            return self.update_global_model(updates, kwargs=told)
        answer = self._thread.submit(self.update_global_model, updates, kwargs=told)
        meanwhile()
        return answer.result()

    def update_global_model(
        self, local_model: Any, client_id: str | int | None = None, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Send the messages of clients of this rank.

        Args:
            local_model: client -> its message.
            client_id: not used here: a rank speaks for all of its clients.
            **kwargs: `kwargs`, client -> metadata.

        Returns:
            (payload for all clients, client -> metadata with the server's `status`, RUNNING or DONE).
        """
        told = kwargs.get("kwargs", kwargs)
        clients, parts = list(local_model), shares(local_model, self._owner) if self._owner else {}
        for rank, part in parts.items():
            self._ask(MPITask.UPDATE_GLOBAL_MODEL, {**told, "_now": self._now}, part, rank)
        left = {client: {} for client in clients} if self._owner else local_model
        more = {"_parts": list(parts)} if parts else {}
        self._ask(MPITask.UPDATE_GLOBAL_MODEL, {**told, "_client_ids": clients, **more}, left, self.server_rank)
        status, payload, metadata = self._answer()
        for answer in metadata.values():
            self._note(answer)
            answer["status"] = "DONE" if status == MPIServerStatus.DONE.value else "RUNNING"
        return payload, metadata

    def _note(self, told: Mapping[str, Any]) -> None:
        if "exchange" in told:
            self._now = [told["round"], told["exchange"]]

    def _ask(self, task: MPITask, metadata: dict[str, Any], payload: Any, rank: int) -> None:
        description, tensors = take_apart(payload)
        request = MPITaskRequest(description, yaml.dump({"_client_ids": self.client_ids, **metadata}))
        tag = self.comm_rank + self.comm_size * task.value
        on_its_way = [self.comm.Isend(request_to_byte(request), dest=rank, tag=tag)]
        for tensor in tensors:
            on_its_way.append(self.comm.Isend([memory(tensor), MPI.BYTE], dest=rank, tag=data_tag(self.comm)))
        pause(lambda: MPI.Request.Testall(on_its_way), LONGEST_SENDING)

    def _answer(self) -> tuple[int, Any, dict[str, Any]]:
        response = self._recv_response()
        payload = self._inbox.receive(response.payload, receiver(self.comm, self.server_rank))
        return response.status, payload, yaml.safe_load(response.meta_data)

    def _recv_response(self) -> MPITaskResponse:
        status = MPI.Status()
        wait(self.comm, self.server_rank, self.comm_rank, status)
        return byte_to_response(receive(self.comm, status))


def receiver(comm: Any, rank: int) -> Callable[[memoryview], None]:
    """Fills memory with the next tensor of a rank."""
    return lambda part: comm.Recv([part, MPI.BYTE], source=rank, tag=data_tag(comm))


def data_tag(comm: Any) -> int:
    """A tag that no request and no answer has."""
    return comm.Get_size() * (len(MPITask) + 1)


def tag_of(comm: Any, what: str) -> int:
    """A tag of what is no request and no answer.

    Between the server and fold ranks a `note` of what came, a `command`, or what was `made`; an `event` of a client.
    """
    return int(data_tag(comm)) + 1 + ("note", "command", "made", "event").index(what)


def receive(comm: Any, status: MPI.Status) -> bytearray:
    """The message that a probe has found."""
    buffer = bytearray(status.Get_count(MPI.BYTE))
    comm.Recv(buffer, source=status.Get_source(), tag=status.Get_tag())
    return buffer


def wait(comm: Any, source: int, tag: int, status: MPI.Status) -> None:
    """Return once a message has come: look often at first, as an answer may be near, then leave the core to others."""
    pause(lambda: comm.iprobe(source=source, tag=tag, status=status), LONGEST_PAUSE)


def pause(done: Callable[[], bool], longest: float) -> None:
    """Look again and again, after pauses of up to so many seconds, until something is done; each look moves MPI on."""
    seconds = FIRST_PAUSE
    while not done():
        time.sleep(seconds)
        seconds = min(2 * seconds, longest)
