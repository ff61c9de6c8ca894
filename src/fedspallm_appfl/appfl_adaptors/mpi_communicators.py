"""APPFL's MPI communicators with two changes: answers to batched clients, and how they wait.

* A rank with several clients sends one message for all of them and waits for one answer. APPFL allows that with its own
  scheduler only, and answers as soon as one of the clients can go on; here any scheduler will do, and the answer goes
  out when all of them can go on.
* APPFL's server sleeps a tenth of a second before each message, its clients spin while they wait. Here both look every
  millisecond.
"""

import time
from typing import Any

import yaml
from appfl.comm.mpi import MPIClientCommunicator, MPIServerCommunicator
from appfl.comm.mpi.config import MPIServerStatus, MPITaskResponse
from appfl.comm.mpi.serializer import (
    byte_to_model,
    byte_to_request,
    byte_to_response,
    model_to_byte,
    response_to_byte,
)
from mpi4py import MPI

from fedspallm_appfl.errors import ConfigError
from fedspallm_appfl.messages import MPI_LIMIT

POLL_SECONDS = 0.001


class BatchedMPIServer(MPIServerCommunicator):
    """APPFL's server, for ranks with any number of clients and a scheduler that answers clients one by one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._clients_of_rank: dict[int, list[str]] = {}

    def serve(self) -> None:
        """Take messages until all clients have closed their connection."""
        status = MPI.Status()
        while not self.server_agent.server_terminated():
            _wait(self.comm, MPI.ANY_SOURCE, MPI.ANY_TAG, status)
            source, tag = status.Get_source(), status.Get_tag()
            buffer = bytearray(status.Get_count(MPI.BYTE))
            self.comm.Recv(buffer, source=source, tag=tag)
            response = self._request_handler(client_rank=source, request_tag=tag, request=byte_to_request(buffer))
            del buffer
            if response is not None:
                self._send(response, source)

    def _update_global_model(self, client_rank: int, request: Any) -> None:
        """Hand the messages of all clients of a rank to the scheduler."""
        metadata, updates = yaml.unsafe_load(request.meta_data), byte_to_model(request.payload)
        self._clients_of_rank[client_rank] = metadata["_client_ids"]
        for client in metadata["_client_ids"]:
            future = self.server_agent.global_update(client, updates.pop(client), blocking=False, **metadata[client])
            self._update_global_model_futures[client] = future
        self._check_update_global_model_futures()

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
            metadata = {client: answer[1] for client, answer in answers.items()}
            self._send(MPITaskResponse(status.value, model_to_byte(payload), yaml.dump(metadata)), rank)

    def _send(self, response: MPITaskResponse, rank: int) -> None:
        message = response_to_byte(response)
        if len(message) > MPI_LIMIT:
            raise ConfigError(
                f"an answer has {len(message)} bytes, MPI carries at most {MPI_LIMIT}; lower comm_configs.max_message_bytes"
            )
        self.comm.Send(message, dest=rank, tag=rank)


class PoliteMPIClient(MPIClientCommunicator):
    """APPFL's client that does not take a core while it waits."""

    def _recv_response(self) -> MPITaskResponse:
        status = MPI.Status()
        _wait(self.comm, self.server_rank, self.comm_rank, status)
        buffer = bytearray(status.Get_count(MPI.BYTE))
        self.comm.Recv(buffer, source=self.server_rank, tag=self.comm_rank)
        return byte_to_response(buffer)


def _wait(comm: Any, source: int, tag: int, status: Any) -> None:
    """Return once a message has come."""
    while not comm.iprobe(source=source, tag=tag, status=status):
        time.sleep(POLL_SECONDS)
