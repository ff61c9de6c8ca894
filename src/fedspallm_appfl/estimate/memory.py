"""How much memory a run will take, before anything runs: that of the tensors alive at the worst moment of each side.

* A client at rest holds its outer parts, its token ids and its activations. On top of them it collects statistics of a
  block (the statistics, and what a forward pass makes on its way), prunes it matrix by matrix, or runs it again (and holds
  what it pruned). With `gram` it packs statistics instead. The worst of these counts;
* the server holds sums of the open blocks, one upload, and what closing a unit takes beside them; with `gram` it prunes;
* afterwards it evaluates, which is a forward pass over all windows of all texts, and logits.

Not counted is what a process holds before it does anything (Python and its packages, see `resident_now`) and what a
tokenizer makes of a text. All sizes are bytes unless they are called entries.

Legend: O out features, I in features, H hidden size, F widest input or output of a linear, B windows in a batch, T tokens
in a window, L decoder blocks.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fedspallm_appfl.aggregation.l0_mean import vote_dtype
from fedspallm_appfl.algorithms.exchange import Exchange
from fedspallm_appfl.estimate.traffic import (
    ModelSizes,
    entries_of,
    exchanges_of,
    gram_of,
    hidden_copies,
    is_weighted,
    participants,
    shared_inputs,
    sums_bytes,
    target_of,
    up_sizes,
)
from fedspallm_appfl.models.layout import Linear
from fedspallm_appfl.pruning.least_squares import ROWS
from fedspallm_appfl.pruning.pruner import Settings
from fedspallm_appfl.pruning.sparsegpt import COLUMN_BLOCK
from fedspallm_appfl.rounds.folds import Aggregation
from fedspallm_appfl.settings.schema import Client, Config, TrainConfigs, keeps_weights
from fedspallm_appfl.tensors import triangle
from fedspallm_appfl.validation.rules import draws
from fedspallm_appfl.wire.packed import packed_size, packed_sizes

FLOAT = 4  # bytes of what statistics and pruners calculate in
EXACT = 16  # bytes an entry of a sum of statistics
# Bytes an entry of what a pruner makes of a matrix, measured: float32 copies, some to be sorted, and masks.
PRUNING = {"sparsegpt": 11, "admm": 20, "wanda": 14, "magnitude": 11}
FITTING = {"sparsegpt": 9, "admm": 5, "wanda": 9}  # for least squares: the solution, a mask, and where it started from
STRIPS = 5  # float32 copies of the rows that least squares solves together
SUMMING = 4  # float32 copies of the rows of a Gram matrix that are packed or summed together
CLOSING = 6  # bytes an entry beside the sums: the mean, and what choosing among equal votes makes
AVERAGING = 18  # the same for FedAvg: the average, its magnitude, a copy to be sorted, masks, and what of it is packed
PRUNED = 5  # bytes an entry of a matrix that the server has pruned and not yet packed
SHIFTING = 5  # squares that solving for the dense target takes: Gram, drift, a copy of either, and the solution
APPFL = 80_000_000  # measured: what APPFL 1.12 adds to a process that has torch and transformers
HEAP_SHARE, HEAP_MOST = 0.2, 2**26  # measured: freed matrices below 32 MiB may stay with the C library's allocator


@dataclass(frozen=True)
class Memory:
    """Memory of a process at its worst moment.

    Attributes:
        parts: what for -> bytes; they are alive at the same time.
        mapped: bytes of mapped files that count as resident while they are read; the kernel takes them back when it must.
    """

    parts: Mapping[str, int]
    mapped: int = 0

    @property
    def needed(self) -> int:
        """Bytes without mapped files."""
        return sum(self.parts.values())

    @property
    def resident(self) -> int:
        """Bytes with mapped files: what the system reports as resident, less what was there before."""
        return self.needed + self.mapped


Parts = dict[str, int]


def with_heap(parts: Parts, mapped: int = 0) -> Memory:
    """Parts that are alive together, with what the C library's allocator keeps."""
    return Memory({**parts, "heap": min(int(HEAP_SHARE * sum(parts.values())), HEAP_MOST)}, mapped)


def worst(moments: Iterable[Parts]) -> Parts:
    """The moment at which the most is alive."""
    return max(moments, key=lambda parts: sum(parts.values()))


