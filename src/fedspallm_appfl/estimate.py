"""What a run will send and how much memory it will take, before anything runs: arithmetic on shapes and settings.

Memory is that of the tensors alive at the worst moment of each side, followed through the code:

* a client at rest holds its outer parts, its token ids and its activations. On top of them it collects statistics of a
  block (the statistics, and what a forward pass makes on its way), prunes it matrix by matrix, or runs it again (and holds
  what it pruned). The worst of the three counts;
* the server holds sums and votes of the open blocks, one upload, and what closing a matrix takes beside them;
* afterwards it evaluates, which is a forward pass over all windows of all texts, and logits.

Not counted is what a process holds before it does anything (Python and its packages, see `resident_now`) and what a
tokenizer makes of a text. All sizes are bytes unless they are called entries.

Legend: O out features, I in features, H hidden size, F widest input or output of a linear, B windows in a batch, T tokens
in a window, L decoder blocks.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fedspallm_appfl.blocks import Linear
from fedspallm_appfl.calibration import cut_windows, load_tokenizer, read_text
from fedspallm_appfl.config import Client, Config
from fedspallm_appfl.config_rules import draws, indivisible
from fedspallm_appfl.dtypes import DTYPES
from fedspallm_appfl.errors import ConfigError, FedSpaLLMError
from fedspallm_appfl.folds import Aggregation
from fedspallm_appfl.l0_aggregation import vote_dtype
from fedspallm_appfl.lazy_model import Skeleton
from fedspallm_appfl.messages import plan
from fedspallm_appfl.payload import packed_size, packed_sizes
from fedspallm_appfl.pruning import KEEP_WEIGHTS, Settings
from fedspallm_appfl.pruning.sparsegpt import COLUMN_BLOCK
from fedspallm_appfl.sparsity import NM, Target, parse_target

FLOAT = 4  # bytes of what statistics and pruners calculate in
PRUNING = 11  # bytes an entry: a pruner's two float32 copies, two masks, and what looking for NaN and infinity makes
CLOSING = 6  # bytes an entry beside the sums: the mean, and what choosing among equal votes makes
AVERAGING = 18  # the same for FedAvg: the average, its magnitude, a copy to be sorted, masks, and what of it is packed
HEAP_SHARE, HEAP_MOST = 0.15, 2**26  # measured: freed matrices below 32 MiB may stay with the C library's allocator
ZSTD_VALUES = {torch.float16: 0.84}  # measured: what shuffled and compressed values shrink to
GLOBUS_LIMIT = 10**7  # bytes of the arguments or of the result of a Globus Compute task


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
    def of(cls, skeleton: Skeleton, dtype: str = "auto") -> "ModelSizes":
        """Sizes of a model whose weights need not be read; `dtype` as in `model.dtype`."""
        layout = skeleton.layout
        outer, blocks = 0, [0] * len(layout.blocks)
        for name, parameter in skeleton.model.named_parameters():
            if name.startswith(f"{layout.path}."):
                blocks[int(name.removeprefix(f"{layout.path}.").split(".")[0])] += parameter.numel()
            else:
                outer += parameter.numel()
        arithmetic = skeleton.stored_dtype if dtype == "auto" else DTYPES[dtype]
        return cls(outer, tuple(blocks), layout.blocks, skeleton.vocabulary, skeleton.stored_dtype, arithmetic)

    @property
    def hidden(self) -> int:
        """H: what the first linear of a block takes."""
        return self.linears[0][0].shape[1]

    def entries(self, block: int) -> int:
        """Prunable entries of a block."""
        return sum(map(_entries, self.linears[block]))

    def packed(self, block: int, target: Target, mask_only: bool = False) -> dict[str, int]:
        """Bytes of each matrix of a block once packed."""
        shapes = {linear.name: linear.shape for linear in self.linears[block]}
        return packed_sizes(shapes, target, self.stored, "masks" if mask_only else "weights")


def _entries(linear: Linear) -> int:
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


def check_pattern(model: ModelSizes, target: Target) -> None:
    """Refuse a pattern n:m that does not fit the rows of some matrix.

    Raises:
        ConfigError: names the first.
    """
    for problem in indivisible(model.linears, target):
        raise ConfigError(problem)


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


def _with_heap(parts: Mapping[str, int], mapped: int = 0) -> Memory:
    return Memory({**parts, "heap": min(int(HEAP_SHARE * sum(parts.values())), HEAP_MOST)}, mapped)


def client_memory(model: ModelSizes, client: Client) -> Memory:
    """Memory of one client that is alone in its process."""
    states = _activations(model, *_windows(client))
    on_disk = client.data.activations == "file"
    parts = {
        "outer parts": model.outer * model.arithmetic.itemsize,
        "activations": 0 if on_disk else states,
        "earlier blocks of a message": _earlier(model, client),
    }
    work = (_work(model, client, block) for block in range(len(model.blocks)))
    return _with_heap(parts | max(work, key=lambda part: sum(part.values())), _mapped(model) + on_disk * states)


def _earlier(model: ModelSizes, client: Client) -> int:
    """Blocks that are packed and wait for the last one of their message."""
    train = client.train_configs
    target, mask_only = parse_target(train.sparsity), train.pruner in KEEP_WEIGHTS
    packed = (sum(model.packed(block, target, mask_only).values()) for block in range(len(model.blocks)))
    return min(client.comm_configs.blocks_per_message - 1, len(model.blocks) - 1) * max(packed)


def _windows(client: Client) -> tuple[int, int]:
    """Calibration windows and their length; a client without text takes one short window (see `local_client`)."""
    without = client.data.text is None and client.train_configs.pruner == "magnitude"
    return (1, 2) if without else (client.data.windows, client.data.length)


def _activations(model: ModelSizes, windows: int, length: int) -> int:
    """Hidden states of all windows, and their token ids."""
    return windows * length * (model.hidden * model.arithmetic.itemsize + torch.int64.itemsize)


def _work(model: ModelSizes, client: Client, block: int) -> dict[str, int]:
    """What a client takes beside what it holds at rest while it works at a block: the block, and the worst phase."""
    pruner, (windows, length) = client.train_configs.pruner, _windows(client)
    tokens = min(client.data.batch, windows) * length
    groups = [(group, statistic_bytes(group[0].shape[1], pruner)) for group in shared_inputs(model.linears[block])]
    # A mask; and the rounded weight, but where it is the block's own (see `LazyModel.put`).
    held = 1 if model.arithmetic == model.stored else 1 + model.stored.itemsize
    done = model.entries(block) * held
    forward = done + tokens * forward_bytes(model, block)
    if pruner != "magnitude":
        statistics = sum(statistic for _, statistic in groups)
        forward = max(forward, statistics + tokens * statistics_bytes(model, block, pruner))
    pruning = pruning_bytes(groups, model.stored, pruner, held)
    worst = {"pruning a block": pruning} if pruning > forward else {"forward passes": forward}
    return {"one block": model.blocks[block] * model.arithmetic.itemsize} | worst


def statistic_bytes(features: int, pruner: str) -> int:
    """Bytes of what is known of one input: a Gram matrix, its diagonal, or nothing."""
    return {"sparsegpt": FLOAT * features * features, "wanda": FLOAT * features}.get(pruner, 0)


def forward_bytes(model: ModelSizes, block: int) -> int:
    """Bytes a token inside a block, at most: in its MLP, where all that widened is alive and one more is made of it."""
    widest = max(max(linear.shape) for linear in model.linears[block])
    widening = sum(linear.shape[0] == widest for linear in model.linears[block])
    return model.arithmetic.itemsize * ((widening + 1) * widest + 2 * model.hidden)


def statistics_bytes(model: ModelSizes, block: int, pruner: str) -> int:
    """Bytes a token inside a block while its inputs are looked at: they stay alive, and the widest is converted."""
    size, hidden = model.arithmetic.itemsize, model.hidden
    widest = max(linear.shape[1] for linear in model.linears[block])
    converted = (FLOAT if size != FLOAT else 0) + (FLOAT if pruner == "wanda" else 0)  # float32, and its squares
    return max(forward_bytes(model, block) + 2 * hidden * size, widest * (size + converted) + 4 * hidden * size)


def pruning_bytes(groups: Sequence[tuple[Sequence[Linear], int]], stored: torch.dtype, pruner: str, held: int) -> int:
    """The most that pruning a block takes beside the block itself.

    Args:
        groups: linears that share an input, with the bytes of its statistic; in the order of pruning.
        stored: dtype of the checkpoint.
        pruner: its name.
        held: bytes an entry of a matrix that is done.
    """
    dense = 0 if stored.itemsize == FLOAT else FLOAT  # a float32 checkpoint is read in place
    statistics, done, most = sum(statistic for _, statistic in groups), 0, 0
    for group, statistic in groups:
        features = group[0].shape[1]
        corners = 2 * FLOAT * min(COLUMN_BLOCK, features) * features if pruner == "sparsegpt" else 0
        for linear in group:
            entries = _entries(linear)
            most = max(most, statistics + corners + done + (PRUNING + dense) * entries)
            done += held * entries
        statistics -= statistic
    return most


def sums_bytes(clients: int, weighted: bool) -> int:
    """Bytes an entry of an open matrix: sum, votes, and with client weights the weight of those that kept it."""
    return torch.int64.itemsize + vote_dtype(clients).itemsize + (torch.int32.itemsize if weighted else 0)


def closing_bytes(linears: Sequence[Linear], dtype: torch.dtype, clients: int, aggregation: Aggregation) -> int:
    """The most that one open block takes: when its matrices are made from their sums, one after the other.

    Args:
        linears: of the block.
        dtype: of the checkpoint.
        clients: that prune it.
        aggregation: how uploads are combined.
    """
    average = "fedavg" in aggregation.comparisons
    entry = sums_bytes(clients, aggregation.weights == "sample_size")
    rest, finished, most = entry * sum(map(_entries, linears)), 0, 0
    for linear in linears:
        sums = entry * _entries(linear) if clients == 1 else rest  # of one client: opened and closed one by one
        most = max(most, sums + finished + (AVERAGING if average else CLOSING) * _entries(linear))
        rest -= entry * _entries(linear)
        packed = packed_size(linear.shape, aggregation.pruning.target.zeros(_entries(linear)), dtype)
        finished += packed * (2 if average else 1)
    return max(most, finished)


def server_memory(config: Config, model: ModelSizes, together: int = 1) -> Memory:
    """Memory of the server during the rounds.

    Args:
        config: the experiment.
        model: its model.
        together: clients whose uploads arrive in one message.
    """
    aggregation, senders = aggregation_of(config), _senders(config, model)
    comm, scheduler = config.client_configs.comm_configs, config.server_configs.scheduler_kwargs
    at_once = scheduler.max_open_blocks + comm.blocks_per_message  # what the scheduler allows, and what arrives then
    closing = max(closing_bytes(model.linears[b], model.stored, n, aggregation) for b, n in senders.items())
    upload = max(sum(model.packed(block, aggregation.pruning.target).values()) for block in senders)
    parts = {
        "other open blocks": sum(_open_sums(config, model)[1:at_once]),
        "block to close": closing,
        "uploads": together * min(comm.blocks_per_message * upload, comm.max_message_bytes),
    }
    return _with_heap(parts)


def aggregation_of(config: Config) -> Aggregation:
    """How the server combines uploads."""
    kwargs, target = config.server_configs.aggregator_kwargs, parse_target(config.client_configs.train_configs.sparsity)
    train = config.client_configs.train_configs
    return Aggregation(
        Settings(train.pruner, target, train.damping, train.damping_retries),
        config.algorithm,
        kwargs.weights,
        kwargs.fold,
        kwargs.expansion,
        tuple(config.evaluation.compare),
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
    return _with_heap(parts, _mapped(model))


def serial_memory(config: Config, model: ModelSizes) -> Memory:
    """Memory of server and clients in one process, during the rounds.

    Clients take turns and share the outer parts: one works while the others hold their activations and the server the sums
    of the message that is on. What the server does between the turns takes less than pruning.
    """
    clients = [client_memory(model, client) for client in config.clients]
    parts = {
        "outer parts": clients[0].parts["outer parts"],
        "activations": sum(client.parts["activations"] for client in clients),
        "a client at work": max(client.needed - _resting(client) for client in clients),
        "open blocks": sum(_open_sums(config, model)[: config.client_configs.comm_configs.blocks_per_message]),
    }
    files = _mapped(model)
    return _with_heap(parts, files + sum(client.mapped - files for client in clients))


def _open_sums(config: Config, model: ModelSizes) -> list[int]:
    """Bytes of the sums of each block that several clients prune, the largest first; others are never left open."""
    weighted = config.server_configs.aggregator_kwargs.weights == "sample_size"
    several = {block: clients for block, clients in _senders(config, model).items() if clients > 1}
    sums = (model.entries(block) * sums_bytes(clients, weighted) for block, clients in several.items())
    return sorted(sums, reverse=True)


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


@dataclass(frozen=True)
class RoundTraffic:
    """What travels in one round: bytes of tensors; names and shapes add less than a kilobyte a matrix.

    Attributes:
        blocks: blocks that some client prunes.
        up: client -> bytes that it sends, without compression.
        zstd: client -> bytes that it sends with compression, roughly.
        dense: client -> bytes of the same blocks dense in float16.
        down: bytes that each client gets once the round is over; nothing after the last.
    """

    blocks: int
    up: Mapping[str, int]
    zstd: Mapping[str, int]
    dense: Mapping[str, int]
    down: int


def traffic(config: Config, model: ModelSizes) -> list[RoundTraffic]:
    """What travels in each round, with the layers that the run will draw."""
    return [_round(config, model, number, assigned) for number, assigned in enumerate(draws(config, len(model.blocks)))]


def _round(config: Config, model: ModelSizes, number: int, assigned: Mapping[str, Sequence[int]]) -> RoundTraffic:
    target = parse_target(config.client_configs.train_configs.sparsity)
    last = number == config.server_configs.num_global_epochs - 1
    mask_only = {client.client_id: client.train_configs.pruner in KEEP_WEIGHTS for client in config.clients}
    changed = {block for mine in assigned.values() for block in mine}
    up = {
        client: sum(sum(model.packed(block, target, mask_only[client]).values()) for block in mine)
        for client, mine in assigned.items()
    }
    return RoundTraffic(
        blocks=len(changed),
        up=up,
        zstd={client: round(up[client] * zstd_share(target, model.stored, mask_only[client])) for client in up},
        dense={client: 2 * sum(map(model.entries, mine)) for client, mine in assigned.items()},
        down=0 if last else sum(sum(model.packed(block, target).values()) for block in changed),
    )


def zstd_share(target: Target, dtype: torch.dtype, mask_only: bool = False) -> float:
    """What an update shrinks to when it is compressed, roughly: its masks to their entropy, float16 values as measured."""
    zeros = target.zeros(10**6) / 10**6 if not isinstance(target, NM) else 1 - target.kept / target.group
    mask, values = 1 / 8, 0.0 if mask_only else (1 - zeros) * dtype.itemsize
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
        count: messages.
        largest: bytes of the largest.
        matrix: bytes of the largest matrix, which no message can split.
    """

    count: int
    largest: int
    matrix: int


