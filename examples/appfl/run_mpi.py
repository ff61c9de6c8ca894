"""A plain APPFL script for MPI that prunes with FedSpaLLM, one client per rank.

    mpiexec --oversubscribe -n 3 python -m mpi4py examples/appfl/run_mpi.py

It uses only APPFL's agents and communicators. `fedspallm run --launcher mpi` does more: any number of clients per rank,
checks, placement, report, the finished model.
"""

from omegaconf import OmegaConf

from fedspallm_appfl.adaptors.registration import guard_piq

guard_piq()  # APPFL imports piq, which needs torchvision; if that is broken, this makes the import work

from appfl.agent import ClientAgent, ServerAgent  # noqa: E402
from appfl.comm.mpi import MPIClientCommunicator, MPIServerCommunicator  # noqa: E402
from mpi4py import MPI  # noqa: E402

TEXTS = ["austen", "bible"]


def serve(comm: MPI.Comm) -> None:
    """Rank 0: APPFL's server with our aggregator and scheduler."""
    agent = ServerAgent(OmegaConf.load("examples/appfl/server.yaml"))
    MPIServerCommunicator(comm, agent, logger=agent.logger).serve()
    print(f"blocks {agent.aggregator.global_model.done.blocks()} are in {agent.aggregator.global_model.folder}")


def take_part(comm: MPI.Comm) -> None:
    """Other ranks: APPFL's plain loop; each turn sends one message of the round."""
    config = OmegaConf.load("examples/appfl/client.yaml")
    config.client_id = f"Client{comm.Get_rank()}"
    config.train_configs.data.text = f"examples/demo/text/{TEXTS[comm.Get_rank() - 1]}/calib.txt"
    agent = ClientAgent(config)
    wire = MPIClientCommunicator(comm, server_rank=0, client_id=config.client_id)
    agent.load_config(wire.get_configuration())
    agent.load_parameters(wire.get_global_model(init_model=True))
    while True:
        agent.train()
        update, metadata = agent.get_parameters()
        answer, status = wire.update_global_model(update, **metadata)
        if status["status"] == "DONE":
            break
        agent.load_parameters(answer)
    wire.invoke_custom_action(action="close_connection")


if __name__ == "__main__":
    if MPI.COMM_WORLD.Get_size() != 1 + len(TEXTS):
        raise SystemExit(f"start it with mpiexec -n {1 + len(TEXTS)}: a server and {len(TEXTS)} clients")
    if MPI.COMM_WORLD.Get_rank() == 0:
        serve(MPI.COMM_WORLD)
    else:
        take_part(MPI.COMM_WORLD)
