"""SparseGPT on one matrix: everything between the finished Gram matrix and the pruned weight."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.context import Context
from benchmarks.measure import interleave, seconds
from benchmarks.memory import peak_above
from benchmarks.models import correlated
from benchmarks.reference.sparsegpt import SparseGPT
from benchmarks.tables import COMPARISON, Table
from fedspallm_appfl.pruning.registry import new_statistic, prepare
from fedspallm_appfl.settings.schema import Pruning
from fedspallm_appfl.tensors.target import parse_target

WIDE = [(768, 768), (3072, 768), (2048, 2048)]  # rows >= columns: the loop over columns weighs most
LONG = [(768, 3072), (2048, 5504)]  # columns > rows: the factorization does
PATTERNS = {"0.5": {"share": 0.5}, "2:4": {"pattern": (2, 4)}}


def run(context: Context) -> Table:
    table = Table("SparseGPT, one matrix", (*COMPARISON, "MB before", "MB ours", "same mask"))
    wide, long, turns = ([(64, 64)], [(64, 128)], 2) if context.quick else (WIDE, LONG, 5)
    for shapes, targets in ((wide, (3.0, 6.0)), (long, (2.0, 3.0))):
        for shape in shapes:
            layer = Layer(shape)
            for text in PATTERNS:
                _compare(table, layer, text, turns if shape[1] < 4096 else min(turns, 3), targets)
    table.notes.append(
        "`same mask`: share of entries on which both agree; the authors' code prunes one entry more in every block of 128 "
        "columns. MB: high-water mark above weight and statistic."
    )
    return table


class Layer:
    """A weight and the statistics of its inputs, which jobs get copies of: they may use them up."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape
        self._weight = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(2))
        self._reference = SparseGPT(self._weight)
        self._gram = new_statistic(_settings("0.5"), shape[1], torch.device("cpu"))
        for part in range(4):
            inputs = correlated(max(1024, shape[1] // 2), shape[1], seed=part)
            self._reference.add(inputs.unsqueeze(0))
            self._gram.add(inputs)

    def reference(self, text: str) -> Callable[[], Tensor]:
        """A job of the reference, which returns the mask."""
        pruner = copy.deepcopy(self._reference)

        def job() -> Tensor:
            pruner.prune(**PATTERNS[text])
            return pruner.weight != 0

        return job

    def ours(self, text: str) -> Callable[[], Tensor]:
        """The same by the package."""
        weight, gram, settings = self._weight.clone(), copy.deepcopy(self._gram), _settings(text)
        return lambda: prepare(settings, gram).prune(weight)[1]


def _settings(text: str) -> Pruning:
    return Pruning("sparsegpt", parse_target(text))


def _compare(table: Table, layer: Layer, text: str, turns: int, targets: tuple[float, float]) -> None:
    times = interleave(turns, lambda: seconds(layer.reference(text)), lambda: seconds(layer.ours(text)))
    table.compare(f"{layer.shape[0]} x {layer.shape[1]}, {text}", *times, *targets)
    memory = [f"{peak_above(job):.0f}" for job in (layer.reference(text), layer.ours(text))]
    agreement = (layer.reference(text)() == layer.ours(text)()).float().mean()
    table.rows[-1] = (*table.rows[-1], *memory, f"{100 * agreement:.3f} %")
