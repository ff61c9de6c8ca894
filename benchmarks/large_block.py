"""One block of LLaMA-2-7B on the server: 16 clients' uploads, from the first to the stored result."""

from functools import partial
from pathlib import Path

from benchmarks.context import Context
from benchmarks.measure import seconds, wall_seconds
from benchmarks.memory import peak_above
from benchmarks.tables import Table
from benchmarks.uploads import SEVEN_B, SMALL, context, receive_all, upload
from fedspallm_appfl.algorithms import registry
from fedspallm_appfl.estimates.memory import closing_bytes
from fedspallm_appfl.rounds.folds.registry import folds

CLIENTS = 16
PEAK = "MB above the uploads, at most"
DISTINCT = 2  # uploads in memory; the clients send one or the other


def run(where: Context) -> Table:
    shapes = SMALL if where.quick else SEVEN_B
    uploads = [upload(shapes, seed) for seed in range(DISTINCT)]
    measured: dict[str, float] = {}

    def job() -> None:
        measured[PEAK] = peak_above(partial(receive_all, shapes, CLIENTS, uploads, where.scratch))

    def on_the_wall() -> None:
        measured["seconds"] = wall_seconds(job)

    measured["CPU seconds"] = seconds(on_the_wall)
    expected = predicted(shapes, CLIENTS)
    table = Table(f"{CLIENTS} uploads of a block of LLaMA-2-7B", ("what", "measured", "predicted"))
    for what in ("seconds", "CPU seconds", PEAK):
        table.add(what, f"{measured[what]:.1f}", f"{expected[what]:.1f}" if what in expected else "")
    return table


def predicted(shapes: dict[str, tuple[int, int]], clients: int) -> dict[str, float]:
    """What the package itself predicts for this job, by the names of the rows."""
    made = context(shapes, Path())
    [fold] = folds(made, registry.find(made.settings.algorithm).round)
    return {PEAK: closing_bytes([fold.bytes_of(0, name, clients) for name in shapes], clients) / 1e6}
