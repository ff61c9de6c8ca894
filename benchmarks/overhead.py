"""What orchestration costs: a round of four clients in one process, without pruning, aggregation and coding."""

from benchmarks import children
from benchmarks.context import Context
from benchmarks.models import DEMO
from benchmarks.tables import Table

CLIENTS = 4
MUST = 0.3


def run(context: Context) -> Table:
    rounds = 1 if context.quick else 3
    table = Table(
        f"Overhead of a round, {CLIENTS} clients, the bundled model", ("seconds a round", "work", "rest", "must", "met")
    )
    for turn in range(1 if context.quick else 3):
        result = children.run("federation", DEMO / "model", CLIENTS, rounds, context.scratch / f"overhead-{turn}")
        rest = (result["seconds"] - result["work"]) / rounds
        cells = (result["seconds"] / rounds, result["work"] / rounds, rest)
        table.add(*(f"{cell:.3f}" for cell in cells), f"<= {MUST}", "must" if rest <= MUST else "NO")
    table.notes.append(
        "Seconds on the wall, a run a row. `work` is what clients take to make messages (calibration, pruning, packing) "
        "and to take updates in, the server to check, fold, combine, store and load; opening model and text is not in it."
    )
    return table
