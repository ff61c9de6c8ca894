"""From one configuration to the configurations of APPFL's agents."""

import dataclasses
from pathlib import Path
from typing import Any

from appfl.agent import ClientAgent, ServerAgent
from appfl.config import ClientAgentConfig, ServerAgentConfig
from omegaconf import OmegaConf

from fedspallm_appfl.adaptors.aggregator import FedSpaLLMAggregator
from fedspallm_appfl.adaptors.registration import register_named
from fedspallm_appfl.adaptors.scheduler import FedSpaLLMScheduler
from fedspallm_appfl.adaptors.trainer import FedSpaLLMTrainer
from fedspallm_appfl.settings.schema import Client, Config, TrainConfigs, keeps_weights


def server_agent_config(config: Config, state_dir: Path) -> ServerAgentConfig:
    """What `ServerAgent` takes.

    Args:
        config: the experiment.
        state_dir: folder for packed blocks and sums.
    """
    server, train = config.server_configs, config.client_configs.train_configs
    aggregator = (
        dataclasses.asdict(server.aggregator_kwargs)
        | _algorithm(config, train)
        | {
            "threads": train.threads,
            "model": dataclasses.asdict(config.model),
            "layer_sampling": train.layer_sampling,
            "seed": config.seed,
            "rounds": server.num_global_epochs,
            "roster": config.roster(),
            "device": server.device,
            "comparisons": config.comparisons(),
            "max_message_bytes": config.client_configs.comm_configs.max_message_bytes,
            "compression": config.client_configs.comm_configs.compression,
            "mask_only": [client.client_id for client in config.participants() if keeps_weights(client.train_configs)],
            "state_dir": str(state_dir),
        }
    )
    made: Any = OmegaConf.structured(ServerAgentConfig)
    made.server_configs = {
        "num_clients": len(config.participants()),
        "num_global_epochs": server.num_global_epochs,
        "optimize_memory": False,  # APPFL would collect garbage several times a message
        "aggregator": server.aggregator,
        "aggregator_kwargs": aggregator,
        "scheduler": server.scheduler,
        "scheduler_kwargs": dataclasses.asdict(server.scheduler_kwargs),
        "logging_output_dirname": "",
        "logging_output_filename": "",
    }
    made.client_configs = {"train_configs": {}}
    return made


def _algorithm(config: Config, train: TrainConfigs) -> dict[str, Any]:
    """What server and clients both know of what is computed; the server prunes itself with `gram`."""
    return {"algorithm": config.algorithm, "gram": dataclasses.asdict(config.gram)} | {
        name: getattr(train, name)
        for name in ("pruner", "sparsity", "damping", "damping_retries", "iterations", "refit")
    }


def _pool(config: Config) -> list[dict[str, Any]]:
    """Whose text the one participant of `centralized` has."""
    clients = config.clients if config.algorithm == "centralized" else []
    return [{"client_id": c.client_id, "text": c.data.text, "windows": c.data.windows} for c in clients]


def client_agent_config(
    config: Config, client: Client, device: str, message_bytes: int, agreed: Path | None = None
) -> ClientAgentConfig:
    """What `ClientAgent` takes.

    Args:
        config: the experiment.
        client: the client, with the shared part merged in.
        device: where it runs; `auto` was decided by `choose_device`.
        message_bytes: bytes that one of its messages may have.
        agreed: folder for the pruned blocks that come down, shared by the clients of this process; None: one each.
    """
    train = dataclasses.asdict(client.train_configs) | {
        "client_id": client.client_id,
        "device": device,
        "model": dataclasses.asdict(config.model),
        "data": {**dataclasses.asdict(client.data), "pool": _pool(config)},
        "comm": {**dataclasses.asdict(client.comm_configs), "max_message_bytes": message_bytes},
        "seed": config.seed,
        "algorithm": config.algorithm,
        "gram": dataclasses.asdict(config.gram),
        "rounds": config.server_configs.num_global_epochs,
        "agreed": str(agreed) if agreed else None,
        "logging_output_dirname": "",
        "logging_output_filename": "",
    }
    made: Any = OmegaConf.create({"client_id": client.client_id, "optimize_memory": False, "train_configs": train})
    return made


def server_agent(config: Config, state_dir: Path) -> ServerAgent:
    """A server agent with the aggregator and scheduler of this package, or subclasses that the configuration names.

    Raises:
        ConfigError: it names a class that cannot be had.
    """
    server = config.server_configs
    register_named("aggregator", server.aggregator, FedSpaLLMAggregator, "server_configs.aggregator")
    register_named("scheduler", server.scheduler, FedSpaLLMScheduler, "server_configs.scheduler")
    return ServerAgent(server_agent_config(config, state_dir))


def client_agent(
    config: Config, client: Client, device: str, message_bytes: int, agreed: Path | None = None
) -> ClientAgent:
    """A client agent with the trainer of this package, or a subclass that the configuration names.

    Raises:
        ConfigError: it names a class that cannot be had.
    """
    trainer = client.train_configs.trainer
    register_named("trainer", trainer, FedSpaLLMTrainer, "client_configs.train_configs.trainer")
    return ClientAgent(client_agent_config(config, client, device, message_bytes, agreed))