def client_memory(config: Config, model: ModelSizes, client: Client) -> Memory:
    """Memory of one client that is alone in its process."""
    states = _activations(model, *_windows(client), hidden_copies(config))
    on_disk = client.data.activations == "file"
    parts = {
        "outer parts": model.outer * model.arithmetic.itemsize,
        "activations": 0 if on_disk else states,
        "earlier blocks of a message": _earlier(config, model, client),
    }
    moments = _gathering if config.algorithm == "gram" else _pruning
    work = (moment for block in range(len(model.blocks)) for moment in moments(config, model, client, block))
    return with_heap(parts | worst(work), _mapped(model) + on_disk * states)


def _earlier(config: Config, model: ModelSizes, client: Client) -> int:
    """Blocks that are packed and wait for the last one of their message."""
    mask_only = keeps_weights(client.train_configs)
    tables = (up_sizes(config, model, exchange, mask_only) for exchange in exchanges_of(config, model))
    packed = (sum(units.values()) for table in tables for units in table.values())
    return min(client.comm_configs.blocks_per_message - 1, len(model.blocks) - 1) * max(packed)


def _windows(client: Client) -> tuple[int, int]:
    """Calibration windows and their length; a client without text takes one short window (see `local_client`)."""
    without = client.data.text is None and client.train_configs.pruner == "magnitude"
    return (1, 2) if without else (client.data.windows, client.data.length)


def _activations(model: ModelSizes, windows: int, length: int, copies: int = 1) -> int:
    """Hidden states of all windows, and their token ids."""
    return windows * length * (copies * model.hidden * model.arithmetic.itemsize + torch.int64.itemsize)


def _tokens(client: Client) -> int:
    """Tokens in a batch."""
    windows, length = _windows(client)
    return min(client.data.batch, windows) * length


def _block(model: ModelSizes, block: int) -> int:
    return model.blocks[block] * model.arithmetic.itemsize


def _pruning(config: Config, model: ModelSizes, client: Client, block: int) -> Iterator[Parts]:
    """What a client that prunes takes beside what it holds at rest while it works at a block."""
    settings, tokens = settings_of(config, client.train_configs), _tokens(client)
    groups = [(group, statistic_bytes(group[0].shape[1], settings)) for group in shared_inputs(model.linears[block])]
    # A mask; and the rounded weight, but where it is the block's own (see `LazyModel.put`).
    held = 1 if model.arithmetic == model.stored else 1 + model.stored.itemsize
    forward = model.entries(block) * held + tokens * forward_bytes(model, block)
    if settings.pruner != "magnitude":
        statistics = sum(statistic for _, statistic in groups)
        forward = max(forward, statistics + tokens * statistics_bytes(model, block, settings.keeps_weights))
    yield {"one block": _block(model, block), "forward passes": forward}
    yield {"one block": _block(model, block), "pruning a block": pruning_bytes(groups, model.stored, settings, held)}


def settings_of(config: Config, train: TrainConfigs) -> Settings:
    """How a client prunes a matrix, as far as memory depends on it."""
    return Settings(train.pruner, target_of(config), refit=train.refit)


def statistic_bytes(features: int, settings: Settings) -> int:
    """Bytes of what is known of one input: a Gram matrix, its diagonal, or nothing."""
    if settings.pruner == "magnitude":
        return 0
    return FLOAT * features * (1 if settings.keeps_weights else features)


def forward_bytes(model: ModelSizes, block: int) -> int:
    """Bytes a token inside a block, at most: in its MLP, where all that widened is alive and one more is made of it."""
    widest = max(max(linear.shape) for linear in model.linears[block])
    widening = sum(linear.shape[0] == widest for linear in model.linears[block])
    return model.arithmetic.itemsize * ((widening + 1) * widest + 2 * model.hidden)


def statistics_bytes(model: ModelSizes, block: int, norms: bool) -> int:
    """Bytes a token inside a block while its inputs are looked at: they stay alive, and the widest is converted."""
    size, hidden = model.arithmetic.itemsize, model.hidden
    widest = max(linear.shape[1] for linear in model.linears[block])
    converted = (FLOAT if size != FLOAT else 0) + (FLOAT if norms else 0)  # float32, and its squares
    return max(forward_bytes(model, block) + 2 * hidden * size, widest * (size + converted) + 4 * hidden * size)


def pruning_bytes(
    groups: Sequence[tuple[Sequence[Linear], int]], stored: torch.dtype, settings: Settings, held: int
) -> int:
    """The most that pruning a block takes beside the block itself.

    Args:
        groups: linears that share an input, with the bytes of its statistic; in the order of pruning.
        stored: dtype of the checkpoint.
        settings: how to prune.
        held: bytes an entry of a matrix that is done.
    """
    dense = 0 if stored.itemsize == FLOAT else FLOAT  # a float32 checkpoint is read in place
    statistics, done, most = sum(statistic for _, statistic in groups), 0, 0
    for group, statistic in groups:
        prepared = statistics + prepared_bytes(group[0].shape[1], settings)
        for linear in group:
            most = max(most, prepared + done + solving_bytes(linear.shape, settings) + dense * entries_of(linear))
            done += held * entries_of(linear)
        statistics -= statistic
    return most


