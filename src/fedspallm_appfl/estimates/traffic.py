"""What a run will send and keep on disk: arithmetic on shapes and settings, to the byte but for compression."""

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fedspallm_appfl.aggregation.l0_mean import L0Sums
from fedspallm_appfl.aggregation.mask_expansion import Votes
from fedspallm_appfl.algorithms import registry
from fedspallm_appfl.algorithms.algorithm import Exchange, of_round
from fedspallm_appfl.errors import ConfigError, FedSpaLLMError
from fedspallm_appfl.estimates.job import Job, mask_only
from fedspallm_appfl.rounds.checkpoint import KEPT
from fedspallm_appfl.rounds.participants import own_windows
from fedspallm_appfl.settings.schema import Client
from fedspallm_appfl.tensors.target import NM, Target
from fedspallm_appfl.texts.tokenizer import tokenizer_for
from fedspallm_appfl.texts.windows import Cut, about_how_many
from fedspallm_appfl.validation.files import travelling
from fedspallm_appfl.wire.grams import gram_size
from fedspallm_appfl.wire.messages import plan

ZSTD_VALUES = {torch.float16: 0.84}  # measured: what shuffled and compressed values shrink to
ZSTD_DELTAS = {"int4": 0.95, "int8": 0.99, "fp16": 0.91}  # measured on the demo: the same of changes
ZSTD_GRAMS = {"fp32": 0.91, "bf16": 0.80, "int8": 0.81}  # measured on the demo: the same of statistics


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


def traffic(job: Job) -> list[RoundTraffic]:
    """What travels in each round, with the layers that the run will draw."""
    kinds = {client.client_id: mask_only(client) for client in job.clients}
    own, after = of_round(job.exchanges, last=False), [one for one in job.exchanges if one.recovers]
    uploads = {alone: _uploads(job, own, alone) for alone in set(kinds.values())}
    recovery = _uploads(job, after, masks_alone=False)
    made = []
    for number in range(job.rounds):
        assigned = job.assigned(number, own[0])
        last = number + 1 == job.rounds
        more = job.covered if last and after else []
        up = {
            client: [uploads[kinds[client]][block] for block in mine] + [recovery[block] for block in more]
            for client, mine in assigned.items()
        }
        changed = {block for mine in assigned.values() for block in mine}
        down, later = _down(job, own if after or not last else own[:-1]), _down(job, after[:-1])
        made.append(
            RoundTraffic(
                blocks=len(changed),
                up={client: sum(size for size, _ in sent) for client, sent in up.items()},
                zstd={client: round(sum(small for _, small in sent)) for client, sent in up.items()},
                dense={client: 2 * sum(map(job.model.entries, mine)) for client, mine in assigned.items()},
                down=sum(down[block] for block in changed) + sum(later[block] for block in more),
            )
        )
    return made


def final(job: Job) -> int:
    """Bytes of the finished model that a client lacks when it measures it on its own text."""
    if not own_windows(job.config):
        return 0
    last = job.exchanges[-1]
    if last.down is None:
        rounds, table = job.draws, {block: job.packed(block, "weights") for block in job.model.shapes}
    else:
        rounds, table = job.draws if last.recovers else job.draws[-1:], job.down(last)
    mine = {block for assigned in rounds for blocks in assigned.values() for block in blocks}
    return sum(sum(table[block].values()) for block in mine if block in table)


def _uploads(job: Job, exchanges: Sequence[Exchange], masks_alone: bool) -> dict[int, tuple[int, float]]:
    """Block -> bytes that a client sends of it in some exchanges, and roughly those with compression."""
    total = dict.fromkeys(job.model.shapes, (0, 0.0))
    for exchange in exchanges:
        share = exchange_share(job, exchange, masks_alone)
        for block, units in job.up(exchange, masks_alone).items():
            size = sum(units.values())
            total[block] = total[block][0] + size, total[block][1] + share * size
    return total


def _down(job: Job, made: Sequence[Exchange]) -> dict[int, int]:
    """Bytes of each block that some exchanges send down together."""
    total = dict.fromkeys(job.model.shapes, 0)
    for exchange in made:
        for block, linears in job.down(exchange).items():
            total[block] += sum(linears.values())
    return total


def exchange_share(job: Job, exchange: Exchange, masks_alone: bool) -> float:
    """What an upload shrinks to when it is compressed, roughly; masked words are as random as can be."""
    if exchange.hidden:
        return 1.0
    if exchange.up == "grams":
        return ZSTD_GRAMS[job.config.gram.precision]
    if exchange.trains:
        return ZSTD_DELTAS[exchange.delta]
    parts = "masks" if masks_alone and exchange.up == "weights" else exchange.up
    return zstd_share(job.sparsity.default, job.model.stored, parts)


