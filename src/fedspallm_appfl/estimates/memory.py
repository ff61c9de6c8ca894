"""How much memory a run will take: that of the tensors alive at the worst moment of each side.

* A client at rest holds its outer parts, its token ids and its activations. On top of them it collects statistics of a
  block (the statistics, and what a forward pass makes on its way), prunes it matrix by matrix, or runs it again (and holds
  what it pruned). Where statistics are sent it packs them instead. The worst of these counts;
* the server holds sums of the open blocks, one upload, and what closing a unit takes beside them;
* afterwards it evaluates, which is a forward pass over all windows of all texts, and logits.

What pruners and folds take they say themselves. Not counted is what a process holds before it does anything (Python and its
packages) and what a tokenizer makes of a text.

Legend: O out features, I in features, H hidden size, F widest input or output of a linear, B windows in a batch, T tokens
in a window, L decoder blocks.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from fedspallm_appfl.allocation.choice import JUDGE
from fedspallm_appfl.estimates.job import Job, Outline, mask_only, pruner_of, windows_of
from fedspallm_appfl.models.typical import LENGTH, WINDOWS
from fedspallm_appfl.pruning.statistics import InputGram
from fedspallm_appfl.rounds.folds.context import UnitBytes
from fedspallm_appfl.rounds.pruning import SAMPLE
from fedspallm_appfl.runs.placement import batches
from fedspallm_appfl.settings.schema import Client, TrainConfigs
from fedspallm_appfl.wire.grams import packing_bytes
from fedspallm_appfl.wire.packed import kept_entries

FLOAT = 4  # bytes of what statistics and pruners calculate in
APPFL = 40_000_000  # measured: what APPFL 1.12 adds to a process that has torch and transformers
HEAP_SHARE, HEAP_MOST = 0.35, 2**27  # measured, 0.2 to 0.6: freed matrices below 32 MiB may stay with the C library


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


SELECTING = 32  # bytes an entry of a matrix to multiply factors, and to take the kept entries of it
VECTORS = 5  # of kept weights: values, gradient, two of the optimizer, and one on the way
TAPE = 3  # times what a forward pass of a block takes, that its backward pass does
GRAPH = 3  # tensors as wide as inputs and outputs of a block's linears that its backward pass keeps, about
ON_GPU = (  # parts of a client's memory
    *("outer parts", "activations", "one block", "forward passes", "pruning a block", "Gram matrices"),
    "inputs of experts",
)
CHOSEN = 64  # bytes a token: indices of eight experts
Parts = dict[str, int]


def with_heap(parts: Parts, mapped: int = 0) -> Memory:
    """Parts that are alive together, with what the C library's allocator keeps."""
    return Memory({**parts, "heap": min(int(HEAP_SHARE * sum(parts.values())), HEAP_MOST)}, mapped)


def worst(moments: Iterable[Parts]) -> Parts:
    """The moment at which the most is alive."""
    return max(moments, key=lambda parts: sum(parts.values()))


def client_memory(job: Job, client: Client) -> Memory:
    """Memory of one client that is alone in its process, without what lies on further GPUs."""
    model, (windows, length) = job.model, windows_of(job, client)
    states, on_disk = _activations(model, windows, length, job.hidden_copies), client.data.activations == "file"
    parts = {
        "outer parts": model.outer * model.arithmetic.itemsize,
        "activations": 0 if on_disk else states,
        "earlier blocks of a message": _earlier(job, client),
    }
    pruned = () if job.config.recovery.model else model.layout.pruned
    work = [moment for block in pruned for moment in _at_work(job, client, block)]
    work += _recovering(job, client, 0 if on_disk else states) if job.config.recovery.rounds else []
    devices = client.train_configs.devices
    if len(devices) > 1 and set(devices) == {"cpu"}:
        parts["further devices"] = (len(devices) - 1) * sum(further_device(job, client).values())
    return with_heap(parts | worst(work), _mapped(model) + on_disk * states)


