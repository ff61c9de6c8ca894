"""From what server and clients are told to the configurations of APPFL's agents."""

from pathlib import Path
from typing import Any

from appfl.agent import ClientAgent, ServerAgent
from appfl.config import ClientAgentConfig, ServerAgentConfig
from omegaconf import OmegaConf

from fedspallm_appfl.adaptors.aggregator import FedSpaLLMAggregator
from fedspallm_appfl.adaptors.registration import register_named
from fedspallm_appfl.adaptors.scheduler import FedSpaLLMScheduler
from fedspallm_appfl.adaptors.trainer import FedSpaLLMTrainer
from fedspallm_appfl.rounds.participants import participants, server_settings
from fedspallm_appfl.settings.schema import ClientSettings, Config, plain

NO_LOG_FILES = {"logging_output_dirname": "", "logging_output_filename": ""}


def server_agent_config(config: Config, state_dir: Path) -> ServerAgentConfig:
    """What `ServerAgent` takes."""
    server = config.server_configs
    made: Any = OmegaConf.structured(ServerAgentConfig)
    made.server_configs = {
        "num_clients": len(participants(config)),
        "num_global_epochs": server.num_global_epochs,
        "optimize_memory": False,  # APPFL would collect garbage several times a message
        "aggregator": server.aggregator,
        "aggregator_kwargs": plain(server_settings(config, state_dir)),
        "scheduler": server.scheduler,
        "scheduler_kwargs": plain(server.scheduler_kwargs),
        **NO_LOG_FILES,
    }
    made.client_configs = {"train_configs": {}}
    return made


def client_agent_config(settings: ClientSettings) -> ClientAgentConfig:
    """What `ClientAgent` takes."""
    train = plain(settings) | NO_LOG_FILES
    made: Any = OmegaConf.create({"client_id": settings.client_id, "optimize_memory": False, "train_configs": train})
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


def client_agent(settings: ClientSettings) -> ClientAgent:
    """A client agent with the trainer of this package, or a subclass that the configuration names.

    Raises:
        ConfigError: it names a class that cannot be had.
    """
    register_named("trainer", settings.trainer, FedSpaLLMTrainer, "client_configs.train_configs.trainer")
    return ClientAgent(client_agent_config(settings))
