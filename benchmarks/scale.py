"""How time and memory grow with clients and with blocks: of one server, and of whole rounds in one process, with a plot."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks import children
from benchmarks.context import Context
from benchmarks.models import add_demo_tokenizer, save_llama
from benchmarks.tables import Table

AT_ONE_SERVER = (16, 64, 256, 1024)  # the real clients of `replay` times powers of 4
ALGORITHMS = ("fedspallm", "gram", "consensus")
SERVER_TIME, SERVER_MEMORY = 1.2, 1.3
RECORDS = 0.02  # MB that may stay of a client
SERVED = (
    "algorithm",
    "clients",
    "GB",
    "CPU s",
    "s for each",
    "to the first",
    "s for each more",
    "wall s",
    "peak MB",
    "to the first",
    "same bits",
    "must",
    "met",
)

CLIENTS, BLOCKS = (4, 16, 64), (4, 8, 32)
FIXED_CLIENTS, FIXED_BLOCKS = 4, 4
LINEAR = 1.2
FLAT = {"clients": 1.2, "blocks": 1.1}  # clients share a process here, and each has activations of its own

COLUMNS = ("what", "CPU s", "s for each", "to the first", "peak MB", "to the first", "MB for each more", "must", "met")

Points = list[tuple[int, dict[str, float]]]


def run(context: Context) -> list[Table]:
    return [*at_one_server(context), _in_one_process(context)]


def at_one_server(context: Context) -> list[Table]:
    """Uploads of a wide block, where arithmetic is the work; then many messages of narrow blocks, where records are."""
    counts, algorithms = ((4, 16), ALGORITHMS[:1]) if context.quick else (AT_ONE_SERVER, ALGORITHMS)
    hidden, mlp = (64, 96) if context.quick else (2048, 5504)
    wide, narrow = _model(context, hidden, mlp, 1), _model(context, 64, 96, 2 if context.quick else 32)
    large = _served(context, f"One server, uploads of a block of {hidden} / {mlp}", wide, algorithms, counts)
    small = _served(context, "One server, uploads of many narrow blocks", narrow, algorithms[:1], counts)
    large.notes.append(
        "Uploads of 4 real clients, sent to one server under many names, in a random order: decoded, checked, screened, "
        "folded, finished, logged. CPU and peak from the first upload to the finished model, above what was resident "
        "before; GB are all that was sent. `s for each more` leaves out what does not depend on the number of clients: "
        "with `gram` the server prunes. From 256 clients on an entry counts its votes in two bytes. `same bits`: the model "
        "is that of the 4 clients."
    )
    small.notes.append(
        "A message for each block of a client: what is written down of it is most of the work. Most of what stays is a "
        "loss of the library safetensors 0.8, 56 bytes for each matrix of an upload, since screening reads the dense one."
    )
    return [large, small]


def _served(context: Context, title: str, model: Path, algorithms: Sequence[str], counts: Sequence[int]) -> Table:
    table = Table(title, SERVED)
    for algorithm in algorithms:
        uploads = context.scratch / f"uploads-{model.name}-{algorithm}"
        told = model, algorithm, uploads
        real = children.run("replay", "record", *told)
        points = [
            (
                count,
                children.run(
                    "replay", "play", *told, count, context.scratch / f"served-{model.name}-{algorithm}-{count}"
                ),
            )
            for count in counts
        ]
        for row in _rows_served(algorithm, real["digest"], points):
            table.add(*row)
    return table


def _rows_served(algorithm: str, digest: str, points: Sequence[tuple[int, dict[str, Any]]]) -> list[list[str]]:
    """Time must stay in proportion, and memory and bits as they are."""
    first, start = points[0]
    rows = []
    for count, found in points:
        each, memory = found["cpu"] / count / (start["cpu"] / first), found["peak"] / start["peak"]
        more = f"{(found['cpu'] - start['cpu']) / (count - first):.3f}" if count > first else ""
        same = found["digest"] == digest
        flat = found["peak"] <= SERVER_MEMORY * start["peak"] + RECORDS * (count - first)
        met = "must" if each <= SERVER_TIME and flat and same else "NO"
        times = [f"{found['cpu']:.1f}", f"{found['cpu'] / count:.3f}", f"{each:.2f}x", more, f"{found['seconds']:.0f}"]
        megabytes = [f"{found['peak']:.0f}", f"{memory:.2f}x", "yes" if same else "NO"]
        must = f"<= {SERVER_TIME}x, {SERVER_MEMORY}x + {1000 * RECORDS:g} kB a client"
        rows.append([algorithm, str(count), f"{found['bytes'] / 1e9:.1f}", *times, *megabytes, must, met])
    return rows


def _model(context: Context, hidden: int, mlp: int, depth: int) -> Path:
    folder = context.scratch / f"llama-{hidden}-{depth}"
    return add_demo_tokenizer(save_llama(folder, hidden, mlp, depth, 1024, torch.float16))


def _in_one_process(context: Context) -> Table:
    counts, depths = ((2, 4), (2, 4)) if context.quick else (CLIENTS, BLOCKS)
    hidden, mlp = (64, 96) if context.quick else (512, 1376)
    models = {depth: _model(context, hidden, mlp, depth) for depth in {*depths, FIXED_BLOCKS}}

    @cache  # both curves begin with the same one, and a run that is done goes on where it is
    def job(clients: int, depth: int) -> dict[str, float]:
        return children.run("federation", models[depth], clients, 1, context.scratch / f"run-{clients}-{depth}")

    curves = {
        "clients": [(clients, job(clients, FIXED_BLOCKS)) for clients in counts],
        "blocks": [(depth, job(FIXED_CLIENTS, depth)) for depth in depths],
    }
    table = Table(f"Scale, LLaMA {hidden} / {mlp}", COLUMNS)
    for what, points in curves.items():
        _add(table, what, points)
    _plot(curves, context.out / "scale.png")
    table.notes.append(
        f"Over clients with {FIXED_BLOCKS} blocks, over blocks with {FIXED_CLIENTS} clients, 8 windows of 64 tokens each. "
        "Peak of the whole process, server and all clients in one: what each client holds between two messages (windows, "
        "activations) adds up, and so do the modules without weights of each block. `aggregation` has the server alone. "
        "Plot: scale.png."
    )
    return table


def _add(table: Table, what: str, points: Points) -> None:
    """Rows of one curve; time must stay in proportion and memory as it is."""
    first, start = points[0]
    for count, result in points:
        each, memory = result["cpu"] / count / (start["cpu"] / first), result["peak"] / start["peak"]
        times = (f"{result['cpu']:.2f}", f"{result['cpu'] / count:.3f}", f"{each:.2f}x")
        more = f"{(result['peak'] - start['peak']) / (count - first):.2f}" if count > first else ""
        verdict = "must" if each <= LINEAR and memory <= FLAT[what] else "NO"
        megabytes = (f"{result['peak']:.0f}", f"{memory:.2f}x", more)
        table.add(f"{count} {what}", *times, *megabytes, f"<= {LINEAR}x, {FLAT[what]}x", verdict)


def _plot(curves: dict[str, Points], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(curves), 2, figsize=(8, 6), layout="constrained")
    for row, (what, points) in zip(axes, curves.items(), strict=True):
        for axis, key, label in zip(row, ("cpu", "peak"), ("CPU seconds", "peak MB"), strict=True):
            axis.plot([count for count, _ in points], [result[key] for _, result in points], "o-")
            axis.set(
                xlabel=what, ylabel=label, xlim=(0, None), ylim=(0, 1.1 * max(result[key] for _, result in points))
            )
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