def prepared_bytes(features: int, settings: Settings) -> int:
    """What is made of the Gram matrix of one input beside it, for all linears that take it."""
    if settings.pruner != "sparsegpt":
        return 0
    corners = 2 * FLOAT * min(COLUMN_BLOCK, features) * features
    return corners + settings.refit * FLOAT * features * features  # a copy that stays a Gram matrix, to refit with


def solving_bytes(shape: tuple[int, int], settings: Settings) -> int:
    """What pruning one matrix takes beside its dense weight and what is made of its inputs."""
    rows, features = shape
    solving = PRUNING[settings.pruner] * rows * features
    if settings.pruner == "admm":
        solving += FLOAT * features * features  # the step with one penalty
    elif not settings.refit:
        return solving
    return max(solving, FITTING[settings.pruner] * rows * features + STRIPS * FLOAT * min(ROWS, rows) * features)


def _gathering(config: Config, model: ModelSizes, client: Client, block: int) -> Iterator[Parts]:
    """What a client that sends statistics takes beside what it holds at rest while it works at a block."""
    moments = _sweeping if config.gram.propagate == "pruned" else _running_dense
    return moments(config, model, client, block)


def _running_dense(config: Config, model: ModelSizes, client: Client, block: int) -> Iterator[Parts]:
    """The statistics of a block's inputs are collected together, and then packed one after the other."""
    [exchange] = exchanges_of(config, model)
    features = [group[0].shape[1] for group in shared_inputs(model.linears[block])]
    random = features[:1] if block == 0 and config.gram.first_input == "public" else []  # of random tokens, made before
    grams = {"Gram matrices": FLOAT * sum(one**2 for one in (*features, *random))}
    forward = _tokens(client) * statistics_bytes(model, block, norms=False)
    yield {"one block": _block(model, block)} | grams | {"forward passes": forward}
    packed = sum(up_sizes(config, model, exchange)[block].values())
    yield grams | {"packed statistics": packed + packing_bytes(max(features))}


def packing_bytes(features: int) -> int:
    """What packing statistics of an input makes on the way: which entries each strip of rows has, and strips."""
    return features * features + strips_bytes(features)


def strips_bytes(features: int) -> int:
    """What is made of a strip of rows of a Gram matrix."""
    return SUMMING * FLOAT * min(triangle.ROWS, features) * features


def _sweeping(config: Config, model: ModelSizes, client: Client, block: int) -> Iterator[Parts]:
    """One input after the other; for the dense target with a dense twin of the block, and the inputs of both."""
    copies, tokens, size = (2 if gram_of(config).drift else 1), _tokens(client), model.arithmetic.itemsize
    for exchange in exchanges_of(config, model):
        if exchange.only is None or exchange.only[0] != block:
            continue
        name = exchange.only[1]
        features = model.shapes[block][name][1]
        converted = FLOAT * features * (copies - (size == FLOAT))
        inputs = max(forward_bytes(model, block) + converted, (2 * copies - 1) * FLOAT * features)
        grams = {"Gram matrices": copies * FLOAT * features**2}
        yield {"one block": copies * _block(model, block)} | grams | {"forward passes": tokens * inputs}
        yield grams | {"packed statistics": up_sizes(config, model, exchange)[block][name] + packing_bytes(features)}
    yield {"one block": _block(model, block), "forward passes": tokens * forward_bytes(model, block)}


@dataclass(frozen=True)
class Unit:
    """What the server makes of one matrix, or of the matrices that take one input.

    Attributes:
        sums: bytes of its sums.
        closing: bytes at most, beside them, when it is closed.
        made: bytes of what is made of it, packed.
    """

    sums: int
    closing: int
    made: int


def units_of(
    linears: Sequence[Linear], dtype: torch.dtype, clients: int, aggregation: Aggregation, up: str = "weights"
) -> dict[str, Unit]:
    """The units of a block in one exchange, by the names under which they travel.

    Args:
        linears: of the block.
        dtype: of the checkpoint.
        clients: that prune it.
        aggregation: how uploads are combined.
        up: what travels.
    """
    if up == "grams":
        return {group[0].name: _gram_unit(group, dtype, aggregation) for group in shared_inputs(linears)}
    return {linear.name: _unit(linear, dtype, clients, aggregation, up) for linear in linears}


