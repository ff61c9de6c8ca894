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
from fedspallm_appfl.adaptors import registration
from fedspallm_appfl.wire.update import update_nbytes

registration.register()

from fedspallm_appfl.adaptors.mpi_communicators import BatchedMPIServer, PoliteMPIClient  # noqa: E402

SERVER, CLIENT = 0, 1
NAME = "client"


class Sink:
    """A server agent that answers every upload at once and keeps none."""

    server_agent_config = OmegaConf.create({"server_configs": {"optimize_memory": False}})
    scheduler = None  # nobody is left out

    def __init__(self) -> None:
        self.closed = False

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
        self.closed = True

    def server_terminated(self) -> bool:
        """Whether the client is done."""
        return self.closed


class Silent:
    """A logger that says nothing."""

    def info(self, *_: Any) -> None:
        """Say nothing."""

    debug = warning = error = info


def plain(comm: MPI.Comm, buffer: np.ndarray) -> float:
    """Seconds for bytes over and one byte back, from and into memory that is in use already: the best that MPI can do."""
    answer = np.zeros(1, np.uint8)
    comm.Barrier()
    started = time.perf_counter()
    if comm.Get_rank() == CLIENT:
        comm.Send(buffer, dest=SERVER)
        comm.Recv(answer, source=SERVER)
    else:
        comm.Recv(buffer, source=CLIENT)
        comm.Send(answer, dest=CLIENT)
    return time.perf_counter() - started


class Ours:
    """Both ranks of the package's way; like a run, they live through many messages."""

    def __init__(self, comm: MPI.Comm, update: dict[str, Any] | None) -> None:
        self.comm, self.update, self.sink = comm, update, Sink()
        if comm.Get_rank() == CLIENT:
            self.wire = PoliteMPIClient(comm, server_rank=SERVER, client_ids=[NAME], optimize_memory=False)
        else:
            self.server = BatchedMPIServer(comm, self.sink, logger=Silent(), optimize_memory=False)

    def __call__(self) -> float:
        """Seconds for an update over and an answer back."""
        self.comm.Barrier()
        started = time.perf_counter()
        if self.comm.Get_rank() == CLIENT:
            self.wire.update_global_model({NAME: self.update}, kwargs={NAME: {"samples": 1}})
            taken = time.perf_counter() - started
            self.wire.invoke_custom_action(action="close_connection")
            return taken
        self.sink.closed = False
        self.server.serve()
        return time.perf_counter() - started


def main() -> None:
    size, turns = sys.argv[1:]
    torch.set_num_threads(1)
    comm = MPI.COMM_WORLD
    update = upload(SMALL if size == "small" else SEVEN_B, 0) if comm.Get_rank() == CLIENT else None
    nbytes = comm.bcast(update_nbytes(update) if update else 0, root=CLIENT)
    buffer = np.ones(nbytes, np.uint8)
    ways = partial(plain, comm, buffer), Ours(comm, update)
    times = interleave(int(turns), *ways)
    memory = comm.gather(peak_above(Ours(comm, update)), root=CLIENT)
    if comm.Get_rank() == CLIENT:
        by_side = {"client": memory[CLIENT], "server": memory[SERVER]}
        print(json.dumps({"bytes": nbytes, "plain": times[0], "ours": times[1], **by_side}), flush=True)


if __name__ == "__main__":
    main()
