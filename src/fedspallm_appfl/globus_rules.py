"""What a run over Globus Compute asks of a configuration beside `config_rules`."""

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fedspallm_appfl.config import Config
from fedspallm_appfl.config_rules import draws
from fedspallm_appfl.data_store import REDIS_LIMIT
from fedspallm_appfl.errors import FedSpaLLMError
from fedspallm_appfl.payload import packed_sizes
from fedspallm_appfl.pruning import KEEP_WEIGHTS
from fedspallm_appfl.sparsity import parse_target

if TYPE_CHECKING:
    from fedspallm_appfl.lazy_model import Skeleton

INLINE_LIMIT = 7_000_000  # bytes of tensors in a task or a result: 10 MB by the service, less what base64 adds


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
                "folder, or use --launcher globus, where its own site names it"
            )


def check_sizes(config: Config) -> Iterator[str]:
    """Whether what travels fits into tasks and results where no data store is configured."""
    from fedspallm_appfl.lazy_model import Skeleton

    if config.client_configs.comm_configs.store.connector != "none":
        return
    try:
        skeleton = Skeleton(config.model.path, config.model.blocks, config.model.dtype)
        sizes = largest_sizes(config, skeleton)
    except (FedSpaLLMError, ValueError):  # `check_with_files` says so
        return
    for what, size in sizes.items():
        if size > INLINE_LIMIT:
            yield (
                f"client_configs.comm_configs.store: {what} may take {size / 1e6:.1f} MB before compression, "
                f"{INLINE_LIMIT / 1e6:.0f} MB fit into a task of Globus Compute; set connector to file or redis"
            )


def largest_sizes(config: Config, skeleton: "Skeleton") -> dict[str, int]:
    """The most bytes of tensors that a client sends in a round, and that are sent to it, before compression."""
    target, dtype = parse_target(config.client_configs.train_configs.sparsity), skeleton.stored_dtype
    blocks = range(len(skeleton.layout.blocks))
    full = [sum(packed_sizes(skeleton.layout.shapes(block), target, dtype).values()) for block in blocks]
    masks = [sum(packed_sizes(skeleton.layout.shapes(block), target, dtype, True).values()) for block in blocks]
    size_of = {
        client.client_id: masks if client.train_configs.pruner in KEEP_WEIGHTS else full for client in config.clients
    }
    rounds = draws(config, len(full))
    up = max(sum(size_of[client][block] for block in mine) for drawn in rounds for client, mine in drawn.items())
    down = {block for drawn in rounds[:-1] for mine in drawn.values() for block in mine}
    return {"what a client sends in a round": up, "what is sent to a client": sum(full[block] for block in down)}
