"""The results of a study in tables: study.md for people, study.json for programs, a table on the console."""

import json
import math
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Group
from rich.markup import escape
from rich.table import Column
from rich.text import Text

from fedspallm_appfl.algorithms.algorithm import Algorithm
from fedspallm_appfl.reports.parts import Part, Table, bytes_text
from fedspallm_appfl.reports.report import versions
from fedspallm_appfl.reports.result import count
from fedspallm_appfl.reports.terminal import ConsoleTable
from fedspallm_appfl.settings.schema import Config
from fedspallm_appfl.study.cells import Cell
from fedspallm_appfl.wire.durable import write_text

# Between clients that are each alone and one pruner that sees all text lies what a federation can gain.
ENDS: tuple[Callable[[Algorithm], bool], ...] = (lambda one: one.apart, lambda one: one.pools_text)
NONE = "-"


@dataclass(frozen=True)
class Study:
    """The results of a study.

    Attributes:
        dense: the model before pruning.
        cells: all others.
        methods: rows of the tables, as spelled by the user.
        targets: one table each.
        seeds: seeds for mean and spread.
        config: the settings that all cells share.
        command: the command that measures the same.
        algorithms: method -> its algorithm.
    """

    dense: Cell
    cells: Sequence[Cell]
    methods: Sequence[str]
    targets: Sequence[str]
    seeds: Sequence[int]
    config: Config
    command: str
    algorithms: Mapping[str, Algorithm]

    def of(self, method: str, target: str) -> list[Cell]:
        """The cells of a method and target, in order of seeds."""
        found = {cell.seed: cell for cell in self.cells if (cell.method, cell.target) == (method, target)}
        return [found[seed] for seed in self.seeds if seed in found]

    def reference(self, end: Callable[[Algorithm], bool]) -> str | None:
        """The first method at one of the ends, preferably without a pruner of its own; None if there is none."""
        found = [method for method in self.methods if end(self.algorithms[method])]
        return min(found, key=lambda method: "+" in method, default=None)

    def sends(self, method: str) -> bool:
        """Whether what its clients send is what a federation would send."""
        return self.algorithms[method].federates


