"""What `fedspallm estimate` prints: the bytes, the memory and the transports of `estimate`, for people."""

from collections.abc import Iterator, Mapping

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from fedspallm_appfl import estimate
from fedspallm_appfl.appfl_adaptors import registration
from fedspallm_appfl.config import Config
from fedspallm_appfl.config_rules import headline, rounds_text, uncovered
from fedspallm_appfl.estimate import Memory, ModelSizes, RoundTraffic
from fedspallm_appfl.layer_sampling import expected_uncovered, to_text
from fedspallm_appfl.lazy_model import Skeleton
from fedspallm_appfl.report import bytes_text
from fedspallm_appfl.sparsity import parse_target


def tables(config: Config) -> Group:
    """Everything that can be said before a run.

    Raises:
        ModelError: the model cannot be opened.
        ConfigError: the sparsity does not fit its matrices.
    """
    skeleton = Skeleton(config.model.path, config.model.blocks, config.model.dtype)
    model = ModelSizes.of(skeleton, config.model.dtype)
    estimate.check_pattern(model, parse_target(config.client_configs.train_configs.sparsity))
    windows = estimate.evaluation_windows(config, skeleton.folder)
    return Group(
        Text(_who_prunes_what(config, len(model.blocks))),
        _traffic(config, model),
        _transports(config, model),
        *_memory(config, model, windows),
    )


def _who_prunes_what(config: Config, blocks: int) -> str:
    missed = uncovered(config, blocks)
    lines = [
        f"{headline(config)}, {blocks} blocks",
        f"blocks that nobody draws in {rounds_text(config)}: {to_text(missed) if missed else 'none'}",
    ]
    if missed:
        lines[-1] += "; raise train_configs.resource_share or server_configs.num_global_epochs"
    if config.client_configs.train_configs.layer_sampling == "uniform":
        lines.append(f"expected of uniform sampling: {expected_uncovered(config.roster(), blocks):.2f} a round")
    return "\n".join(lines)


def _traffic(config: Config, model: ModelSizes) -> Table:
    """Bytes a round; rounds with the same numbers share a line."""
    compressed = config.client_configs.comm_configs.compression == "zstd"
    up = [Column("up, a client at most" if compressed else "up, a client", justify="right")]
    up += [Column("about, compressed", justify="right")] * compressed
    rest = [Column(name, justify="right") for name in ("dense float16", "up, all", "down, a client")]
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
    table = Table("transport", "carries it", Column("", overflow="fold"), title="Transports", title_justify="left")
    for transport in estimate.transports(config, model):
        table.add_row(transport.name, "yes" if transport.carries else "no", escape(transport.why))
    return table


def _memory(config: Config, model: ModelSizes, windows: Mapping[str, int] | None) -> Iterator[RenderableType]:
    columns = [Column(name, justify="right") for name in ("at most", "of it files")]
    table = Table(
        "process", *columns, Column("largest part"), Column("lower it with"), title="Memory", title_justify="left"
    )
    for name, memory in _processes(config, model, windows):
        part, size = max(memory.parts.items(), key=lambda item: item[1])
        numbers = bytes_text(memory.resident), bytes_text(memory.mapped)
        table.add_row(escape(name), *numbers, f"{part}, {bytes_text(size)}", LOWER.get(part, ""))
    yield table
    registration.register()  # imports what every process of a run imports, and then has in memory
    fixed = estimate.resident_now()
    if fixed:
        yield Text(f"beside it each process has Python and its packages, {bytes_text(fixed)} as in this one")
    yield Text("files are mapped, and the system takes their memory back when it must")
    if config.evaluation.texts and windows is None:
        yield Text("without the evaluation: evaluation.texts cannot be read here; set evaluation.windows")
    if any(client.train_configs.device != "cpu" for client in config.clients):
        yield Text("on a GPU, what a client takes but its files lies there; measured on CPUs only")


LOWER = {  # largest part of a process -> the setting that makes it smaller
    "activations": "data.activations: file",
    "forward passes": "data.batch",
    "earlier blocks of a message": "comm_configs.blocks_per_message",
    "other open blocks": "scheduler_kwargs.max_open_blocks",
    "uploads": "comm_configs.max_message_bytes",
    "windows of all texts": "evaluation.windows",
    "a block, or logits": "evaluation.batch",
}


def _processes(config: Config, model: ModelSizes, windows: Mapping[str, int] | None) -> Iterator[tuple[str, Memory]]:
    """Each process with its memory; clients with the same numbers share a line."""
    yield "serial, all in one", estimate.serial_memory(config, model)
    alike: dict[str, list[str]] = {}
    memory_of = {client.client_id: estimate.client_memory(model, client) for client in config.clients}
    for client, memory in memory_of.items():
        alike.setdefault(str(memory), []).append(client)
    for clients in alike.values():
        name = "MPI, each client" if len(alike) == 1 else f"MPI, {', '.join(clients)}"
        yield name, memory_of[clients[0]]
    yield "MPI, server", estimate.server_memory(config, model)
    if windows:
        yield "evaluation", estimate.evaluation_memory(config, model, windows)
