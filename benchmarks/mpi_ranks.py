"""The two ranks of `mpi`: rank 0 is a server that drops what it gets, rank 1 a client with one large update.

`mpiexec -n 2 python -m benchmarks.mpi_ranks small|large TURNS`; the last line is JSON.
"""

import json
import sys
import time
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from omegaconf import OmegaConf

from benchmarks.measure import interleave
from benchmarks.memory import peak_above
from benchmarks.uploads import SEVEN_B, SMALL, upload
from fedspallm_appfl.appfl_adaptors import registration
from fedspallm_appfl.payload import update_nbytes

registration.register()

from fedspallm_appfl.appfl_adaptors.mpi_communicators import BatchedMPIServer, PoliteMPIClient  # noqa: E402

SERVER, CLIENT = 0, 1
NAME = "client"


class Sink:
    """A server agent that answers every upload at once and keeps none."""

    server_agent_config = OmegaConf.create({"server_configs": {"optimize_memory": False}})

    def __init__(self) -> None:
        self._closed = False

    def global_update(self, client_id: str, local_model: Any, blocking: bool = False, **metadata: Any) -> Future:
        """Take an upload."""
        future: Future = Future()
        future.set_result(({}, {}))
        return future

    def training_finished(self, **_: Any) -> bool:
        """Never."""
        return False

    def close_connection(self, client_id: str) -> None:
        """The client is done."""
        self._closed = True

    def server_terminated(self) -> bool:
        """Whether the client is done."""
        return self._closed


class Silent:
    """A logger that says nothing."""

    def info(self, *_: Any) -> None:
        """Say nothing."""

    debug = warning = error = info


def plain(comm: MPI.Comm, sent: np.ndarray) -> float:
    """Seconds for bytes over and one byte back. The server takes them into new memory, as one that keeps them must."""
    answer = np.zeros(1, np.uint8)
    comm.Barrier()
    started = time.perf_counter()
    if comm.Get_rank() == CLIENT:
        comm.Send(sent, dest=SERVER)
        comm.Recv(answer, source=SERVER)
    else:
        comm.Recv(np.empty(len(sent), np.uint8), source=CLIENT)
        comm.Send(answer, dest=CLIENT)
    return time.perf_counter() - started


def ours(comm: MPI.Comm, update: dict[str, Any] | None) -> float:
    """Seconds for an update over and an answer back."""
    comm.Barrier()
    started = time.perf_counter()
    if comm.Get_rank() == CLIENT:
        wire = PoliteMPIClient(comm, server_rank=SERVER, client_ids=[NAME], optimize_memory=False)
        wire.update_global_model({NAME: update}, kwargs={NAME: {"samples": 1}})
        taken = time.perf_counter() - started
        wire.invoke_custom_action(action="close_connection")
        return taken
    BatchedMPIServer(comm, Sink(), logger=Silent(), optimize_memory=False).serve()
    return time.perf_counter() - started


def main() -> None:
    size, turns = sys.argv[1:]
    torch.set_num_threads(1)
    comm = MPI.COMM_WORLD
    update = upload(SMALL if size == "small" else SEVEN_B, 0) if comm.Get_rank() == CLIENT else None
    nbytes = comm.bcast(update_nbytes(update) if update else 0, root=CLIENT)
    buffer = np.ones(nbytes, np.uint8)
    ways = partial(plain, comm, buffer), partial(ours, comm, update)
    times = interleave(int(turns), *ways)
    memory = comm.gather(peak_above(ways[1]), root=CLIENT)
    if comm.Get_rank() == CLIENT:
        by_side = {"client": memory[CLIENT], "server": memory[SERVER]}
        print(json.dumps({"bytes": nbytes, "plain": times[0], "ours": times[1], **by_side}), flush=True)


if __name__ == "__main__":
    main()