def further_device(job: Job, client: Client) -> Parts:
    """What lies on each device of a client beside its first, at the worst moment of a pass over a block."""
    model, recovery = job.model, job.config.recovery
    pruned = () if recovery.model else model.layout.pruned
    wider = FLOAT // model.arithmetic.itemsize if recovery.rounds and model.arithmetic == torch.float16 else 1
    moments = [_pass(job, client, block) for block in pruned]
    for block in range(len(model.blocks)):
        moments.append({part: wider * size for part, size in _advancing(job, client, block).items()})
    return worst(moments)


def on_first_gpu(client: Memory) -> Parts:
    """What of a client's memory lies on its GPU where it has one."""
    return {part: size for part, size in client.parts.items() if part in ON_GPU}


def rank_memory(job: Job, client: Client) -> Memory:
    """Memory of one client that is alone on its MPI rank: a message is on its way while the next is made."""
    comm, alone = client.comm_configs, client_memory(job, client)
    several = len(job.model.layout.pruned) > comm.blocks_per_message and any(one.only is None for one in job.exchanges)
    sent = min(comm.blocks_per_message * _packed_block(job, client), comm.max_message_bytes) if several else 0
    parts = {part: size for part, size in alone.parts.items() if part != "heap"}
    return with_heap({**parts, "message on its way": sent}, alone.mapped)


def _earlier(job: Job, client: Client) -> int:
    """Blocks that are packed and wait for the last one of their message."""
    others = min(client.comm_configs.blocks_per_message, len(job.model.layout.pruned)) - 1
    return others * _packed_block(job, client)


def _packed_block(job: Job, client: Client) -> int:
    """The most that a client sends of one block."""
    tables = (job.up(exchange, mask_only(client)) for exchange in job.exchanges)
    return max(sum(units.values()) for table in tables for units in table.values())


def _activations(model: Outline, windows: int, length: int, copies: int = 1) -> int:
    """Hidden states of all windows, and their token ids."""
    return windows * length * (copies * model.hidden * model.arithmetic.itemsize + torch.int64.itemsize)


def _tokens(job: Job, client: Client) -> int:
    """Tokens in a batch."""
    windows, length = windows_of(job, client)
    return min(client.data.batch, windows) * length


def _block(model: Outline, block: int) -> int:
    return model.blocks[block] * model.arithmetic.itemsize


def _at_work(job: Job, client: Client, block: int) -> Iterator[Parts]:
    """What a client takes beside what it holds at rest while it works at a block."""
    if not job.algorithm.gathers:
        return _pruning(job, client, block)
    return (_by_input if job.config.gram.by_input else _by_block)(job, client, block)


def _pruning(job: Job, client: Client, block: int) -> Iterator[Parts]:
    model, train, tokens = job.model, client.train_configs, _tokens(job, client)
    # A mask; and the rounded weight, but where it is the block's own (see `LazyModel.put`).
    held = 1 if model.arithmetic == model.stored else 1 + model.stored.itemsize
    looks = _pass(job, client, block)
    around = 2 * FLOAT * min(tokens, SAMPLE) * model.hidden  # some of what goes in, and of what the dense block gave
    looking, again = looks.pop("forward passes"), model.entries(block) * held + tokens * forward_bytes(model, block)
    yield looks | {"forward passes": max(looking, again) + around}
    yield looks | {"pruning a block": pruning_bytes(model, train, block, held) + around}


def _advancing(job: Job, client: Client, block: int) -> Parts:
    """A pass that only runs a block, on one of the client's devices."""
    tokens = _tokens(job, client)
    return {"one block": _block(job.model, block), "forward passes": tokens * forward_bytes(job.model, block)}


