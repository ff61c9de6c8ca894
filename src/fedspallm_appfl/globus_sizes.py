"""Whether what travels fits into tasks and results of Globus Compute, before anything is sent."""

from collections.abc import Iterator
from dataclasses import replace

from fedspallm_appfl.algorithms import exchanges
from fedspallm_appfl.algorithms.exchange import Exchange, Groups
from fedspallm_appfl.algorithms.gram import GramSettings
from fedspallm_appfl.config import Config, keeps_weights
from fedspallm_appfl.config_rules import draws
from fedspallm_appfl.errors import FedSpaLLMError
from fedspallm_appfl.gram_sweep import shared_inputs
from fedspallm_appfl.lazy_model import LazyModel
from fedspallm_appfl.sparsity import parse_target
from fedspallm_appfl.uploads import sizes

INLINE_LIMIT = 7_000_000  # bytes of tensors in a task or a result: 10 MB by the service, less what base64 adds


def check_sizes(config: Config) -> Iterator[str]:
    """Whether what travels fits into tasks and results where no data store is configured."""
    if config.client_configs.comm_configs.store.connector != "none":
        return
    try:
        largest = largest_sizes(config, LazyModel(config.model.path, config.model.blocks, config.model.dtype))
    except (FedSpaLLMError, ValueError):  # `check_with_files` says so
        return
    for what, size in largest.items():
        if size > INLINE_LIMIT:
            yield (
                f"client_configs.comm_configs.store: {what} may take {size / 1e6:.1f} MB before compression, "
                f"{INLINE_LIMIT / 1e6:.0f} MB fit into a task of Globus Compute; set another connector"
            )


def largest_sizes(config: Config, model: LazyModel) -> dict[str, int]:
    """The most bytes of tensors that a client sends in an exchange, and that are sent to it, before compression."""
    groups = shared_inputs(model) if config.algorithm == "gram" else ()
    made = exchanges(config.algorithm, groups, config.gram.propagate)
    rounds = draws(config, len(model.layout.blocks))
    clients = {client.client_id: client for client in config.clients}
    bytes_of = {
        (exchange, masks): _block_sizes(config, model, replace(exchange, up="masks") if masks else exchange, groups)
        for exchange in made
        for masks in (False, True)
    }
    up = max(
        sum(
            bytes_of[exchange, exchange.up == "weights" and keeps_weights(clients[name].train_configs)].get(block, 0)
            for block in mine
        )
        for drawn in rounds
        for name, mine in drawn.items()
        for exchange in made
    )
    everything = {block for drawn in rounds for mine in drawn.values() for block in mine}
    earlier = {block for drawn in rounds[:-1] for mine in drawn.values() for block in mine}
    agreed: dict[str, set[int]] = {}  # the exchanges of a sweep bring each matrix once
    for number, exchange in enumerate(made):
        if exchange.down:
            agreed.setdefault(exchange.down, set()).update(everything if number + 1 < len(made) else earlier)
    down = sum(
        size
        for kind, blocks in agreed.items()
        for block, size in _block_sizes(config, model, Exchange(kind, None), ()).items()
        if block in blocks
    )
    return {"what a client sends in an exchange": up, "what is sent to a client": down}


def _block_sizes(config: Config, model: LazyModel, exchange: Exchange, groups: Groups) -> dict[int, int]:
    """Bytes of each block in an exchange."""
    layout, target = model.layout, parse_target(config.client_configs.train_configs.sparsity)
    shapes = {block: layout.shapes(block) for block in range(len(layout.blocks))}
    gram = GramSettings(**vars(config.gram))
    of_units = sizes(exchange, shapes, target, model.skeleton.stored_dtype, groups, gram)
    return {block: sum(units.values()) for block, units in of_units.items()}
