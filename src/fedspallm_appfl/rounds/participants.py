"""Who takes part in an experiment, what server and clients are told, and which blocks each client prunes in which round."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedspallm_appfl.aggregation.layer_sampling import draw
from fedspallm_appfl.algorithms import registry
from fedspallm_appfl.algorithms.algorithm import Algorithm, Exchange, Groups
from fedspallm_appfl.algorithms.references import POOLED
from fedspallm_appfl.events import EventLog
from fedspallm_appfl.pruning import registry as pruners
from fedspallm_appfl.secure.identity import Roster
from fedspallm_appfl.settings.reading import build
from fedspallm_appfl.settings.schema import Client, ClientSettings, Config, Pooled, ServerSettings, TrainConfigs, plain

OWN_WINDOWS = 8  # where no text of the server's shows the quality
Draws = Sequence[Mapping[str, list[int]]]


def algorithm_of(config: Config) -> Algorithm:
    """The algorithm of an experiment."""
    return registry.find(config.algorithm)


def participants(config: Config) -> list[Client]:
    """The clients of the experiment; where the text is pooled one that has all of it, with the windows of all."""
    if not algorithm_of(config).pools_text:
        return config.clients
    shared, windows = config.client_configs, sum(client.data.windows for client in config.clients)
    data = dataclasses.replace(shared.data, windows=windows)
    return [Client(shared.train_configs, data, shared.comm_configs, client_id=POOLED)]


def pool(config: Config) -> list[Pooled]:
    """Whose text the one participant has, where the text is pooled."""
    clients = config.clients if algorithm_of(config).pools_text else []
    return [Pooled(client.client_id, client.data.text, client.data.windows, client.data.field) for client in clients]


def comparisons(config: Config) -> list[str]:
    """What is made beside the global model, of the same uploads."""
    return config.evaluation.compare if algorithm_of(config).compares else []


def own_windows(config: Config) -> int:
    """Windows of its own text on which each client measures the result."""
    asked, usual = config.evaluation.own_windows, 0 if config.evaluation.texts else OWN_WINDOWS
    return usual if asked is None else asked


def roster(config: Config) -> dict[str, float]:
    """Participant's id -> resource share, in the order of the file."""
    return {client.client_id: client.train_configs.resource_share for client in participants(config)}


def whole(config: Config, log: EventLog) -> list[str]:
    """Clients that took part to the end: a part of a model is none to compare with."""
    left_out = {event["client"] for event in log.of("absent")}
    return [client for client in roster(config) if client not in left_out]


def partial_clients(config: Config) -> list[str]:
    """Clients that prune some of the blocks only."""
    return [client.client_id for client in config.clients if client.train_configs.resource_share < 1]


def hidden(config: Config) -> int:
    """Of how many clients the server sees sums alone; 0 where it sees each one's uploads."""
    return len(config.clients) if config.server_configs.secure_sums and algorithm_of(config).adds_up else 0


def public_keys(config: Config) -> dict[str, str]:
    """Client -> its public key, where clients of secure sums have identities.

    Raises:
        ConfigError: the roster cannot be read.
    """
    server = config.server_configs
    return dict(Roster.read(Path(server.roster).expanduser()).keys) if server.secure_sums and server.roster else {}


def exchanges(config: Config, groups: Groups) -> tuple[Exchange, ...]:
    """The exchanges of the last round.

    Args:
        config: the experiment.
        groups: linears that share an input.
    """
    own, signed = algorithm_of(config), config.server_configs.roster is not None
    return own.exchanges(groups, config.gram, config.recovery, hidden(config), signed)


def needs_text(client: Client) -> bool:
    """Whether a client's pruner has to see its text."""
    return pruners.find(client.train_configs.pruner).needs is not None


def tokens(config: Config) -> dict[str, int]:
    """Client -> calibration tokens, of those whose pruner or recovery sees text."""
    sees = [one for one in participants(config) if needs_text(one) or config.recovery.rounds]
    return {one.client_id: one.data.windows * one.data.length for one in sees}