def _pass(job: Job, client: Client, block: int) -> Parts:
    """A pass over a block on one of the client's devices: the block, what is made on the way, and sums."""
    model, train, tokens = job.model, client.train_configs, _tokens(job, client)
    running = _advancing(job, client, block)
    if job.algorithm.gathers and job.config.gram.by_input:
        return running
    if job.algorithm.gathers:
        grams = list(map(InputGram.nbytes, _features_together(model, block)))
        forward = max(tokens * statistics_bytes(model, block, norms=False), _merging(train, grams))
        inputs = _inputs_of_experts(job, client, block)
        return running | {"Gram matrices": sum(grams), "forward passes": forward} | inputs
    pruner = pruner_of(train)
    if pruner.needs is None:
        return running
    together = list(_statistic_bytes(model, train, block)[0].values())
    norms = pruner.statistic(train.refit) is not InputGram
    looking = max(tokens * statistics_bytes(model, block, norms), _merging(train, together))
    forward = max(running["forward passes"], sum(together) + looking)
    return running | {"forward passes": forward} | _inputs_of_experts(job, client, block)


def _merging(train: TrainConfigs, statistics: Sequence[int]) -> int:
    """What adding up sums of several devices takes on the first beside them, after the pass: one statistic on its way."""
    return max(statistics, default=0) if len(train.devices) > 1 else 0


def _features_together(model: Outline, block: int) -> list[int]:
    """The features of those inputs whose statistics are collected in one pass."""
    together = (names for names in model.groups[block] if not _of_an_expert(model, block, names))
    return [model.shapes[block][names[0]][1] for names in together]


