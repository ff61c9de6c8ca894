"""Statistics of the inputs of one LLaMA block: seven linears, four distinct inputs."""

import torch
from torch import Tensor

from benchmarks.context import Context
from benchmarks.measure import interleave, seconds
from benchmarks.memory import peak_above
from benchmarks.models import correlated
from benchmarks.reference.sparsegpt import SparseGPT
from benchmarks.tables import COMPARISON, Table
from fedspallm_appfl.pruning.registry import new_statistic
from fedspallm_appfl.settings.schema import Pruning
from fedspallm_appfl.tensors.target import parse_target

SETTINGS = Pruning("sparsegpt", parse_target("0.5"))
LENGTH = 512
SHARED = ("qkv", "qkv", "qkv", "o", "gate_up", "gate_up", "down")  # the input of each linear


def run(context: Context) -> Table:
    table = Table("Statistics of a LLaMA block", (*COMPARISON, "MB before", "MB ours"))
    sizes = [(64, 128, 2, 2)] if context.quick else [(768, 2048, 32, 4), (2048, 5504, 8, 3)]
    for hidden, mlp, windows, turns in sizes:
        distinct = {name: correlated(LENGTH, mlp if name == "down" else hidden) for name in set(SHARED)}
        before, ours = lambda d=distinct, n=windows: _reference(d, n), lambda d=distinct, n=windows: _ours(d, n)
        times = interleave(turns, lambda b=before: seconds(b), lambda o=ours: seconds(o))
        table.compare(f"hidden {hidden}, MLP {mlp}, {windows} x {LENGTH} tokens", *times, 1.8, 2.0)
        table.rows[-1] = (*table.rows[-1], f"{peak_above(before):.0f}", f"{peak_above(ours):.0f}")
    table.notes.append(
        "Before: a Hessian for each linear, with a running mean, window by window. Ours: an accumulator for each distinct "
        "input. MB: high-water mark above the inputs, statistics included."
    )
    return table


def _reference(distinct: dict[str, Tensor], windows: int) -> list[SparseGPT]:
    pruners = [SparseGPT(torch.empty(1, distinct[name].shape[1])) for name in SHARED]
    for _ in range(windows):
        for name, pruner in zip(SHARED, pruners, strict=True):
            pruner.add(distinct[name].unsqueeze(0))
    return pruners


def _ours(distinct: dict[str, Tensor], windows: int) -> list[object]:
    statistics = {name: new_statistic(SETTINGS, x.shape[1], x.device) for name, x in distinct.items()}
    for _ in range(windows):
        for name, statistic in statistics.items():
            statistic.add(distinct[name].unsqueeze(0))
    return list(statistics.values())
