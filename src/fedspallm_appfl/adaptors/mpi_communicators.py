"""APPFL's MPI communicators with three changes: answers to batched clients, how they wait, and how tensors travel.

* A rank with several clients sends one message for all of them and waits for one answer. APPFL allows that with its own
  scheduler only, and answers as soon as one of the clients can go on; here any scheduler will do, and the answer goes
  out when all of them can go on.
* APPFL's server sleeps a tenth of a second before each message, its clients spin while they wait. Here both look every
  millisecond, at first more often.
* APPFL pickles a model several times over on its way. Here a dict goes ahead as JSON, in which every tensor is replaced by
  its dtype and shape; the tensors follow one by one, each straight from and into its own memory. MPI keeps messages between
  two ranks in order, so nothing has to be numbered.
"""

import itertools
import math
import time
from typing import Any

import torch
import yaml
from appfl.comm.mpi import MPIClientCommunicator, MPIServerCommunicator
from appfl.comm.mpi.config import MPIServerStatus, MPITask, MPITaskRequest, MPITaskResponse
from appfl.comm.mpi.serializer import byte_to_request, byte_to_response, request_to_byte, response_to_byte
from mpi4py import MPI
from torch import Tensor

from fedspallm_appfl.errors import UpdateError
from fedspallm_appfl.wire.as_bytes import fill, memory, read_description, take_apart
from fedspallm_appfl.wire.metadata import word

ALIGNMENT = 64  # bytes, as torch allocates
FIRST_PAUSE, LONGEST_PAUSE = 1e-5, 1e-3  # seconds


class Inbox:
    """Takes messages in, one at a time.

    The memory of a message is kept for the next one, as new memory is slow to fill: whoever gets a payload has to be done
    with its tensors, or copy them, before the next message is taken in. Server and clients fold or store them at once.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def receive(self, comm: Any, description: bytes, rank: int, tag: int) -> Any:
        """The payload of a description, with its tensors received."""
        payload, described = read_description(description)
        tensors = [(getattr(torch, dtype), shape) for dtype, shape in described]
        sizes = [math.prod(shape) * dtype.itemsize for dtype, shape in tensors]
        starts = list(itertools.accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes), initial=0))
        if starts[-1] > len(self._memory):
            self._memory = torch.empty(0, dtype=torch.uint8)  # not both at a time
            self._memory = torch.empty(starts[-1], dtype=torch.uint8)
        parts = [self._memory[start : start + size] for start, size in zip(starts, sizes, strict=False)]
        for part in parts:
            comm.Recv([part.numpy().data, MPI.BYTE], source=rank, tag=tag)
        filled = [part.view(dtype).view(shape) for part, (dtype, shape) in zip(parts, tensors, strict=True)]
        return fill(payload, filled)


def send_tensors(comm: Any, tensors: list[Tensor], rank: int, tag: int) -> None:
    """Send the tensors of a payload, each below 2^31 bytes."""
    for tensor in tensors:
        comm.Send([memory(tensor), MPI.BYTE], dest=rank, tag=tag)


class BatchedMPIServer(MPIServerCommunicator):
    """APPFL's server, for ranks with any number of clients and a scheduler that answers clients one by one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._clients_of_rank: dict[int, list[str]] = {}
        self._inbox = Inbox()

    def serve(self) -> None:
        """Take messages until all clients have closed their connection."""
        status = MPI.Status()
        while not self.server_agent.server_terminated():
            _wait(self.comm, MPI.ANY_SOURCE, MPI.ANY_TAG, status)
            source, tag = status.Get_source(), status.Get_tag()
            request = byte_to_request(_receive(self.comm, status))
            response = self._request_handler(client_rank=source, request_tag=tag, request=request)
            if response is not None:
                self.comm.Send(response_to_byte(response), dest=source, tag=source)

    def _get_global_model(self, client_rank: int, request: MPITaskRequest) -> None:
        """Answer with what the aggregator has for this rank."""
        metadata = yaml.safe_load(request.meta_data)
        payload, answer = self.server_agent.get_parameters(**metadata, blocking=False)
        self._answer(client_rank, MPIServerStatus.RUN, payload, answer)

    def _update_global_model(self, client_rank: int, request: MPITaskRequest) -> None:
        """Hand the messages of all clients of a rank to the scheduler."""
        metadata = yaml.safe_load(request.meta_data)
        updates = self._inbox.receive(self.comm, request.payload, client_rank, _data_tag(self.comm))
        self._clients_of_rank[client_rank] = metadata["_client_ids"]
        given_up = self.server_agent.aggregator.given_up()
        order = {
            client: ("absent" not in metadata[client], client not in given_up) for client in metadata["_client_ids"]
        }
        for client in sorted(
            order, key=order.__getitem__
        ):  # who waits is known before the last of them ends the exchange
            self._update_global_model_futures[client] = self._folded(client, updates.pop(client), metadata[client])
        self._check_update_global_model_futures()

    def _folded(self, client: str, update: Any, metadata: dict[str, Any]) -> Any:
        """The answer to a message, which may say that its client failed, or be refused."""
        scheduler = self.server_agent.scheduler
        if "absent" in metadata:
            return scheduler.leave_out(client, metadata["absent"], metadata["waits"])
        try:
            return self.server_agent.global_update(client, update, blocking=False, **metadata)
        except UpdateError as error:
            if not scheduler.spare_others:
                raise
            why = {"why": str(error), "traceback": "", "host": word(metadata.get("host")), "blocks": ""}
            total = metadata.get("_total_chunks")
            return scheduler.leave_out(client, why, type(total) is int and metadata.get("_chunk_idx") == total - 1)

    def _check_update_global_model_futures(self) -> None:
        """Answer every rank all of whose clients can go on."""
        futures = self._update_global_model_futures
        status = MPIServerStatus.DONE if self.server_agent.training_finished() else MPIServerStatus.RUN
        for rank, clients in list(self._clients_of_rank.items()):
            if not all(client in futures and futures[client].done() for client in clients):
                continue
            answers = {client: futures.pop(client).result() for client in clients}
            del self._clients_of_rank[rank]
            payload = next(iter(answers.values()))[0]  # the same for all; what differs stands in the metadata
            self._answer(rank, status, payload, {client: answer[1] for client, answer in answers.items()})

    def _answer(self, rank: int, status: MPIServerStatus, payload: Any, metadata: dict[str, Any]) -> None:
        description, tensors = take_apart(payload)
        response = MPITaskResponse(status.value, description, yaml.dump(metadata))
        self.comm.Send(response_to_byte(response), dest=rank, tag=rank)
        send_tensors(self.comm, tensors, rank, _data_tag(self.comm))


