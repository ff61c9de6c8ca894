"""Aggregation of one matrix: from the uploads of all clients to the packed global matrix on disk."""

from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.context import Context
from benchmarks.measure import interleave, seconds, wall_seconds
from benchmarks.memory import peak_above
from benchmarks.reference.aggregation import aggregate
from benchmarks.tables import COMPARISON, Table
from benchmarks.uploads import Shapes, matrix, receive_all, upload
from fedspallm_appfl.devices import threads

DISTINCT = 8  # uploads; more clients than these repeat them
MUST, AIM = 5, 20
THREADS, MUST_THREADED = 2, 10
FLAT_MB = 300


def run(context: Context) -> list[Table]:
    shapes = {"linear": (64, 64) if context.quick else (4096, 4096)}
    uploads = [upload(shapes, seed) for seed in range(DISTINCT)]
    times = _against_naive(shapes, uploads, context.scratch, 2 if context.quick else 3)
    return [times, _memory(shapes, uploads, context.scratch, (4, 8) if context.quick else (4, 16, 64))]


def _against_naive(shapes: Shapes, uploads: list[Any], folder: Path, turns: int) -> Table:
    (shape,) = shapes.values()
    table = Table(f"Aggregation, {shape[0]} x {shape[1]}, 50 %, float16", (*COMPARISON, "MB before", "MB ours"))
    weights, masks = zip(*(matrix(shape, seed) for seed in range(DISTINCT)), strict=True)
    jobs = partial(aggregate, list(weights), list(masks), 0.5), partial(receive_all, shapes, DISTINCT, uploads, folder)
    table.compare(f"{DISTINCT} clients", *interleave(turns, *(partial(seconds, job) for job in jobs)), MUST, AIM)
    with threads(THREADS):
        times = interleave(turns, *(partial(wall_seconds, job) for job in jobs))
    table.compare(f"{DISTINCT} clients, {THREADS} threads, wall time", *times, MUST_THREADED, AIM)
    peaks = [f"{peak_above(job):.0f}" for job in jobs]
    table.rows[:] = [(*row, *peaks) for row in table.rows]
    table.notes.append(
        "Before: stack in float32, mean, one argsort, from dense matrices and masks that lie ready. Ours also checks and "
        "unpacks each upload and packs and stores the result. MB: high-water mark above the inputs."
    )
    return table


def _memory(shapes: Shapes, uploads: list[Any], folder: Path, counts: tuple[int, ...]) -> Table:
    table = Table("Aggregation, memory by clients", ("clients", "s a client", "MB above the uploads", "must", "met"))
    for clients in counts:
        job = partial(receive_all, shapes, clients, uploads, folder)
        took, memory = seconds(job), peak_above(job)
        table.add(clients, took / clients, f"{memory:.0f}", f"<= {FLAT_MB}", "must" if memory <= FLAT_MB else "NO")
    return table
