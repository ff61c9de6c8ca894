"""What a run over Globus Compute asks of a configuration beside `config_rules`."""

import copy
from collections.abc import Iterator

from fedspallm_appfl.globus.store.objects import REDIS_LIMIT
from fedspallm_appfl.settings.schema import Config


def prepared(config: Config) -> Config:
    """The configuration as it is used: without paths of private text, which only the sites know, and with compression."""
    made = copy.deepcopy(config)
    for group in (made.client_configs, *made.clients):
        group.data.text = None
        comm = group.comm_configs
        comm.compression = "zstd" if comm.compression == "auto" else comm.compression
        if comm.store.connector == "redis":
            comm.max_message_bytes = min(comm.max_message_bytes, REDIS_LIMIT)
    return made


def check(config: Config) -> Iterator[str]:
    """Problems of the values for a run over Globus Compute."""
    if config.algorithm == "centralized":
        yield "algorithm: centralized has the text of all clients in one place, which Globus Compute is there to avoid"
    trainer = config.client_configs.train_configs.trainer
    if ":" in trainer:
        yield (
            f"client_configs.train_configs.trainer: a site runs no code of the server's, got {trainer!r}; "
            "over Globus Compute take FedSpaLLMTrainer"
        )
    for index, client in enumerate(config.clients):
        if not client.endpoint_id:
            yield (
                f"clients.{index}.endpoint_id: client {client.client_id!r} has no endpoint; give the UUID that "
                "globus-compute-endpoint list shows at its site"
            )


def check_on_this_machine(config: Config) -> Iterator[str]:
    """Problems of a configuration that is meant for Globus Compute when it runs here."""
    for index, client in enumerate(config.clients):
        if client.endpoint_id and not client.data.text and client.train_configs.pruner != "magnitude":
            yield (
                f"clients.{index}.data.text: client {client.client_id!r} has no private text here; name a file or a "
                "folder, or use fedspallm run --launcher globus, where its own site names it"
            )