def zstd_share(target: Target, dtype: torch.dtype, parts: str = "weights") -> float:
    """The same of `weights` with masks, `masks`, or `values`: masks to their entropy, float16 values as measured."""
    mask = 0.0 if parts == "values" else 1 / 8
    values = 0.0 if parts == "masks" else (1 - float(target.share)) * dtype.itemsize
    small = mask * _mask_entropy(target) + values * ZSTD_VALUES.get(dtype, 1.0)
    return small / (mask + values)


def _mask_entropy(target: Target) -> float:
    """Bits an entry."""
    if isinstance(target, NM):
        return math.log2(math.comb(target.group, target.kept)) / target.group
    zeros = float(target.share)
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


def messages(job: Job) -> Messages:
    """The messages of a client that is alone on its rank.

    Raises:
        ConfigError: a matrix, or the statistics of an input, exceed the limit on the way up or down.
    """
    comm = job.config.client_configs.comm_configs
    for table in travelling(job.config, job.model.layout.pruned, job.model.stored, job.model.groups):
        plan(table, comm.blocks_per_message, comm.max_message_bytes)
    masks_alone = all(map(mask_only, job.config.clients))
    sent = []
    for exchange in job.exchanges:
        bytes_of = job.up(exchange, masks_alone)
        parts = plan(job.up(exchange), comm.blocks_per_message, comm.max_message_bytes)
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


def transports(job: Job) -> list[Transport]:
    """Whether each transport of this machine can carry the messages, with the setting to change when not."""
    try:
        messages(job)
    except ConfigError as error:
        return [Transport(name, False, str(error)) for name in ("serial", "MPI")]
    return [Transport("serial", True, "memory to memory"), _mpi(job)]