@dataclass(frozen=True)
class Spread:
    """A number over seeds.

    Attributes:
        mean: the mean.
        deviation: the standard deviation of the sample, with n - 1; None for a single seed.
    """

    mean: float
    deviation: float | None

    def text(self, digits: int, factor: float = 1) -> str:
        """As readable text: `21.03 ± 0.04`."""
        mean = f"{factor * self.mean:.{digits}f}"
        return mean if self.deviation is None else f"{mean} ± {factor * self.deviation:.{digits}f}"


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation; not finite if a value is not finite."""
    if not all(map(math.isfinite, values)):
        return Spread(statistics.mean(values), None)
    return Spread(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)


def way_closed(study: Study, method: str, target: str) -> Spread | None:
    """The share of the gap from standalone (0) to centralized (1) that a method closes, by geometric mean and per seed.

    Returns:
        Mean and spread of `(standalone - x) / (standalone - centralized)`; None if one of them is missing, or if
        centralized is not better for some seed, which leaves no gap.
    """
    ends = [study.reference(end) for end in ENDS]
    if None in ends or not study.of(method, target):
        return None
    alone, pooled, mine = ([c.mean for c in study.of(name, target)] for name in (*ends, method) if name is not None)
    if not len(alone) == len(pooled) == len(mine) or any(a <= p for a, p in zip(alone, pooled, strict=True)):
        return None
    return spread([(a - x) / (a - p) for a, p, x in zip(alone, pooled, mine, strict=True)])


def write(study: Study, folder: Path) -> None:
    """Write study.md and study.json.

    Raises:
        ModelError: there is no room.
    """
    write_text(folder / "study.md", page(study))
    facts = {
        "command": study.command,
        "versions": versions(),
        "machine": machine(),
        "dense": asdict(study.dense),
        "cells": [
            {**asdict(cell), "geometric_mean": cell.mean, "sparsity": cell.sparsity, "bits_up": cell.bits_up}
            for cell in study.cells
        ],
    }
    write_text(folder / "study.json", json.dumps(facts, indent=1) + "\n")


def page(study: Study) -> str:
    """study.md."""
    words, *others = (part.markdown() if isinstance(part, Table) else part for part in parts(study))
    return "\n\n".join([f"# {title(study)}", *_plots(), words, *others]) + "\n"


def title(study: Study) -> str:
    """What the study is of."""
    clients = count(len(study.config.clients), "client")
    return f"{count(len(study.methods), 'method')}, {clients}, sparsity {', '.join(study.targets)}"


def heading(target: str) -> str:
    """What stands above the tables of a target."""
    return f"Sparsity {target}"


def parts(study: Study) -> list[Part]:
    """All that study.md and study.html say below the title, beside pictures."""
    found: list[Part] = [_legend(study)]
    for target in study.targets:
        found += [f"## {heading(target)}", "Perplexity on each text:", _quality(study, target)]
        found += ["Cost, mean over seeds; memory is the maximum over seeds:", _cost(study, target)]
    return [*found, "## What was run", *_ran(study)]


def _plots() -> list[str]:
    return [
        "![Perplexity against sparsity](perplexity_sparsity.png)",
        "![Perplexity against bytes uploaded per client](perplexity_bytes.png)",
    ]


def _legend(study: Study) -> str:
    seeds = len(study.seeds)
    over = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed, no spread"
    words = [f"Perplexity, lower is better, {over}. `standalone` is the geometric mean over the clients' own models."]
    ends = [study.reference(end) for end in ENDS]
    if None not in ends:
        words.append(
            f"Gap closed is (a - x) / (a - c) of the geometric means, with a of `{ends[0]}` and c of `{ends[1]}`: 0 % "
            "is what clients reach alone, 100 % what a pruner with all text reaches, with the pruner of both rows. A row "
            "with another pruner can lie outside this range."
        )
    return " ".join(words)


def _quality(study: Study, target: str) -> Table:
    texts = list(study.dense.perplexity)
    dense = [f"{study.dense.perplexity[text]:.2f}" for text in texts]
    rows = [["dense", *dense, f"{study.dense.mean:.2f}", NONE, "0.0000 %"]]
    for method in study.methods:
        cells = study.of(method, target)
        each = [spread([cell.perplexity[text] for cell in cells]).text(2) for text in texts]
        rows.append([method, *each, _mean_of(cells), _way(study, method, target), _sparsity(cells)])
    return Table(["", *texts, "geometric mean", "gap closed", "sparsity"], rows)


def _mean_of(cells: Sequence[Cell]) -> str:
    return spread([cell.mean for cell in cells]).text(2)


def _way(study: Study, method: str, target: str) -> str:
    way = way_closed(study, method, target)
    if way is None:
        return NONE
    if method in map(study.reference, ENDS):  # the ends themselves, whatever the seed
        return f"{100 * way.mean:.0f} %"
    return f"{way.text(0, 100)} %"


def _sparsity(cells: Sequence[Cell]) -> str:
    return ", ".join(dict.fromkeys(f"{100 * cell.sparsity:.4f} %" if cell.entries else NONE for cell in cells))


def _cost(study: Study, target: str) -> Table:
    rows = []
    for method in study.methods:
        cells, sends = study.of(method, target), study.sends(method)
        mark = " †" * any(cell.stored for cell in cells) + " ‡" * any(cell.run_of for cell in cells)
        sent = [_bytes(cells, lambda c: c.up_a_client), _bytes(cells, lambda c: c.down_a_client), _bits(cells)]
        seconds = [spread([cell.client_seconds for cell in cells]), spread([cell.server_seconds for cell in cells])]
        memory = _memory([cell.memory_bytes for cell in cells])
        rows.append(
            [f"{method}{mark}", *(sent if sends else [NONE] * 3), *(s.text(1) for s in seconds), _cpu(cells), memory]
        )
    sent_heads, cost_heads = ["up per client", "down per client", "bits up per weight"], ["CPU seconds", "memory"]
    head = ["", *sent_heads, "client seconds", "server seconds", *cost_heads]
    return Table(head, rows)


def _bytes(cells: Sequence[Cell], count: Callable[[Cell], float]) -> str:
    return bytes_text(statistics.mean(map(count, cells)))


def _bits(cells: Sequence[Cell]) -> str:
    return f"{statistics.mean(cell.bits_up for cell in cells):.2f}"


def _cpu(cells: Sequence[Cell]) -> str:
    known = [cell.cpu_seconds for cell in cells if cell.cpu_seconds is not None]
    return spread(known).text(1) if known else NONE


def _memory(counts: Iterable[int | None]) -> str:
    known = [count for count in counts if count is not None]
    return bytes_text(max(known)) if known else NONE


def _ran(study: Study) -> list[Part]:
    data, evaluation = study.config.client_configs.data, study.config.evaluation
    windows = sorted({client.data.windows for client in study.config.clients})
    some = "all windows" if evaluation.windows is None else f"at most {evaluation.windows} windows"
    lines = [
        f"    {study.command}",
        f"- Versions: {versions()}.",
        f"- Machine: {machine()}; {_threads(study.config)}.",
        f"- Calibration: {_range(windows)} windows of {data.length} tokens per client. "
        f"Evaluation: {some} of {evaluation.length} tokens of each text.",
        f"- Seeds: {', '.join(map(str, study.seeds))}. A seed selects the calibration windows and the sampled layers.",
        "- Sparsity is read back from each written model. Bytes are the tensor bytes of the messages. "
        "`standalone` sends models only to be measured, and for `centralized` the text itself would have to be "
        "sent. Neither is federated, so only `study.json` has their bytes.",
        "- One process runs the server and all clients in turn. Client seconds are the total time of all clients for their "
        "messages: forward passes, pruning, packing. Server seconds are the remaining wall time from when all "
        "clients had opened model and text until the pruned model was written and read back. CPU seconds are the processor "
        "time of all threads from the beginning of the cell until then. Memory is the peak of the process until then, "
        "above what it held when the cell began. Evaluation is in none of them.",
    ]
    if any(cell.stored for cell in study.cells):
        lines.append(
            "- † made from sums gathered once per seed: the uploads of `gram` serve all targets and pruners. Bytes "
            "and client seconds are those of that one upload; count them once. Server seconds, CPU seconds and memory "
            "cover only pruning from the sums."
        )
    if runs := sorted({cell.run_of for cell in study.cells if cell.run_of}):
        lines.append(
            f"- ‡ made of the uploads in the run of `{'` or `'.join(runs)}`: bytes, seconds and memory are those of that "
            "run, and no model was written to count zeros in."
        )
    return [lines[0], "\n".join(lines[1:])]


def _range(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def _threads(config: Config) -> str:
    threads = {client.train_configs.threads for client in config.clients}
    if threads == {None}:
        return count(torch.get_num_threads(), "thread")
    return f"threads per client: {', '.join(str(count or 'default') for count in sorted(threads, key=str))}"


def machine() -> str:
    """The machine of the measurement."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        named = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        name = named[0] if named else name
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{platform.system()}, {name}, {os.cpu_count()} CPUs{gpu}"


def table(study: Study) -> Group:
    """The geometric means on the console: methods by targets, and the bytes uploaded per client."""
    last = study.targets[-1]
    at = f" at {escape(last)}" if len(study.targets) > 1 else ""
    heads = [*map(escape, study.targets), f"gap closed{at}", f"up per client{at}"]
    shown = ConsoleTable("", *(Column(head, justify="right") for head in heads))
    shown.add_row("dense", *[f"{study.dense.mean:.2f}"] * len(study.targets), NONE, NONE)
    for method in study.methods:
        means = [_mean_of(study.of(method, target)) for target in study.targets]
        sent = _bytes(study.of(method, last), lambda cell: cell.up_a_client) if study.sends(method) else NONE
        shown.add_row(escape(method), *means, _way(study, method, last), sent)
    seeds = f", ± over {len(study.seeds)} seeds" if len(study.seeds) > 1 else ""
    return Group(Text(f"Perplexity by sparsity, geometric mean of {len(study.dense.perplexity)} texts{seeds}"), shown)
