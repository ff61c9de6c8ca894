"""What a run will send and keep on disk, before anything runs: arithmetic on shapes and settings.

Memory is in `estimate_memory`. Bytes that travel are those of a run, to the byte; which linears share an input, which
decides how many Gram matrices there are, is guessed from names, as only a forward pass would show it. All sizes are bytes
unless they are called entries.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from fedspallm_appfl.aggregation.l0_mean import vote_dtype
from fedspallm_appfl.algorithms.exchange import Exchange, Groups
from fedspallm_appfl.algorithms.gram import GramSettings
from fedspallm_appfl.algorithms.registry import exchanges
from fedspallm_appfl.errors import ConfigError, FedSpaLLMError, ModelError
from fedspallm_appfl.models.checkpoint import CheckpointFiles, resolve_model
from fedspallm_appfl.models.dtypes import DTYPES
from fedspallm_appfl.models.layout import Layout, Linear, find_layout
from fedspallm_appfl.models.lazy_model import Skeleton, without_weights
from fedspallm_appfl.models.text import cut_windows, load_tokenizer, read_text
from fedspallm_appfl.rounds.uploads import sizes
from fedspallm_appfl.settings.schema import Client, Config, Model, keeps_weights
from fedspallm_appfl.tensors.sparsity import NM, Target, parse_target
from fedspallm_appfl.validation.rules import draws, indivisible, travelling
from fedspallm_appfl.wire.grams import gram_size
from fedspallm_appfl.wire.messages import plan
from fedspallm_appfl.wire.packed import Shapes, packed_sizes

ZSTD_VALUES = {torch.float16: 0.84}  # measured: what shuffled and compressed values shrink to
ZSTD_GRAMS = {"fp32": 0.91, "bf16": 0.80, "int8": 0.81}  # measured on the demo: the same of statistics


@dataclass(frozen=True)
class ModelSizes:
    """What there is to know of a model.

    Attributes:
        outer: entries outside the blocks; what is tied counts once.
        blocks: entries of all parameters of each block.
        linears: of each block, what is pruned.
        vocabulary: token ids.
        stored: dtype of the checkpoint.
        arithmetic: dtype of forward passes.
    """

    outer: int
    blocks: tuple[int, ...]
    linears: tuple[tuple[Linear, ...], ...]
    vocabulary: int
    stored: torch.dtype
    arithmetic: torch.dtype

    @classmethod
    def of(cls, model: nn.Module, layout: Layout, stored: torch.dtype, dtype: str = "auto") -> "ModelSizes":
        """Sizes of a model whose weights need not be read.

        Args:
            model: a causal LM; its parameters may be on the meta device.
            layout: its blocks.
            stored: dtype of the checkpoint.
            dtype: as in `model.dtype`.
        """
        outer, blocks = 0, [0] * len(layout.blocks)
        for name, parameter in model.named_parameters():
            if name.startswith(f"{layout.path}."):
                blocks[int(name.removeprefix(f"{layout.path}.").split(".")[0])] += parameter.numel()
            else:
                outer += parameter.numel()
        vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        arithmetic = stored if dtype == "auto" else DTYPES[dtype]
        return cls(outer, tuple(blocks), layout.blocks, vocabulary, stored, arithmetic)

    @property
    def hidden(self) -> int:
        """H: what the first linear of a block takes."""
        return self.linears[0][0].shape[1]

    @cached_property
    def shapes(self) -> dict[int, Shapes]:
        """For each block (O, I) of each linear."""
        return {block: {one.name: one.shape for one in linears} for block, linears in enumerate(self.linears)}

    @cached_property
    def groups(self) -> Groups:
        """For each block which linears share an input, as guessed."""
        return tuple(
            tuple(tuple(linear.name for linear in group) for group in shared_inputs(linears))
            for linears in self.linears
        )

    def entries(self, block: int) -> int:
        """Prunable entries of a block."""
        return sum(map(entries_of, self.linears[block]))

    def packed(self, block: int, target: Target, parts: str = "weights") -> dict[str, int]:
        """Bytes of each matrix of a block once packed: `weights` with masks, `masks`, or `values`."""
        return packed_sizes(self.shapes[block], target, self.stored, parts)


def entries_of(linear: Linear) -> int:
    """Entries of a matrix."""
    return linear.shape[0] * linear.shape[1]


def shared_inputs(linears: Sequence[Linear]) -> list[list[Linear]]:
    """Linears that are called with the same input, guessed from names and shapes.

    Members of one module that take equally many features share an input, as query, key and value or gate and up do, but
    for the last of several, which leads back from what the others made.
    """
    groups: dict[tuple[str, int, bool], list[Linear]] = {}
    module_of = {linear.name: linear.name.rpartition(".")[0] for linear in linears}
    last = {module_of[linear.name]: linear.name for linear in linears}
    for linear in linears:
        module = module_of[linear.name]
        groups.setdefault((module, linear.shape[1], last[module] == linear.name), []).append(linear)
    return list(groups.values())


@dataclass(frozen=True)
class Outline:
    """What can be known of a model without its weights.

    Attributes:
        folder: its folder, maybe without weights.
        sizes: its sizes.
        assumed: whether there are no weights to see the dtype of, so that it is the one in `config.json`.
    """

    folder: Path
    sizes: ModelSizes
    assumed: bool


def open_outline(settings: Model) -> Outline:
    """Look at a model; of one on the hub that is not here, only the small files are fetched.

    Raises:
        ModelError: the model cannot be opened.
    """
    folder = resolve_model(settings.path, weights=False)
    try:
        CheckpointFiles(folder)
    except ModelError:
        model = without_weights(folder, "auto")
        stored = next(model.parameters()).dtype
        sizes = ModelSizes.of(model, find_layout(model, settings.blocks), stored, settings.dtype)
        return Outline(folder, sizes, assumed=True)
    skeleton = Skeleton(str(folder), settings.blocks, settings.dtype)
    sizes = ModelSizes.of(skeleton.model, skeleton.layout, skeleton.stored_dtype, settings.dtype)
    return Outline(folder, sizes, assumed=False)


def check_pattern(model: ModelSizes, target: Target) -> None:
    """Refuse a pattern n:m that does not fit the rows of some matrix.

    Raises:
        ConfigError: names the first.
    """
    for problem in indivisible(model.linears, target):
        raise ConfigError(problem)


def target_of(config: Config) -> Target:
    """The sparsity of all clients."""
    return parse_target(config.client_configs.train_configs.sparsity)


def gram_of(config: Config) -> GramSettings:
    """Which statistics clients send."""
    return GramSettings(**dataclasses.asdict(config.gram))


def participants(config: Config) -> list[Client]:
    """Those who take part, a pooled one with the windows of all."""
    if config.algorithm != "centralized":
        return config.clients
    [pooled] = config.participants()
    windows = sum(client.data.windows for client in config.clients)
    return [dataclasses.replace(pooled, data=dataclasses.replace(pooled.data, text=[], windows=windows))]


def hidden_copies(config: Config) -> int:
    """Hidden states that a client keeps: its own, and for the dense target those of the dense model."""
    return 1 + (config.algorithm == "gram" and gram_of(config).drift)


def exchanges_of(config: Config, model: ModelSizes) -> tuple[Exchange, ...]:
    """The exchanges of a round."""
    return exchanges(config.algorithm, model.groups, config.gram.propagate)


def up_sizes(
    config: Config, model: ModelSizes, exchange: Exchange, mask_only: bool = False
) -> dict[int, dict[str, int]]:
    """Bytes of each unit that goes up in an exchange, by block.

    Args:
        config: the experiment.
        model: its model.
        exchange: the exchange.
        mask_only: of a client whose pruner leaves kept weights as they are, so that they need not travel.
    """
    if mask_only and exchange.up == "weights":
        exchange = dataclasses.replace(exchange, up="masks")
    return sizes(exchange, model.shapes, target_of(config), model.stored, model.groups, gram_of(config))


def down_sizes(config: Config, model: ModelSizes, exchange: Exchange) -> dict[int, dict[str, int]]:
    """Bytes of each matrix that an exchange sends down, by block."""
    if exchange.down is None:
        return {}
    blocks = [block for block in model.shapes if exchange.concerns(block)]
    packed = {block: model.packed(block, target_of(config), exchange.down) for block in blocks}
    if exchange.only is None:
        return packed
    block, leader = exchange.only
    names = next(names for names in model.groups[block] if names[0] == leader)
    return {block: {name: packed[block][name] for name in names}}


@dataclass(frozen=True)
class RoundTraffic:
    """What travels in one round: bytes of tensors; names and shapes add less than a kilobyte a matrix.

    Attributes:
        blocks: blocks that some client prunes.
        up: client -> bytes that it sends in all exchanges, without compression.
        zstd: client -> bytes that it sends with compression, roughly.
        dense: client -> bytes of the same blocks dense in float16.
        down: bytes that each client gets, without compression; nothing after the last exchange of all.
    """

    blocks: int
    up: Mapping[str, int]
    zstd: Mapping[str, int]
    dense: Mapping[str, int]
    down: int


@dataclass(frozen=True)
class _Uploads:
    """What a client sends of each block in all exchanges of a round: bytes, and roughly those with compression."""

    plain: Mapping[int, int]
    zstd: Mapping[int, float]


def traffic(config: Config, model: ModelSizes) -> list[RoundTraffic]:
    """What travels in each round, with the layers that the run will draw."""
    made, rounds = exchanges_of(config, model), draws(config, len(model.blocks))
    uploads = {
        client.client_id: _uploads(config, model, made, keeps_weights(client.train_configs))
        for client in participants(config)
    }
    down = [_down(config, model, made)] * (len(rounds) - 1) + [_down(config, model, made[:-1])]
    return [_round(model, assigned, uploads, answers) for assigned, answers in zip(rounds, down, strict=True)]


def _uploads(config: Config, model: ModelSizes, made: Sequence[Exchange], mask_only: bool) -> _Uploads:
    plain, zstd = dict.fromkeys(model.shapes, 0), dict.fromkeys(model.shapes, 0.0)
    for exchange in made:
        share = exchange_share(config, model, exchange, mask_only)
        for block, units in up_sizes(config, model, exchange, mask_only).items():
            plain[block] += sum(units.values())
            zstd[block] += share * sum(units.values())
    return _Uploads(plain, zstd)


def _down(config: Config, model: ModelSizes, made: Sequence[Exchange]) -> dict[int, int]:
    """Bytes of each block that some exchanges send down together."""
    total = dict.fromkeys(model.shapes, 0)
    for exchange in made:
        for block, linears in down_sizes(config, model, exchange).items():
            total[block] += sum(linears.values())
    return total


def _round(
    model: ModelSizes,
    assigned: Mapping[str, Sequence[int]],
    uploads: Mapping[str, _Uploads],
    down: Mapping[int, int],
) -> RoundTraffic:
    changed = {block for mine in assigned.values() for block in mine}
    return RoundTraffic(
        blocks=len(changed),
        up={client: sum(uploads[client].plain[block] for block in mine) for client, mine in assigned.items()},
        zstd={client: round(sum(uploads[client].zstd[block] for block in mine)) for client, mine in assigned.items()},
        dense={client: 2 * sum(map(model.entries, mine)) for client, mine in assigned.items()},
        down=sum(down[block] for block in changed),
    )


def exchange_share(config: Config, model: ModelSizes, exchange: Exchange, mask_only: bool) -> float:
    """What an upload shrinks to when it is compressed, roughly."""
    if exchange.up == "grams":
        return ZSTD_GRAMS[config.gram.precision]
    only_masks = mask_only and exchange.up == "weights"
    return zstd_share(target_of(config), model.stored, "masks" if only_masks else exchange.up)


def zstd_share(target: Target, dtype: torch.dtype, parts: str = "weights") -> float:
    """The same of `weights` with masks, `masks`, or `values`: masks to their entropy, float16 values as measured."""
    zeros = target.zeros(10**6) / 10**6 if not isinstance(target, NM) else 1 - target.kept / target.group
    mask = 0.0 if parts == "values" else 1 / 8
    values = 0.0 if parts == "masks" else (1 - zeros) * dtype.itemsize
    small = mask * _mask_entropy(target, zeros) + values * ZSTD_VALUES.get(dtype, 1.0)
    return small / (mask + values)


def _mask_entropy(target: Target, zeros: float) -> float:
    """Bits an entry."""
    if isinstance(target, NM):
        return math.log2(math.comb(target.group, target.kept)) / target.group
    return -sum(share * math.log2(share) for share in (zeros, 1 - zeros) if share)


@dataclass(frozen=True)
class Messages:
    """The messages of a client in a round, as many as they are for each of them.

    Attributes:
        count: messages in all exchanges.
        largest: bytes of the largest.
    """

    count: int
    largest: int


def messages(config: Config, model: ModelSizes) -> Messages:
    """The messages of a client that is alone on its rank.

    Raises:
        ConfigError: a matrix, or the statistics of an input, exceed the limit on the way up or down.
    """
    comm = config.client_configs.comm_configs
    for table in travelling(config, model.shapes, model.stored, model.groups):
        plan(table, comm.blocks_per_message, comm.max_message_bytes)
    mask_only = all(keeps_weights(client.train_configs) for client in config.clients)
    sent = []
    for exchange in exchanges_of(config, model):
        bytes_of = up_sizes(config, model, exchange, mask_only)
        parts = plan(up_sizes(config, model, exchange), comm.blocks_per_message, comm.max_message_bytes)
        sent += [sum(bytes_of[block][name] for block, name in part) for part in parts]
    return Messages(len(sent), max(sent))


@dataclass(frozen=True)
class Transport:
    """Whether a transport can carry the messages.

    Attributes:
        name: of the transport.
        carries: whether it can.
        why: what to know or to change.
    """

    name: str
    carries: bool
    why: str


def transports(config: Config, model: ModelSizes) -> list[Transport]:
    """Whether each transport of this machine can carry the messages, with the setting to change when not."""
    try:
        messages(config, model)
    except ConfigError as error:
        return [Transport(name, False, str(error)) for name in ("serial", "MPI")]
    return [Transport("serial", True, "memory to memory"), _mpi(config, model)]


def _mpi(config: Config, model: ModelSizes) -> Transport:
    if config.algorithm == "centralized":
        return Transport("MPI", False, "centralized pools the text of all clients in one process")
    # With values whatever the pruner, as messages are planned.
    tables = [up_sizes(config, model, exchange) for exchange in exchanges_of(config, model)]
    unit = max(size for table in tables for units in table.values() for size in units.values())
    limit, clients = config.client_configs.comm_configs.max_message_bytes, len(config.clients)
    together = min(limit // unit, clients)  # clients whose messages fit into that of their rank
    ranks = f"with {-(-clients // together)} client ranks or more; for fewer raise comm_configs.max_message_bytes"
    return Transport("MPI", True, "with any number of ranks" if together == clients else ranks)


@dataclass(frozen=True)
class Disk:
    """Something that a run writes.

    Attributes:
        what: its place in the run directory, or elsewhere.
        nbytes: bytes of its tensors; headers, and what of a model's folder is copied beside the weights, add little.
        stays: whether it is there when the run is over.
    """

    what: str
    nbytes: int
    stays: bool


def disk(config: Config, model: ModelSizes) -> list[Disk]:
    """What the server writes, and the clients of one process together."""
    alone = config.algorithm == "standalone"
    written = [
        Disk("models/" if alone else "model/", (len(config.clients) if alone else 1) * _checkpoint(model), True),
        Disk("statistics/", _statistics(config, model), True),
        Disk("state/ on the server", _state(config, model), False),
        *(_at_a_site(config, model) if config.over_globus() else _beside_the_run(config, model)),
    ]
    return [one for one in written if one.nbytes]


def _beside_the_run(config: Config, model: ModelSizes) -> Iterator[Disk]:
    yield Disk("pruned blocks and masks of the clients of a process", _agreed(config, model), False)
    everybody = sum(_hidden_states(config, model, client) for client in participants(config))
    yield Disk("hidden states of all clients, in TMPDIR", everybody, False)


def _at_a_site(config: Config, model: ModelSizes) -> Iterator[Disk]:
    yield Disk("what came down to a client, in TMPDIR of its worker", _agreed(config, model), False)
    most = max(_hidden_states(config, model, client) for client in config.clients)
    yield Disk("hidden states of a client, in TMPDIR of its worker", most, False)


def _checkpoint(model: ModelSizes) -> int:
    return (model.outer + sum(model.blocks)) * model.stored.itemsize


def _pruned(config: Config, model: ModelSizes) -> dict[str, set[int]]:
    """The blocks that each participant prunes in some round."""
    rounds = draws(config, len(model.blocks))
    return {client: {block for assigned in rounds for block in assigned[client]} for client in config.roster()}


def _statistics(config: Config, model: ModelSizes) -> int:
    """Sums of Gram matrices, which serve further targets."""
    if config.algorithm != "gram" or config.gram.propagate != "dense":
        return 0
    blocks = set().union(*_pruned(config, model).values())
    features = (model.shapes[block][names[0]][1] for block in blocks for names in model.groups[block])
    return sum(gram_size(one, "fp32") for one in features)


def _state(config: Config, model: ModelSizes) -> int:
    """Packed models, masks that were agreed on, and sums that later rounds need."""
    mine, target = _pruned(config, model), target_of(config)
    everybody, compare = set().union(*mine.values()), config.comparisons()

    def packed(blocks: set[int], parts: str = "weights") -> int:
        return sum(sum(model.packed(block, target, parts).values()) for block in blocks)

    stored = 0 if config.algorithm == "standalone" else packed(everybody)
    stored += packed(everybody) if "fedavg" in compare else 0
    stored += sum(map(packed, mine.values())) if "standalone" in (config.algorithm, *compare) else 0
    stored += packed(everybody, "masks") if config.algorithm == "consensus" else 0
    cumulative = config.server_configs.aggregator_kwargs.fold == "cumulative"
    entry = _cumulative_bytes(config) if cumulative else 0
    return stored + entry * sum(map(model.entries, everybody))


def _cumulative_bytes(config: Config) -> int:
    """Bytes an entry of sums that are kept for later rounds; those of `gram` are its statistics."""
    clients = len(config.clients) * config.server_configs.num_global_epochs
    if config.algorithm in ("fedprllm", "consensus"):
        return vote_dtype(clients).itemsize
    return sums_bytes(clients, is_weighted(config)) if config.algorithm in ("fedspallm", "fedavg") else 0


def sums_bytes(clients: int, weighted: bool) -> int:
    """Bytes an entry of the sums of weights: sum, votes, and with client weights the weight of those that kept it."""
    return torch.int64.itemsize + vote_dtype(clients).itemsize + (torch.int32.itemsize if weighted else 0)


def is_weighted(config: Config) -> bool:
    """Whether clients count by their calibration windows."""
    return config.server_configs.aggregator_kwargs.weights == "sample_size"


def _agreed(config: Config, model: ModelSizes) -> int:
    """What came down, of which later rounds replace what earlier ones sent."""
    made, rounds = exchanges_of(config, model), draws(config, len(model.blocks))
    everything, last = _down(config, model, made), _down(config, model, made[:-1])
    early = {block for assigned in rounds[:-1] for mine in assigned.values() for block in mine}
    late = {block for mine in rounds[-1].values() for block in mine} - early
    return sum(everything[block] for block in early) + sum(last[block] for block in late)


def _hidden_states(config: Config, model: ModelSizes, client: Client) -> int:
    """Hidden states of a client that keeps them in a file."""
    tokens = client.data.windows * client.data.length if client.data.activations == "file" else 0
    return hidden_copies(config) * tokens * model.hidden * model.arithmetic.itemsize


def evaluation_windows(config: Config, folder: Path) -> dict[str, int] | None:
    """Windows of each text that is evaluated; None if the texts would have to be counted and cannot be read.

    Args:
        config: the experiment.
        folder: model folder with the tokenizer.
    """
    settings = config.evaluation
    if settings.windows is not None:
        return dict.fromkeys(settings.texts, settings.windows)
    try:
        tokenizer = load_tokenizer(folder)
        return {
            name: len(cut_windows(tokenizer, read_text(text), settings.length)) for name, text in settings.texts.items()
        }
    except FedSpaLLMError:
        return None
