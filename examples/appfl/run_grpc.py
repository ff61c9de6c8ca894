"""A plain APPFL script for gRPC that prunes with FedSpaLLM: a server and two clients, each a process of its own.

    python examples/appfl/run_grpc.py server
    python examples/appfl/run_grpc.py client 1
    python examples/appfl/run_grpc.py client 2

Each in a terminal of its own, in any order; clients wait for the server. Addresses stand in `grpc_configs` of server.yaml
and client.yaml.
"""

import argparse

from omegaconf import OmegaConf

from fedspallm_appfl.adaptors.registration import freeze, register

register()  # imports APPFL, without piq, which needs torchvision: it is put off until something uses it

from appfl.agent import ServerAgent  # noqa: E402
from appfl.comm.grpc import GRPCClientCommunicator, GRPCServerCommunicator, serve  # noqa: E402
from client import TEXTS, configuration, take_part  # noqa: E402

freeze()  # APPFL collects garbage several times a message; what is imported need not be looked at each time


def run_server() -> None:
    """APPFL's server with our aggregator and scheduler; it ends once both clients have closed their connection."""
    agent = ServerAgent(OmegaConf.load("examples/appfl/server.yaml"))
    settings = agent.server_agent_config.server_configs.comm_configs.grpc_configs
    serve(GRPCServerCommunicator(agent, logger=agent.logger, **settings), **settings)
    for matrix in agent.aggregator.save_model("runs/appfl/model"):
        print(f"{matrix.sparsity:.4f}  {matrix.name}")


def run_client(number: int) -> None:
    """A client."""
    config = configuration(number)
    take_part(config, GRPCClientCommunicator(config.client_id, **config.comm_configs.grpc_configs))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    roles = parser.add_subparsers(dest="role", required=True)
    roles.add_parser("server")
    roles.add_parser("client").add_argument("number", type=int, choices=range(1, 1 + len(TEXTS)))
    arguments = parser.parse_args()
    if arguments.role == "server":
        run_server()
    else:
        run_client(arguments.number)