def _inputs_of_experts(job: Job, client: Client, block: int) -> Parts:
    """What went into the experts of a block on one device: the hidden states of its tokens, and the experts of each."""
    model, (windows, length) = job.model, windows_of(job, client)
    fused = {linear.part.module for linear in model.layout.blocks[block] if linear.part is not None}
    batch = min(client.data.batch, windows)
    dealt = -(-windows // (batch * max(1, len(client.train_configs.devices)))) * batch
    each = min(dealt, windows) * length * (model.hidden * model.arithmetic.itemsize + CHOSEN)
    return {"inputs of experts": len(fused) * each} if fused and client.data.activations == "memory" else {}


def _of_an_expert(model: Outline, block: int, names: Sequence[str]) -> bool:
    """Whether the statistic of an input is made for one expert, when it is needed."""
    return model.layout.linear(block, names[0]).part is not None


def _statistic_bytes(model: Outline, train: TrainConfigs, block: int) -> tuple[dict[str, int], int]:
    """Bytes of what is known of inputs: of those that are collected together, and the most that is made for an expert."""
    pruner, shapes = pruner_of(train), model.shapes[block]
    each = {names[0]: pruner.statistic_bytes(shapes[names[0]][1], train.refit) for names in model.groups[block]}
    of_expert: dict[int, int] = {}
    for name in list(each):
        if (part := model.layout.linear(block, name).part) is not None:
            of_expert[part.expert] = of_expert.get(part.expert, 0) + each.pop(name)
    return each, max(of_expert.values(), default=0)


def forward_bytes(model: Outline, block: int) -> int:
    """Bytes a token inside a block, at most: in its MLP, where all that widened is alive and one more is made of it."""
    shapes = [linear.shape for linear in model.linears[block]]
    widest = max(map(max, shapes))
    widening = sum(rows == widest for rows, _ in shapes)
    return model.arithmetic.itemsize * ((widening + 1) * widest + 2 * model.hidden)


def statistics_bytes(model: Outline, block: int, norms: bool) -> int:
    """Bytes a token inside a block while its inputs are looked at: they stay alive, and the widest is converted."""
    size, hidden = model.arithmetic.itemsize, model.hidden
    widest = max(features for _, features in model.shapes[block].values())
    converted = (FLOAT if size != FLOAT else 0) + (FLOAT if norms else 0)  # float32, and its squares
    return max(forward_bytes(model, block) + 2 * hidden * size, widest * (size + converted) + 4 * hidden * size)


def pruning_bytes(model: Outline, train: TrainConfigs, block: int, held: int) -> int:
    """The most that pruning a block takes beside the block itself; `held` is bytes an entry of a matrix that is done."""
    pruner, shapes = pruner_of(train), model.shapes[block]
    dense = 0 if model.stored.itemsize == FLOAT else FLOAT  # a float32 checkpoint is read in place
    together, of_expert = _statistic_bytes(model, train, block)
    statistics, done, most = sum(together.values()), 0, 0
    for names in model.groups[block]:
        prepared = (
            statistics
            + (0 if names[0] in together else of_expert)
            + pruner.ready_bytes(shapes[names[0]][1], train.refit)
        )
        for rows, features in (shapes[name] for name in names):
            solving = pruner.solving_bytes(rows, features, train.refit) + dense * rows * features
            most = max(most, prepared + done + solving)
            done += held * rows * features
        statistics -= together.get(names[0], 0)
    return most


def _by_block(job: Job, client: Client, block: int) -> Iterator[Parts]:
    """The statistics of a block's inputs are collected together, and then packed one after the other."""
    model, exchange = job.model, next(one for one in job.exchanges if one.up == "grams" and one.concerns(block))
    features, inputs = _features_together(model, block), _inputs_of_experts(job, client, block)
    alone = [model.shapes[block][names[0]][1] for names in model.groups[block] if _of_an_expert(model, block, names)]
    random = features[:1] if block == 0 and job.config.gram.first_input == "public" else []  # made before
    grams = {"Gram matrices": sum(map(InputGram.nbytes, (*features, *random)))}
    yield _pass(job, client, block) | grams
    packed = sum(job.up(exchange)[block].values())
    yield grams | {"packed statistics": packed + packing_bytes(max(features, default=0))} | inputs
    if alone:
        pair = {
            "Gram matrices": sum(map(InputGram.nbytes, alone[:2])),
            "packed statistics": packed + packing_bytes(max(alone)),
        }
        yield {"one block": _block(model, block)} | pair | inputs


def _by_input(job: Job, client: Client, block: int) -> Iterator[Parts]:
    """One input after the other; for the dense target with a dense twin of the block, and the inputs of both."""
    model, copies, tokens = job.model, job.hidden_copies, _tokens(job, client)
    size = model.arithmetic.itemsize
    for exchange in job.exchanges:
        if exchange.only is None or not exchange.concerns(block):
            continue
        [(_, name)] = exchange.only
        features = model.shapes[block][name][1]
        converted = FLOAT * features * (copies - (size == FLOAT))
        inputs = max(forward_bytes(model, block) + converted, (2 * copies - 1) * FLOAT * features)
        grams = {"Gram matrices": copies * InputGram.nbytes(features)}
        yield {"one block": copies * _block(model, block)} | grams | {"forward passes": tokens * inputs}
        yield grams | {"packed statistics": job.up(exchange)[block][name] + packing_bytes(features)}
    yield _pass(job, client, block)


def _recovering(job: Job, client: Client, states: int) -> Iterator[Parts]:
    """What training takes: weights, of the kept ones a vector with gradient and optimizer, and one block's activations."""
    model, recovery = job.model, job.config.recovery
    whole, size = recovery.scope == "all", max(model.arithmetic.itemsize, 2)
    size = FLOAT if model.arithmetic == torch.float16 else size
    kept = {block: sum(kept_entries(model.shapes[block], job.sparsity, block).values()) for block in job.covered}
    held = sum if whole else max
    entries = held(model.entries(block) for block in kept)  # each with a byte of its mask
    tokens = _tokens(job, client)
    logits = 6 * FLOAT * model.vocabulary if whole else 0  # of both models, as shares, and gradients
    between = model.hidden * size * len(model.blocks) if whole else 0  # what goes into each block, for the way back
    inside = max(TAPE * forward_bytes(model, block) * size // model.arithmetic.itemsize for block in kept)
    again = model.outer * FLOAT if size != model.arithmetic.itemsize else 0  # the outer parts in float32
    yield {
        "pruned model": held(model.blocks) * size + entries + again,
        "kept weights": _of_factors(job, kept, size) if recovery.rank else VECTORS * FLOAT * held(kept.values()),
        "forward passes": tokens * (max(logits, inside) + between),
        "dense model's states": states if recovery.loss == "kl" or not whole else 0,
    }


def _of_factors(job: Job, kept: Mapping[int, int], size: int) -> int:
    """Kept weights as training began, of factors a vector with gradient and optimizer, and what multiplying them takes."""
    model, recovery = job.model, job.config.recovery
    held, shapes = sum if recovery.scope == "all" else max, {block: model.shapes[block].values() for block in kept}
    trained = held(recovery.rank * sum(out for out, _ in of) for of in shapes.values())
    bases = held(recovery.rank * sum(features for _, features in of) for of in shapes.values())
    together = Counter[tuple[int, str]]()  # experts may lie in one tensor
    for block in kept:
        for linear in model.layout.blocks[block]:
            together[block, linear.parameter] += linear.entries
    return (
        size * held(kept.values()) + FLOAT * (VECTORS * trained + bases) + SELECTING * max(together.values(), default=0)
    )


def closing_bytes(units: Sequence[UnitBytes], clients: int) -> int:
    """The most that open units of a block take: when they are closed, one after the other; those of one client at once."""
    rest, finished, most = sum(unit.sums for unit in units), 0, 0
    for unit in units:
        most = max(most, (unit.sums if clients == 1 else rest) + finished + unit.closing)
        rest -= unit.sums
        finished += unit.made
    return max(most, finished)


def server_memory(job: Job, together: int = 1) -> Memory:
    """Memory of the server during the rounds; `together` clients' uploads arrive in one message."""
    comm, scheduler = job.config.client_configs.comm_configs, job.config.server_configs.scheduler_kwargs
    at_once = scheduler.max_open_blocks + comm.blocks_per_message  # what the scheduler allows, and what arrives then
    serving = [_serving(job, number, at_once, together) for number in range(len(job.exchanges))]
    return with_heap(worst([*serving, *_running_random_tokens(job)]))


def _running_random_tokens(job: Job) -> Iterator[Parts]:
    """What the server takes to learn how large inputs are; the first upload has come, and no sums are open."""
    if not job.algorithm.gathers or job.told.screening == "off":
        return
    model, tokens = job.model, WINDOWS * LENGTH
    held = {
        "outer parts": model.outer * model.arithmetic.itemsize,
        "activations": _activations(model, WINDOWS, LENGTH),
        "uploads": max((sum(units.values()) for units in job.up(job.exchanges[0]).values()), default=0),
    }
    for block in model.layout.pruned:
        passes = tokens * statistics_bytes(model, block, norms=True)
        yield {**held, "one block": _block(model, block), "forward passes": passes}


def _serving(job: Job, number: int, at_once: int, together: int = 1) -> Parts:
    """What the server holds at the worst moment of an exchange, with so many blocks open."""
    comm, open_blocks = job.config.client_configs.comm_configs, _open_blocks(job, number)
    upload = max((sum(units.values()) for units in job.up(job.exchanges[number]).values()), default=0)
    return {
        "other open blocks": sum(_sums(open_blocks)[1:at_once]),
        "block to close": max((closing_bytes(units, clients) for units, clients in open_blocks), default=0),
        "uploads": together * min(comm.blocks_per_message * upload, comm.max_message_bytes),
    }


def _sums(open_blocks: Sequence[tuple[Sequence[UnitBytes], int]]) -> list[int]:
    """Bytes of the sums of each block that stays open, the largest first; of one client alone none does."""
    return sorted((sum(unit.sums for unit in units) for units, clients in open_blocks if clients > 1), reverse=True)


def _open_blocks(job: Job, number: int) -> list[tuple[list[UnitBytes], int]]:
    """The units of each block in an exchange, and how many clients send them."""
    exchange, fold, found = job.exchanges[number], job.fold(number), []
    everybody = dict.fromkeys(job.covered, len(job.clients))
    for block, clients in (everybody if exchange.recovers else _senders(job)).items():
        if exchange.concerns(block):
            names = exchange.units_of(block, fold.units(block))
            found.append(([fold.bytes_of(block, name, clients) for name in names], clients))
    return found


def _senders(job: Job) -> dict[int, int]:
    """Block -> the most clients that prune it in one round; blocks that nobody prunes are not there."""
    senders: dict[int, int] = {}
    for assigned in job.draws:
        for block in range(len(job.model.blocks)):
            clients = sum(block in mine for mine in assigned.values())
            if clients:
                senders[block] = max(senders.get(block, 0), clients)
    return senders


def evaluation_memory(job: Job, windows: Mapping[str, int]) -> Memory:
    """Memory of the evaluation of so many windows of each text."""
    model, settings = job.model, job.config.evaluation
    size, batch = model.arithmetic.itemsize, min(settings.batch, max(windows.values()))
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


def allocation_memory(job: Job) -> Memory:
    """Memory of the server before the run, while it chooses the targets of all matrices."""
    model, asked = job.model, job.config.allocation
    train = dataclasses.replace(job.config.client_configs.train_configs, pruner=JUDGE, refit=False)
    size, length = max(model.arithmetic.itemsize, 2), job.allocation_length
    tokens = min(asked.batch, asked.windows) * length
    parts = {
        "outer parts": model.outer * size,
        "hidden states of all blocks": (len(model.blocks) + 2) * _activations(model, asked.windows, length),
    }
    moments = [{"gradients": tokens * model.vocabulary * (size + 4 * FLOAT)}]
    for block in model.layout.pruned:
        kept = GRAPH * size * sum(map(sum, model.shapes[block].values()))  # what the backward pass wants
        widest = max(features for _, features in model.shapes[block].values())
        largest = max(linear.entries for linear in model.layout.blocks[block])
        solving = pruning_bytes(model, train, block, 0) + InputGram.nbytes(widest) + 2 * FLOAT * largest
        moments.append({"one block": _block(model, block), "gradients": tokens * kept})
        moments.append({"one block": _block(model, block), "pruning a block": solving})
    return with_heap(parts | worst(moments), _mapped(model))


def serial_memory(job: Job) -> Memory:
    """Memory of server and clients in one process, during the rounds.

    Clients take turns and share the outer parts: one works while the others hold their activations and the server the sums
    of the message that is on; or the server closes a unit while all of them rest.
    """
    clients = [client_memory(job, client) for client in job.clients]
    at_once = job.config.client_configs.comm_configs.blocks_per_message
    shared, work = _taking_turns(clients)
    moments = []
    for number in range(len(job.exchanges)):
        moments.append({"a client at work": work, "open blocks": sum(_sums(_open_blocks(job, number))[:at_once])})
        moments.append(_serving(job, number, at_once))
    files = _mapped(job.model)
    return with_heap(shared | worst(moments), files + sum(client.mapped - files for client in clients))


def workers_memory(job: Job, count: int) -> int:
    """Bytes that the server and so many worker processes need together, without what each holds before it does anything."""
    clients = {client.client_id: client_memory(job, client) for client in job.clients}
    needed = server_memory(job).needed
    for names in batches(list(clients), min(count, len(clients))):
        shared, work = _taking_turns([clients[name] for name in names])
        needed += with_heap({**shared, "a client at work": work}).needed
    return needed


def _taking_turns(clients: Sequence[Memory]) -> tuple[Parts, int]:
    """What clients of one process hold together, and what the one at work takes beside it."""
    shared = {
        "outer parts": clients[0].parts["outer parts"],
        "activations": sum(client.parts["activations"] for client in clients),
    }
    return shared, max(client.needed - _resting(client) for client in clients)


def _resting(client: Memory) -> int:
    """What a client holds whether it works or not; the allocator's part is added once for all."""
    return sum(client.parts[name] for name in ("outer parts", "activations", "heap"))


def _mapped(model: Outline) -> int:
    """Parts of the checkpoint that are mapped at the same time: the outer ones, then a block while it is read."""
    return max(model.outer, *model.blocks) * model.stored.itemsize
