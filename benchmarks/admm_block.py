"""ADMM on all matrices of a block of LLaMA-2-7B beside SparseGPT; half an hour."""

from benchmarks.admm import measured
from benchmarks.context import Context
from benchmarks.tables import Table

SHAPES = [((4096, 4096), 4), ((11008, 4096), 2), ((4096, 11008), 1)]  # and how many of it there are


def run(context: Context) -> Table:
    shapes = [((64, 64), 4), ((64, 128), 1)] if context.quick else SHAPES
    return measured("A block of LLaMA-2-7B", shapes, ("sparsegpt", "admm"))