def _unit(linear: Linear, dtype: torch.dtype, clients: int, aggregation: Aggregation, up: str) -> Unit:
    entries, target = entries_of(linear), aggregation.pruning.target
    kept = entries - target.zeros(entries)
    packed = packed_sizes({linear.name: linear.shape}, target, dtype)[linear.name]
    sums = sums_bytes(clients, aggregation.weights == "sample_size")
    if aggregation.algorithm in ("standalone", "centralized"):  # kept as they come
        return Unit(0, 0, packed)
    if up == "masks":
        made = packed_size(linear.shape, entries, dtype) if aggregation.algorithm == "consensus" else packed
        return Unit(vote_dtype(clients).itemsize * entries, CLOSING * entries, made)
    if up == "values":
        return Unit(sums * kept, CLOSING * kept, packed)
    average = "fedavg" in (aggregation.algorithm, *aggregation.comparisons)
    closing = (AVERAGING if average else CLOSING) * entries
    return Unit(sums * entries, closing, packed * (2 if "fedavg" in aggregation.comparisons else 1))


def _gram_unit(group: Sequence[Linear], dtype: torch.dtype, aggregation: Aggregation) -> Unit:
    """Sums are first made a square, which is then pruned with; the sums are gone by then."""
    features, drift, target = group[0].shape[1], aggregation.gram.drift, aggregation.pruning.target
    above, square = triangle.size(features), FLOAT * features * features
    sums = EXACT * (features + above + drift * features * features)
    # A double, then a float of every entry, then the square; the drift after that.
    summing = max((8 + FLOAT) * above, FLOAT * above + square) + strips_bytes(features)
    summing = max(summing, drift * (square + (8 + FLOAT) * features * features))
    made = packed_sizes({linear.name: linear.shape for linear in group}, target, dtype)
    return Unit(sums, max(summing, _server_pruning(group, aggregation) - sums), sum(made.values()))


def _server_pruning(group: Sequence[Linear], aggregation: Aggregation) -> int:
    """Pruning all matrices that take one input, once their sum is made."""
    settings, drift, features = aggregation.pruning, aggregation.gram.drift, group[0].shape[1]
    square, dense = FLOAT * features * features, FLOAT * sum(map(entries_of, group))
    known = square * (3 if drift else 1)  # Gram matrix, drift, and what the drift comes to
    most, done = max(drift * SHIFTING * square, known + 2 * square), 0  # lifted, factored
    for linear in group:
        shifted = drift * FLOAT * entries_of(linear)
        solving = prepared_bytes(features, settings) + shifted + solving_bytes(linear.shape, settings)
        most = max(most, known + done + solving)
        done += PRUNED * entries_of(linear)
    return dense + most


def closing_bytes(linears: Sequence[Linear], dtype: torch.dtype, clients: int, aggregation: Aggregation) -> int:
    """The most that one open block takes in the first exchange; for the arguments see `units_of`."""
    return _closing(list(units_of(linears, dtype, clients, aggregation).values()), clients)


def _closing(units: Sequence[Unit], clients: int) -> int:
    """The most that open units of a block take: when they are closed, one after the other; those of one client at once."""
    rest, finished, most = sum(unit.sums for unit in units), 0, 0
    for unit in units:
        most = max(most, (unit.sums if clients == 1 else rest) + finished + unit.closing)
        rest -= unit.sums
        finished += unit.made
    return max(most, finished)


def server_memory(config: Config, model: ModelSizes, together: int = 1) -> Memory:
    """Memory of the server during the rounds.

    Args:
        config: the experiment.
        model: its model.
        together: clients whose uploads arrive in one message.
    """
    comm, scheduler = config.client_configs.comm_configs, config.server_configs.scheduler_kwargs
    at_once = scheduler.max_open_blocks + comm.blocks_per_message  # what the scheduler allows, and what arrives then
    moments = (_serving(config, model, exchange, at_once, together) for exchange in exchanges_of(config, model))
    serving = with_heap(worst(moments))
    if config.algorithm != "gram":
        return serving
    # To see which linears share an input it opens the model and runs a block, before anything else.
    looking = {
        "outer parts": model.outer * model.stored.itemsize,
        "one block": max(model.blocks) * model.stored.itemsize,
    }
    return max(serving, with_heap(looking, _mapped(model)), key=lambda memory: memory.resident)