class PoliteMPIClient(MPIClientCommunicator):
    """APPFL's client that does not take a core while it waits; for one rank with several clients."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._inbox = Inbox()

    def get_global_model(self, **kwargs: Any) -> Any:
        """What the server has for the clients of this rank: a payload, with metadata if there is some."""
        self._ask(MPITask.GET_GLOBAL_MODEL, kwargs, {})
        _, payload, metadata = self._answer()
        return (payload, metadata) if metadata else payload

    def update_global_model(self, local_model: Any, client_id: str | int | None = None, **kwargs: Any) -> Any:
        """Send the messages of clients of this rank.

        Args:
            local_model: client -> its message.
            client_id: not used here: a rank speaks for all of its clients.
            **kwargs: `kwargs`, client -> metadata.

        Returns:
            (payload for all clients, client -> metadata with the server's `status`, RUNNING or DONE).
        """
        told = kwargs.get("kwargs", kwargs)
        self._ask(MPITask.UPDATE_GLOBAL_MODEL, {**told, "_client_ids": list(local_model)}, local_model)
        status, payload, metadata = self._answer()
        for answer in metadata.values():
            answer["status"] = "DONE" if status == MPIServerStatus.DONE.value else "RUNNING"
        return payload, metadata

    def _ask(self, task: MPITask, metadata: dict[str, Any], payload: Any) -> None:
        description, tensors = take_apart(payload)
        request = MPITaskRequest(description, yaml.dump({"_client_ids": self.client_ids, **metadata}))
        tag = self.comm_rank + self.comm_size * task.value
        self.comm.Send(request_to_byte(request), dest=self.server_rank, tag=tag)
        send_tensors(self.comm, tensors, self.server_rank, _data_tag(self.comm))

    def _answer(self) -> tuple[int, Any, dict[str, Any]]:
        response = self._recv_response()
        payload = self._inbox.receive(self.comm, response.payload, self.server_rank, _data_tag(self.comm))
        return response.status, payload, yaml.safe_load(response.meta_data)

    def _recv_response(self) -> MPITaskResponse:
        status = MPI.Status()
        _wait(self.comm, self.server_rank, self.comm_rank, status)
        return byte_to_response(_receive(self.comm, status))


def _data_tag(comm: Any) -> int:
    """A tag that no request and no answer has."""
    return comm.Get_size() * (len(MPITask) + 1)


def _receive(comm: Any, status: MPI.Status) -> bytearray:
    """The message that a probe has found."""
    buffer = bytearray(status.Get_count(MPI.BYTE))
    comm.Recv(buffer, source=status.Get_source(), tag=status.Get_tag())
    return buffer


def _wait(comm: Any, source: int, tag: int, status: MPI.Status) -> None:
    """Return once a message has come: look often at first, as an answer may be near, then leave the core to others."""
    pause = FIRST_PAUSE
    while not comm.iprobe(source=source, tag=tag, status=status):
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
