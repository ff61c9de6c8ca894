"""What `fedspallm estimate` prints: bytes, transports, disk and memory, for people.

For a configuration that is meant for Globus Compute it speaks of tasks, data store and workers instead of transports.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from fedspallm_appfl.aggregation.layer_sampling import expected_uncovered, to_text
from fedspallm_appfl.errors import ConfigError
from fedspallm_appfl.estimate import memory as estimate_memory
from fedspallm_appfl.estimate import over_globus as estimate_globus
from fedspallm_appfl.estimate import traffic as estimate
from fedspallm_appfl.estimate.memory import Memory, Parts
from fedspallm_appfl.estimate.over_globus import INLINE_LIMIT, Worker
from fedspallm_appfl.estimate.traffic import ModelSizes, Outline, RoundTraffic
from fedspallm_appfl.globus.store.data_store import place
from fedspallm_appfl.runs.report import bytes_text
from fedspallm_appfl.settings.schema import Config
from fedspallm_appfl.validation.rules import headline, rounds_text, uncovered

WORDS = {"weights": "pruned weights", "masks": "masks", "values": "values", "grams": "Gram matrices"}


def tables(config: Config) -> Group:
    """Everything that can be said before a run.

    Raises:
        ModelError: the model cannot be opened.
        ConfigError: the sparsity does not fit its matrices; or a message cannot be carried over Globus Compute.
    """
    outline = estimate.open_outline(config.model)
    model = outline.sizes
    estimate.check_pattern(model, estimate.target_of(config))
    windows = estimate.evaluation_windows(config, outline.folder)
    return Group(
        Text("\n".join([*_who_prunes_what(config, len(model.blocks)), *_what_travels(config, outline)])),
        _traffic(config, model),
        _globus(config, model) if config.over_globus() else _transports(config, model),
        _disk(config, model),
        *_memory(config, model, windows),
    )


def _who_prunes_what(config: Config, blocks: int) -> Iterator[str]:
    missed = uncovered(config, blocks)
    yield f"{headline(config)}, {blocks} blocks"
    if missed:
        yield (
            f"blocks that nobody draws in {rounds_text(config)}: {to_text(missed)}; raise "
            "train_configs.resource_share or server_configs.num_global_epochs"
        )
    else:
        yield "every block is pruned by some client"
    if config.client_configs.train_configs.layer_sampling == "uniform":
        expected = expected_uncovered(config.roster(), blocks)
        yield f"uniform sampling leaves {expected:.2f} blocks a round to nobody, in expectation"


def _what_travels(config: Config, outline: Outline) -> Iterator[str]:
    """The exchanges of a round, and what about them had to be assumed."""
    yield f"each round: {_exchanges([(one.up, one.down) for one in estimate.exchanges_of(config, outline.sizes)], config)}"
    try:
        made = estimate.messages(config, outline.sizes)
        yield f"a client sends {made.count} messages a round, the largest of {bytes_text(made.largest)}"
    except ConfigError:
        pass  # the table of transports says so
    if config.algorithm == "gram":
        inputs = "; ".join(", ".join(names) for names in outline.sizes.groups[0])
        yield f"taken to share an input, by their names: {inputs}"
    if outline.assumed:
        dtype = str(outline.sizes.stored).removeprefix("torch.")
        yield f"there are no weights in {outline.folder}: taken to be {dtype}, as config.json says"


def _exchanges(kinds: Sequence[tuple[str, str | None]], config: Config) -> str:
    """What goes up and down in the exchanges of a round; what is answered in no round is left out."""
    distinct = list(dict.fromkeys(kinds))
    repeated = len(kinds) > len(distinct)
    never = config.server_configs.num_global_epochs == 1 and not repeated
    last = distinct[-1]
    ways = [
        f"{WORDS[up]} up" + (f", {WORDS[down]} down" if down and not (never and (up, down) == last) else "")
        for up, down in distinct
    ]
    at_last = "; nothing down after the last upload of all" if last[1] and not never else ""
    return (f"{len(kinds)} times " if repeated else "") + "; ".join(ways) + at_last


def _traffic(config: Config, model: ModelSizes) -> Table:
    """Bytes a round; rounds with the same numbers share a line."""
    compressed = config.client_configs.comm_configs.compression == "zstd"
    most = " at most" if compressed else ""
    up = [Column(f"up, a client{most}", justify="right")]
    up += [Column("about, compressed", justify="right")] * compressed
    rest = [Column(name, justify="right") for name in ("dense float16", "up, all", f"down, a client{most}")]
    table = Table(
        "round", Column("blocks", justify="right"), *up, *rest, title="Bytes that travel", title_justify="left"
    )
    rows: dict[tuple[str, ...], list[int]] = {}
    made = estimate_globus.traffic(config, model) if config.over_globus() else estimate.traffic(config, model)
    for number, traffic in enumerate(made, 1):
        rows.setdefault(_row(traffic, compressed), []).append(number)
    for row, numbers in rows.items():
        table.add_row(to_text(numbers), *row)
    return table


def _row(traffic: RoundTraffic, compressed: bool) -> tuple[str, ...]:
    return (
        str(traffic.blocks),
        _range(traffic.up),
        *[_range(traffic.zstd)] * compressed,
        _range(traffic.dense),
        bytes_text(sum(traffic.up.values())),
        bytes_text(traffic.down),
    )


def _range(of_clients: Mapping[str, int]) -> str:
    least, most = bytes_text(min(of_clients.values())), bytes_text(max(of_clients.values()))
    return least if least == most else f"{least} to {most}"


def _transports(config: Config, model: ModelSizes) -> Table:
    table = Table(
        "transport", "carries it", Column("what to know", overflow="fold"), title="Transports", title_justify="left"
    )
    for transport in (*estimate.transports(config, model), estimate_globus.transport(config, model)):
        table.add_row(transport.name, "yes" if transport.carries else "no", escape(transport.why))
    return table


def _globus(config: Config, model: ModelSizes) -> Table:
    """Tasks, submissions, and where the bytes lie."""
    tasks, store = estimate_globus.tasks(config, model), config.client_configs.comm_configs.store
    table = Table("", "", show_header=False, title="Over Globus Compute", title_justify="left")
    table.add_row("tasks", f"{_tasks(tasks)}; before them {tasks.exchange} more ask the sites")
    table.add_row("submissions", _submissions(tasks))
    table.add_row("a task or its result", f"up to {bytes_text(tasks.largest)}{_fits(tasks.largest, store.connector)}")
    if store.connector != "none":
        stored, about = (
            max(turn.stored for turn in estimate_globus.turns(config, model, small)) for small in (False, True)
        )
        compressed = config.client_configs.comm_configs.compression == "zstd"
        less = f", about {bytes_text(about)} compressed" if compressed else ""
        table.add_row("data store", escape(f"holds at most {bytes_text(stored)}{less}, in {place(vars(store))}"))
    return table


def _tasks(tasks: estimate_globus.Tasks) -> str:
    of_round = f"{tasks.round} a round, " if tasks.round < tasks.all else ""
    return f"{of_round}{tasks.all} in all, one for each client and exchange"


def _submissions(tasks: estimate_globus.Tasks) -> str:
    least, most = tasks.delay
    if not most:
        return f"one a task; the {tasks.exchange} of an exchange leave at once"
    return (
        f"one a task; {estimate_globus.AT_ONCE} leave at once, each later one 4 to 5 s after the one before, so the last "
        f"of {tasks.exchange} after {least} to {most} s"
    )


def _fits(largest: int, connector: str) -> str:
    if connector != "none":
        return " of tensors, in the data store"
    if largest <= INLINE_LIMIT:
        return f" of tensors; {bytes_text(INLINE_LIMIT)} fit"
    return f" of tensors, but {bytes_text(INLINE_LIMIT)} fit; set client_configs.comm_configs.store.connector"


def _disk(config: Config, model: ModelSizes) -> Table:
    table = Table("written", Column("bytes", justify="right"), "kept", title="Disk", title_justify="left")
    for one in estimate.disk(config, model):
        table.add_row(one.what, bytes_text(one.nbytes), "yes" if one.stays else "while it runs")
    return table


def _memory(config: Config, model: ModelSizes, windows: Mapping[str, int] | None) -> Iterator[RenderableType]:
    globus = config.over_globus()
    columns = [Column(name, justify="right") for name in ("needs", "resident", *["on the GPU"] * globus)]
    table = Table(
        "process",
        *columns,
        Column("largest part"),
        Column("lower it with"),
        title="Memory, at most",
        title_justify="left",
    )
    for name, memory, gpu in _processes(config, model, windows):
        part, size = max((gpu or memory.parts).items(), key=lambda item: item[1])
        numbers = bytes_text(memory.needed), bytes_text(memory.resident)
        on_gpu = [bytes_text(sum(gpu.values())) if gpu else "-"] * globus
        table.add_row(escape(name), *numbers, *on_gpu, f"{part}, {bytes_text(size)}", LOWER[part])
    yield table
    here = estimate_memory.resident_now()
    if here:
        fixed = bytes_text(here + estimate_memory.APPFL)
        yield Text(f"add Python and its packages to each process: {fixed}, this one and what APPFL adds")
    yield Text("resident: with the files that it reads, which the system takes back when it wants their memory")
    if config.evaluation.texts and windows is None:
        yield Text("without the evaluation: evaluation.texts cannot be read here; set evaluation.windows")
    if globus and any(client.train_configs.device != "cpu" for client in config.clients):
        yield Text("on a GPU: computed from what was measured on CPUs; CUDA's own memory comes on top")
    elif any(client.train_configs.device != "cpu" for client in config.clients):
        yield Text("on a GPU, what a client needs lies there; measured on CPUs only")


NO_SETTING = "no setting"
LOWER = {  # largest part of a process -> the setting that makes it smaller
    "outer parts": NO_SETTING,
    "activations": "data.activations: file",
    "one block": NO_SETTING,
    "forward passes": "data.batch",
    "pruning a block": "train_configs.pruner: wanda",
    "Gram matrices": NO_SETTING,
    "packed statistics": "gram.precision: int8",
    "earlier blocks of a message": "comm_configs.blocks_per_message",
    "a client at work": "data.batch, or MPI",
    "open blocks": "comm_configs.blocks_per_message",
    "other open blocks": "scheduler_kwargs.max_open_blocks",
    "block to close": NO_SETTING,
    "uploads": "comm_configs.max_message_bytes",
    "message on its way": "comm_configs.max_message_bytes",
    "what came down": "comm_configs.max_message_bytes",
    "what goes down": NO_SETTING,
    "result of a task": "comm_configs.store",
    "results that wait": "comm_configs.store",
    "windows of all texts": "evaluation.windows",
    "a block, or logits": "evaluation.batch",
    "heap": NO_SETTING,
}

Process = tuple[str, Memory, Parts | None]  # name, main memory, what lies on its GPU


def _processes(config: Config, model: ModelSizes, windows: Mapping[str, int] | None) -> Iterator[Process]:
    """Each process with its memory; clients with the same numbers share a line."""
    if config.over_globus():
        yield from _workers(config, model)
        yield "server", estimate_globus.receiving_memory(config, model), None
    else:
        yield "serial, all in one", estimate_memory.serial_memory(config, model), None
        if config.algorithm != "centralized":
            yield from _ranks(config, model)
    if windows:
        yield "evaluation", estimate_memory.evaluation_memory(config, model, windows), None


def _ranks(config: Config, model: ModelSizes) -> Iterator[Process]:
    memory_of = {client.client_id: estimate_memory.client_memory(config, model, client) for client in config.clients}
    for clients, memory in _alike(memory_of):
        yield f"MPI, {clients or 'each client'}", memory, None
    yield "MPI, server", estimate_memory.server_memory(config, model), None


def _workers(config: Config, model: ModelSizes) -> Iterator[Process]:
    """The worker at each site, with and without a GPU where the configuration leaves it open."""
    workers = {
        client.client_id: (client.train_configs.device, estimate_globus.worker_memory(config, model, client))
        for client in config.clients
    }
    for clients, (device, worker) in _alike(workers):
        yield from _worker(f"worker of {clients}" if clients else "each worker", device, worker)


def _worker(name: str, device: str, worker: Worker) -> Iterator[Process]:
    if device in ("auto", "cpu"):
        yield f"{name}, CPU", worker.on_cpu, None
    if device != "cpu":
        yield f"{name}, GPU", worker.on_gpu, worker.gpu


def _alike(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Clients of one value together, and the value; no names where it is that of all."""
    names: dict[str, list[str]] = {}
    for name, value in values.items():
        names.setdefault(str(value), []).append(name)
    for together in names.values():
        yield ("" if len(names) == 1 else ", ".join(together)), values[together[0]]