def _mpi(job: Job) -> Transport:
    if job.algorithm.pools_text:
        return Transport("MPI", False, f"{job.algorithm.name} pools the text of all clients in one process")
    # With values whatever the pruner, as messages are planned.
    unit = max(size for exchange in job.exchanges for units in job.up(exchange).values() for size in units.values())
    limit, clients = job.config.client_configs.comm_configs.max_message_bytes, len(job.config.clients)
    together = min(limit // unit, clients)  # clients whose messages fit into that of their rank
    ranks = f"with {-(-clients // together)} client ranks or more; for fewer raise comm_configs.max_message_bytes"
    return Transport("MPI", True, "with any number of ranks" if together == clients else ranks)


CHECKPOINTS = "state/ for hidden states of the clients"


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


def disk(job: Job) -> list[Disk]:
    """What the server writes, and the clients of one process together."""
    apart = job.algorithm.apart
    checkpoint = (job.model.outer + sum(job.model.blocks)) * job.model.stored.itemsize
    written = [
        Disk("models/" if apart else "model/", (len(job.config.clients) if apart else 1) * checkpoint, True),
        Disk("statistics/", _statistics(job), True),
        Disk("state/ on the server", _state(job), False),
        *(_at_a_site(job) if job.config.over_globus() else _beside_the_run(job)),
    ]
    return [one for one in written if one.nbytes]


def _beside_the_run(job: Job) -> Iterator[Disk]:
    yield Disk("pruned blocks and masks of the clients of a process", _agreed(job), False)
    everybody = sum(_hidden_states(job, client) for client in job.clients)
    yield Disk("hidden states of all clients, in TMPDIR", everybody, False)
    yield Disk("state/ for Gram matrices of the clients", len(job.clients) * _between(job), False)
    yield Disk(CHECKPOINTS, KEPT * sum(_tokens_bytes(job, client) for client in job.clients), False)


def _at_a_site(job: Job) -> Iterator[Disk]:
    yield Disk("what came down to a client, in TMPDIR of its worker", _agreed(job), False)
    most = max(_hidden_states(job, client) for client in job.config.clients)
    yield Disk("hidden states of a client, in TMPDIR of its worker", most, False)
    yield Disk("Gram matrices of a client, in TMPDIR of its worker", _between(job), False)


def _pruned(job: Job) -> dict[str, set[int]]:
    """The blocks that each participant prunes in some round."""
    return {
        client.client_id: {block for assigned in job.draws for block in assigned[client.client_id]}
        for client in job.clients
    }


def _statistics(job: Job) -> int:
    """Sums of Gram matrices, which serve further targets."""
    if not job.algorithm.gathers or job.config.gram.propagate != "dense":
        return 0
    blocks = set().union(*_pruned(job).values())
    features = (job.model.shapes[block][names[0]][1] for block in blocks for names in job.model.groups[block])
    return sum(gram_size(one, "fp32") for one in features)


def _state(job: Job) -> int:
    """Packed models, masks that were agreed on, and sums that later rounds need."""
    mine, models = _pruned(job), [job.algorithm, *map(registry.find, job.comparisons)]
    everybody = set(job.covered)

    def packed(blocks: set[int], parts: str = "weights") -> int:
        return sum(sum(job.packed(block, parts).values()) for block in blocks)

    stored = sum(sum(map(packed, mine.values())) if model.apart else packed(everybody) for model in models)
    stored += packed(everybody) if job.config.recovery.model else 0  # as it was before
    if (
        job.rounds > 1 or job.config.recovery.rounds
    ):  # what an exchange makes stands beside what was there until it ends
        stored += packed(everybody)
    stored += packed(everybody, "masks") if any(one.down == "masks" for one in job.exchanges) else 0
    hidden = [sum(sum(units.values()) for units in job.up(one).values()) for one in job.exchanges if one.hidden]
    stored += max(hidden, default=0)  # sums that wait to be opened
    cumulative = job.config.server_configs.aggregator_kwargs.fold == "cumulative"
    return stored + (2 * _entry_of_sums(job) * sum(map(job.model.entries, everybody)) if cumulative else 0)


def _entry_of_sums(job: Job) -> int:
    """Bytes an entry of sums that are kept for later rounds; those of statistics are kept anyway."""
    clients = len(job.config.clients) * job.rounds
    first = job.exchanges[0].up
    if first == "masks":
        return Votes.entry_bytes(clients)
    return L0Sums.entry_bytes(is_weighted(job), clients) if first == "weights" else 0


def is_weighted(job: Job) -> bool:
    """Whether clients count by their calibration windows."""
    return job.config.server_configs.aggregator_kwargs.weights == "sample_size"


def _agreed(job: Job) -> int:
    """What came down, of which later rounds replace what earlier ones sent."""
    own = of_round(job.exchanges, last=False)
    everything, last = _down(job, own), _down(job, own[:-1])
    if len(own) < len(job.exchanges):  # recovery begins with all that was pruned
        return sum(everything[block] for block in job.covered)
    early = {block for assigned in job.draws[:-1] for mine in assigned.values() for block in mine}
    late = {block for mine in job.draws[-1].values() for block in mine} - early
    return sum(everything[block] for block in early) + sum(last[block] for block in late)


def _hidden_states(job: Job, client: Client) -> int:
    """Hidden states of a client that keeps them in a file."""
    return job.hidden_copies * _tokens_bytes(job, client) if client.data.activations == "file" else 0


def _between(job: Job) -> int:
    """What a client keeps of its statistics until it knows the scale of their sum."""
    if not any(exchange.hidden and exchange.up == "grams" for exchange in job.exchanges):
        return 0
    inputs = (job.model.shapes[block][names[0]][1] for block in job.model.shapes for names in job.model.groups[block])
    return sum(gram_size(features, "fp32") for features in inputs)


def _tokens_bytes(job: Job, client: Client) -> int:
    """Hidden states between two blocks."""
    return client.data.windows * client.data.length * job.model.hidden * job.model.arithmetic.itemsize


def room(job: Job) -> tuple[int, int]:
    """Bytes that a run may write to its run directory, and those free on that disk once earlier results are gone."""
    folder = Path(job.config.run_dir).expanduser().absolute()
    there = next(one for one in (folder, *folder.parents) if one.is_dir())
    needed = sum(one.nbytes for one in disk(job) if one.what.split()[0].endswith("/"))
    earlier = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return needed, shutil.disk_usage(there).free + earlier


def lack_of_room(job: Job) -> str | None:
    """Why the disk of the run directory has no room for what a run writes there, or None."""
    needed, free = room(job)
    if needed <= free:
        return None
    return (
        f"run_dir: {Path(job.config.run_dir).expanduser().absolute()} needs up to {needed:,} bytes (fedspallm estimate "
        f"says for what), and its disk has {free:,} free; make room, or name a folder on another disk"
    )


def evaluation_windows(job: Job) -> dict[str, int] | None:
    """Windows of each text that is evaluated; None if the texts would have to be counted and cannot be read."""
    settings, folder = job.config.evaluation, Path(job.model.folder)
    if settings.windows is not None:
        return dict.fromkeys(settings.texts, settings.windows)
    try:
        tokenizer = tokenizer_for(folder, *settings.texts.values())
        cut = Cut(settings.length, settings.bos, settings.field)
        return {name: about_how_many(text, cut, tokenizer) for name, text in settings.texts.items()}
    except FedSpaLLMError:
        return None
