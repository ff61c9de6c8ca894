"""A plain APPFL script for MPI that prunes with FedSpaLLM, one client per rank.

    mpiexec --oversubscribe -n 3 python -m mpi4py examples/appfl/run_mpi.py

It uses APPFL's agents and communicators only. `fedspallm run --launcher mpi` does more: any number of clients a rank,
checks, placement, a report.
"""

from omegaconf import OmegaConf

from fedspallm_appfl.adaptors.registration import freeze, register

register()  # imports APPFL, without piq, which needs torchvision: it is put off until something uses it

from appfl.agent import ServerAgent  # noqa: E402
from appfl.comm.mpi import MPIClientCommunicator, MPIServerCommunicator  # noqa: E402
from client import TEXTS, configuration, take_part  # noqa: E402
from mpi4py import MPI  # noqa: E402

freeze()  # APPFL collects garbage several times a message; what is imported need not be looked at each time


def serve(comm: MPI.Comm) -> None:
    """Rank 0: APPFL's server with our aggregator and scheduler."""
    agent = ServerAgent(OmegaConf.load("examples/appfl/server.yaml"))
    MPIServerCommunicator(comm, agent, logger=agent.logger).serve()
    for matrix in agent.aggregator.save_model("runs/appfl/model"):
        print(f"{matrix.sparsity:.4f}  {matrix.name}")


def prune(comm: MPI.Comm) -> None:
    """Any other rank: a client."""
    config = configuration(comm.Get_rank())
    take_part(config, MPIClientCommunicator(comm, server_rank=0, client_id=config.client_id))


if __name__ == "__main__":
    if MPI.COMM_WORLD.Get_size() != 1 + len(TEXTS):
        raise SystemExit(f"start it with mpiexec -n {1 + len(TEXTS)}: a server and {len(TEXTS)} clients")
    if MPI.COMM_WORLD.Get_rank() == 0:
        serve(MPI.COMM_WORLD)
    else:
        prune(MPI.COMM_WORLD)