def _fits(client: Client) -> bool:
    """Whether a client's kept weights come of least squares, or of little damping: either lets them go far."""
    pruner, train = pruners.find(client.train_configs.pruner), client.train_configs
    return pruner.fits or pruner.refits(train.refit) or train.damping < TrainConfigs.damping


def draws(config: Config, blocks: int | Sequence[int]) -> Draws:
    """The blocks of each participant in each round, of those that have something to prune."""
    if config.recovery.model:
        return [dict.fromkeys(roster(config), [])]
    rounds, strategy = config.server_configs.num_global_epochs, config.client_configs.train_configs.layer_sampling
    return [draw(strategy, config.seed, index, rounds, roster(config), blocks) for index in range(rounds)]


def uncovered(config: Config, blocks: int | Sequence[int]) -> list[int]:
    """Blocks that no client prunes in any round, with the layers that the run will draw."""
    if config.recovery.model:
        return []
    drawn = {block for assigned in draws(config, blocks) for mine in assigned.values() for block in mine}
    return sorted(set(range(blocks) if isinstance(blocks, int) else blocks) - drawn)


def server_settings(config: Config, state_dir: Path) -> ServerSettings:
    """What the aggregator is told.

    Args:
        config: the experiment.
        state_dir: folder for packed blocks and sums.
    """
    server, train, comm = config.server_configs, config.client_configs.train_configs, config.client_configs.comm_configs
    own = {
        "model": config.model,
        "prune": config.prune,
        "algorithm": config.algorithm,
        "gram": config.gram,
        "recovery": config.recovery,
        "comparisons": comparisons(config),
        "mask_only": [
            client.client_id for client in participants(config) if pruners.keeps_weights(client.train_configs)
        ],
        "seed": config.seed,
        "rounds": server.num_global_epochs,
        "secure_sums": server.secure_sums,
        "roster": roster(config),
        "public_keys": public_keys(config),
        "windows": {client.client_id: client.data.windows for client in participants(config) if needs_text(client)},
        "tokens": tokens(config),
        "fitted": [client.client_id for client in participants(config) if _fits(client)],
        "device": server.device,
        "max_message_bytes": comm.max_message_bytes,
        "compression": comm.compression,
        "own_windows": own_windows(config),
        "state_dir": str(state_dir),
    }
    made: ServerSettings = build(ServerSettings, plain(train) | plain(server.aggregator_kwargs) | plain(own))
    return made


def client_settings(
    config: Config,
    client: Client,
    devices: Sequence[str],
    message_bytes: int,
    agreed: Path | None = None,
    kept: Path | None = None,
) -> ClientSettings:
    """What a trainer is told.

    Args:
        config: the experiment.
        client: the client, with the shared part merged in.
        devices: where it runs, as `choose_devices` decided; none where its site decides.
        message_bytes: bytes that one of its messages may have.
        agreed: folder for the pruned blocks that come down, shared by the clients of this process; None: one each.
        kept: folder for the hidden states of clients; None: nothing is kept for a later start.
    """
    own = {
        "client_id": client.client_id,
        "devices": list(devices),
        "model": config.model,
        "prune": config.prune,
        "data": {**plain(client.data), "pool": plain(pool(config))},
        "comm": {**plain(client.comm_configs), "max_message_bytes": message_bytes},
        "seed": config.seed,
        "algorithm": config.algorithm,
        "gram": config.gram,
        "recovery": config.recovery,
        "rounds": config.server_configs.num_global_epochs,
        "secure_sums": config.server_configs.secure_sums,
        "roster": roster(config) if config.server_configs.secure_sums else {},
        "public_keys": public_keys(config),
        "tokens": tokens(config) if config.server_configs.secure_sums else {},
        "identity": client.identity,
        "own_windows": own_windows(config),
        "agreed": str(agreed) if agreed else None,
        "checkpoints": str(kept / client.client_id) if kept else None,
        "checkpoint_every": config.checkpoint_every,
    }
    made: ClientSettings = build(ClientSettings, plain(client.train_configs) | plain(own))
    return made
