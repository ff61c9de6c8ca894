"""How time and memory grow with clients and with blocks: a narrow model, whole rounds in one process, and a plot."""

from pathlib import Path

import torch

from benchmarks import children
from benchmarks.context import Context
from benchmarks.models import add_demo_tokenizer, save_llama
from benchmarks.tables import Table

CLIENTS, BLOCKS = (4, 16, 64), (4, 8, 32)
FIXED_CLIENTS, FIXED_BLOCKS = 4, 4
LINEAR = 1.2
FLAT = {"clients": 1.2, "blocks": 1.1}  # clients share a process here, and each has activations of its own

COLUMNS = ("what", "CPU s", "s for each", "to the first", "peak MB", "to the first", "MB for each more", "must", "met")

Points = list[tuple[int, dict[str, float]]]


def run(context: Context) -> Table:
    counts, depths = ((2, 4), (2, 4)) if context.quick else (CLIENTS, BLOCKS)
    hidden, mlp = (64, 96) if context.quick else (512, 1376)
    models = {
        depth: add_demo_tokenizer(
            save_llama(context.scratch / f"model-{depth}", hidden, mlp, depth, 1024, torch.float16)
        )
        for depth in {*depths, FIXED_BLOCKS}
    }

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