def _serving(config: Config, model: ModelSizes, exchange: Exchange, at_once: int, together: int = 1) -> Parts:
    """What the server holds at the worst moment of an exchange, with so many blocks open."""
    comm, open_blocks = config.client_configs.comm_configs, _open_blocks(config, model, exchange)
    upload = max(sum(units.values()) for units in up_sizes(config, model, exchange).values())
    sums = sorted((sum(u.sums for u in units) for units, clients in open_blocks if clients > 1), reverse=True)
    return {
        "other open blocks": sum(sums[1:at_once]),
        "block to close": max((_closing(units, clients) for units, clients in open_blocks), default=0),
        "uploads": together * min(comm.blocks_per_message * upload, comm.max_message_bytes),
    }


def _open_blocks(config: Config, model: ModelSizes, exchange: Exchange) -> list[tuple[list[Unit], int]]:
    """The units of each block in an exchange, and how many clients send them; of one client alone none stay open."""
    found = []
    for block, clients in _senders(config, model).items():
        if exchange.concerns(block):
            units = units_of(model.linears[block], model.stored, clients, aggregation_of(config), exchange.up)
            only = exchange.only and exchange.only[1]
            found.append(([unit for name, unit in units.items() if only in (None, name)], clients))
    return found


def aggregation_of(config: Config) -> Aggregation:
    """How the server combines uploads, as far as memory depends on it."""
    return Aggregation(
        settings_of(config, config.client_configs.train_configs),
        config.algorithm,
        "sample_size" if is_weighted(config) else "equal",
        comparisons=tuple(config.comparisons()),
        gram=gram_of(config),
    )


def _senders(config: Config, model: ModelSizes) -> dict[int, int]:
    """Block -> the most clients that prune it in one round; blocks that nobody prunes are not there."""
    senders: dict[int, int] = {}
    for assigned in draws(config, len(model.blocks)):
        for block in range(len(model.blocks)):
            clients = sum(block in mine for mine in assigned.values())
            if clients:
                senders[block] = max(senders.get(block, 0), clients)
    return senders


def evaluation_memory(config: Config, model: ModelSizes, windows: Mapping[str, int]) -> Memory:
    """Memory of the evaluation.

    Args:
        config: the experiment.
        model: its model.
        windows: windows of each text.
    """
    size, settings = model.arithmetic.itemsize, config.evaluation
    batch = min(settings.batch, max(windows.values()))
    tokens = batch * settings.length
    copied = FLOAT if size != FLOAT or batch > 1 else 0  # one row without its last token needs no copy
    logits = tokens * model.vocabulary * (size + copied + FLOAT)
    blocks = (entries * size + tokens * forward_bytes(model, block) for block, entries in enumerate(model.blocks))
    parts = {
        "outer parts": model.outer * size,
        "windows of all texts": _activations(model, sum(windows.values()), settings.length),
        "a block, or logits": max(logits, *blocks),
    }
    return with_heap(parts, _mapped(model))


def serial_memory(config: Config, model: ModelSizes) -> Memory:
    """Memory of server and clients in one process, during the rounds.

    Clients take turns and share the outer parts: one works while the others hold their activations and the server the sums
    of the message that is on; or the server closes a unit while all of them rest.
    """
    clients = [client_memory(config, model, client) for client in participants(config)]
    at_once = config.client_configs.comm_configs.blocks_per_message
    shared = {
        "outer parts": clients[0].parts["outer parts"],
        "activations": sum(client.parts["activations"] for client in clients),
    }
    work = max(client.needed - _resting(client) for client in clients)
    turns = [_turn(config, model, exchange, at_once, work) for exchange in exchanges_of(config, model)]
    closing = [_serving(config, model, exchange, at_once) for exchange in exchanges_of(config, model)]
    files = _mapped(model)
    return with_heap(shared | worst(turns + closing), files + sum(client.mapped - files for client in clients))


def _turn(config: Config, model: ModelSizes, exchange: Exchange, at_once: int, work: int) -> Parts:
    """One client at work beside the sums of what the others sent."""
    found = _open_blocks(config, model, exchange)
    sums = sorted((sum(unit.sums for unit in units) for units, clients in found if clients > 1), reverse=True)
    return {"a client at work": work, "open blocks": sum(sums[:at_once])}


def _resting(client: Memory) -> int:
    """What a client holds whether it works or not; the allocator's part is added once for all."""
    return sum(client.parts[name] for name in ("outer parts", "activations", "heap"))


def _mapped(model: ModelSizes) -> int:
    """Parts of the checkpoint that are mapped at the same time: the outer ones, then a block while it is read."""
    return max(model.outer, *model.blocks) * model.stored.itemsize


def resident_now() -> int | None:
    """Bytes that this process has resident now; None where the system does not say so."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS:")), None)