def messages(config: Config, model: ModelSizes) -> Messages:
    """The messages of a client that is alone on its rank.

    Raises:
        ConfigError: one matrix exceeds the limit.
    """
    comm, target = config.client_configs.comm_configs, parse_target(config.client_configs.train_configs.sparsity)
    planned = {block: model.packed(block, target) for block in range(len(model.blocks))}
    parts = plan(planned, comm.blocks_per_message, comm.max_message_bytes)
    mask_only = all(client.train_configs.pruner in KEEP_WEIGHTS for client in config.clients)
    sent = {block: model.packed(block, target, mask_only) for block in planned}
    largest = max(sum(sent[block][name] for block, name in part) for part in parts)
    return Messages(len(parts), largest, max(size for sizes in sent.values() for size in sizes.values()))


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
    """Whether each transport can carry the messages, with the setting to change when not."""
    limit, clients = config.client_configs.comm_configs.max_message_bytes, len(config.clients)
    try:
        made = messages(config, model)
    except ConfigError as error:
        return [Transport(name, False, str(error)) for name in ("serial", "MPI", "Globus Compute")]
    target = parse_target(config.client_configs.train_configs.sparsity)
    planned = max(max(model.packed(block, target).values()) for block in range(len(model.blocks)))
    together = min(limit // planned, clients)  # clients whose messages fit into that of their rank
    ranks = f"with {-(-clients // together)} client ranks or more; for fewer raise comm_configs.max_message_bytes"
    return [
        Transport("serial", True, "memory to memory"),
        Transport("MPI", True, "with any number of ranks" if together == clients else ranks),
        Transport("Globus Compute", False, f"not in this version; {_inline(made)}"),
    ]


def _inline(made: Messages) -> str:
    """What it would take to put a message into the result of a Globus Compute task."""
    holds = f"a result holds {_megabytes(GLOBUS_LIMIT)} at most"
    if made.largest <= GLOBUS_LIMIT:
        return f"{holds}, the largest message has {_megabytes(made.largest)}"
    if made.matrix <= GLOBUS_LIMIT:
        return f"{holds}: lower comm_configs.max_message_bytes from {_megabytes(made.largest)} to that"
    return f"{holds}, a matrix has {_megabytes(made.matrix)} and cannot be split"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


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
