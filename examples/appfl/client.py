"""A client in plain APPFL: the same over MPI, over gRPC and whatever else carries its messages."""

from typing import Any

from appfl.agent import ClientAgent
from omegaconf import DictConfig, OmegaConf

TEXTS = ["austen", "bible"]


def configuration(number: int) -> DictConfig:
    """The file of a client; here one file, in which client 2 has an id and a text of its own."""
    config = OmegaConf.load("examples/appfl/client.yaml")
    config.client_id = f"Client{number}"
    config.train_configs.data.text = f"examples/demo/text/{TEXTS[number - 1]}/calib.txt"
    return config


def take_part(config: DictConfig, wire: Any) -> None:
    """APPFL's plain loop; each turn sends one message of the round.

    Args:
        config: of the client.
        wire: one of APPFL's client communicators.
    """
    agent = ClientAgent(config)
    agent.load_config(wire.get_configuration())
    agent.load_parameters(wire.get_global_model(init_model=True))
    status = "RUNNING"
    while status != "DONE":
        agent.train()
        update, metadata = agent.get_parameters()
        answer, instructions = wire.update_global_model(update, **metadata)
        status = instructions["status"]
        agent.load_parameters((answer, instructions))  # with the blocks of the next round
        for piece in range(1, answer.get("pieces", 1)):  # a large update comes in pieces
            agent.load_parameters(wire.get_global_model(init_model=False, piece=piece))
    wire.invoke_custom_action(action="close_connection")
