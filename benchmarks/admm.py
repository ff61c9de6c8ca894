"""ADMM and least squares on one matrix beside SparseGPT: seconds and what they lose."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.context import Context
from benchmarks.measure import seconds
from benchmarks.models import correlated
from benchmarks.tables import Table
from fedspallm_appfl.pruning.registry import prepare
from fedspallm_appfl.pruning.statistics import InputGram, mirror
from fedspallm_appfl.settings.schema import Pruning
from fedspallm_appfl.tensors.target import parse_target

SHAPES = [((768, 768), 1), ((2048, 2048), 1)]  # and how many of it there are
TARGET = "0.7"
JOBS = {"sparsegpt": {}, "sparsegpt + refit": {"refit": True}, "admm": {}}


def run(context: Context) -> Table:
    return measured("One matrix", [((64, 64), 1)] if context.quick else SHAPES, tuple(JOBS))


def measured(title: str, shapes: list[tuple[tuple[int, int], int]], jobs: tuple[str, ...]) -> Table:
    """A row for each shape, and their sum."""
    columns = [text for job in jobs for text in (f"{job} s", f"{job} error")]
    table = Table(f"{title}, {TARGET}", ("matrix", *columns))
    total = dict.fromkeys(jobs, 0.0)
    for shape, count in shapes:
        weight = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(2))
        gram, row = _gram(shape[1]), []
        for job in jobs:
            spent, error = _one(job, weight, gram)
            total[job] += count * spent
            row += [f"{spent:.2f}", f"{error:.5f}"]
        table.add(f"{shape[0]} x {shape[1]}" + (f", {count} of them" if count > 1 else ""), *row)
    if len(shapes) > 1:
        table.add("all, seconds and ratio", *(text for job in jobs for text in _sum(total, job, jobs[0])))
    table.notes.append("CPU seconds; error: squared output error as a share of the squared output.")
    return table


def _sum(total: dict[str, float], job: str, first: str) -> tuple[str, str]:
    return f"{total[job]:.1f}", f"{total[job] / total[first]:.0f}x"


def _gram(features: int) -> InputGram:
    gram = InputGram(features)
    for part in range(2):
        gram.add(correlated(max(1024, features), features, seed=part))
    return gram


def _one(job: str, weight: Tensor, gram: InputGram) -> tuple[float, float]:
    """CPU seconds of preparing and pruning, and the error."""
    settings = Pruning(job.split()[0], parse_target(TARGET), **JOBS[job])
    mine, made = copy.deepcopy(gram), []
    work: Callable[[], None] = lambda: made.append(prepare(settings, mine).prune(weight)[0])  # noqa: E731
    spent = seconds(work)
    return spent, _loss(weight - made[0], gram) / _loss(weight, gram)


def _loss(weight: Tensor, gram: InputGram) -> float:
    return float(((weight @ mirror(gram.upper.clone())) * weight).sum(dtype=torch.float64))
