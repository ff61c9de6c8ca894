"""What `fedspallm estimate` prints: bytes, transports, disk and memory, for people."""

from collections.abc import Iterator, Mapping

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from fedspallm_appfl import estimate, estimate_memory
from fedspallm_appfl.appfl_adaptors import registration
from fedspallm_appfl.config import Config
from fedspallm_appfl.config_rules import headline, rounds_text, uncovered
from fedspallm_appfl.errors import ConfigError
from fedspallm_appfl.estimate import ModelSizes, Outline, RoundTraffic
from fedspallm_appfl.estimate_memory import Memory
from fedspallm_appfl.layer_sampling import expected_uncovered, to_text
from fedspallm_appfl.report import bytes_text

WORDS = {"weights": "pruned weights", "masks": "masks", "values": "values", "grams": "Gram matrices"}


def tables(config: Config) -> Group:
    """Everything that can be said before a run.

    Raises:
        ModelError: the model cannot be opened.
        ConfigError: the sparsity does not fit its matrices.
    """
    outline = estimate.open_outline(config.model)
    model = outline.sizes
    estimate.check_pattern(model, estimate.target_of(config))
    windows = estimate.evaluation_windows(config, outline.folder)
    return Group(
        Text("\n".join([*_who_prunes_what(config, len(model.blocks)), *_what_travels(config, outline)])),
        _traffic(config, model),
        _transports(config, model),
        _disk(config, model),
        *_memory(config, model, windows),
    )


def _who_prunes_what(config: Config, blocks: int) -> Iterator[str]:
    missed = uncovered(config, blocks)
    yield f"{headline(config)}, {blocks} blocks"
    said = f"blocks that nobody draws in {rounds_text(config)}: {to_text(missed) if missed else 'none'}"
    yield said + ("; raise train_configs.resource_share or server_configs.num_global_epochs" if missed else "")
    if config.client_configs.train_configs.layer_sampling == "uniform":
        yield f"expected of uniform sampling: {expected_uncovered(config.roster(), blocks):.2f} a round"


def _what_travels(config: Config, outline: Outline) -> Iterator[str]:
    """The exchanges of a round, and what about them had to be assumed."""
    kinds = [(one.up, one.down) for one in estimate.exchanges_of(config, outline.sizes)]
    times = f"{len(kinds)} times " if len(kinds) > len(set(kinds)) else ""
    ways = [WORDS[up] + " up" + (f", {WORDS[down]} down" if down else "") for up, down in dict.fromkeys(kinds)]
    at_last = "; nothing down after the last" if kinds[-1][1] else ""
    yield f"in a round travel {times}{'; '.join(ways)}{at_last}"
    try:
        made = estimate.messages(config, outline.sizes)
        yield f"messages of a client in a round: {made.count}, the largest {bytes_text(made.largest)}"
    except ConfigError:
        pass  # the table of transports says so
    if config.algorithm == "gram":
        inputs = "; ".join(", ".join(names) for names in outline.sizes.groups[0])
        yield f"taken to share an input, by their names: {inputs}"
    if outline.assumed:
        dtype = str(outline.sizes.stored).removeprefix("torch.")
        yield f"there are no weights in {outline.folder}: taken to be {dtype}, as config.json says"


def _traffic(config: Config, model: ModelSizes) -> Table:
    """Bytes a round; rounds with the same numbers share a line."""
    compressed = config.client_configs.comm_configs.compression == "zstd"
    most = " at most" if compressed else ""
    up = [Column(f"up, a client{most}", justify="right")]
    up += [Column("about, compressed", justify="right")] * compressed
    rest = [Column(name, justify="right") for name in ("dense float16", "up, all", f"down, a client{most}")]
    table = Table("round", Column("blocks", justify="right"), *up, *rest, title="Bytes", title_justify="left")
    rows: dict[tuple[str, ...], list[int]] = {}
    for number, traffic in enumerate(estimate.traffic(config, model), 1):
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
    for transport in estimate.transports(config, model):
        table.add_row(transport.name, "yes" if transport.carries else "no", escape(transport.why))
    return table


def _disk(config: Config, model: ModelSizes) -> Table:
    table = Table("written", Column("bytes", justify="right"), "is there", title="Disk", title_justify="left")
    for one in estimate.disk(config, model):
        table.add_row(one.what, bytes_text(one.nbytes), "afterwards" if one.stays else "while it runs")
    return table


def _memory(config: Config, model: ModelSizes, windows: Mapping[str, int] | None) -> Iterator[RenderableType]:
    columns = [Column(name, justify="right") for name in ("needs", "shows")]
    table = Table(
        "process",
        *columns,
        Column("largest part"),
        Column("lower it with"),
        title="Memory, at most",
        title_justify="left",
    )
    for name, memory in _processes(config, model, windows):
        part, size = max(memory.parts.items(), key=lambda item: item[1])
        numbers = bytes_text(memory.needed), bytes_text(memory.resident)
        table.add_row(escape(name), *numbers, f"{part}, {bytes_text(size)}", LOWER[part])
    yield table
    registration.register()  # imports what every process of a run imports, and then has in memory
    fixed = estimate_memory.resident_now()
    if fixed:
        yield Text(f"beside it each process has Python and its packages, {bytes_text(fixed)} as in this one")
    yield Text(
        "a process shows more than it needs: files that it reads count too until the system wants their memory back"
    )
    if config.evaluation.texts and windows is None:
        yield Text("without the evaluation: evaluation.texts cannot be read here; set evaluation.windows")
    if any(client.train_configs.device != "cpu" for client in config.clients):
        yield Text("on a GPU, what a client takes but its files lies there; measured on CPUs only")


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
    "windows of all texts": "evaluation.windows",
    "a block, or logits": "evaluation.batch",
    "heap": NO_SETTING,
}


def _processes(config: Config, model: ModelSizes, windows: Mapping[str, int] | None) -> Iterator[tuple[str, Memory]]:
    """Each process with its memory; clients with the same numbers share a line."""
    yield "serial, all in one", estimate_memory.serial_memory(config, model)
    if config.algorithm != "centralized":
        yield from _ranks(config, model)
    if windows:
        yield "evaluation", estimate_memory.evaluation_memory(config, model, windows)


def _ranks(config: Config, model: ModelSizes) -> Iterator[tuple[str, Memory]]:
    alike: dict[str, list[str]] = {}
    memory_of = {client.client_id: estimate_memory.client_memory(config, model, client) for client in config.clients}
    for client, memory in memory_of.items():
        alike.setdefault(str(memory), []).append(client)
    for clients in alike.values():
        name = "MPI, each client" if len(alike) == 1 else f"MPI, {', '.join(clients)}"
        yield name, memory_of[clients[0]]
    yield "MPI, server", estimate_memory.server_memory(config, model)
