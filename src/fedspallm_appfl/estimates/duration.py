"""How long clients and server will work: one small block step is timed on this machine, and arithmetic does the rest.

Timed are a product of matrices in the model's arithmetic, a Gram matrix, and the pruner on matrices of two sizes, from
which
follows how its time grows. A forward pass over all tokens is counted by its operations. What is not counted is start-up,
the tokenizer, messages, and reading the checkpoint.

Legend: O out features, I in features, T tokens in a window.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from fedspallm_appfl.algorithms.algorithm import Exchange
from fedspallm_appfl.estimates.job import Job, pruner_of
from fedspallm_appfl.pruning.registry import new_statistic, prepare
from fedspallm_appfl.pruning.statistics import InputGram
from fedspallm_appfl.settings.schema import Client, Pruning, TrainConfigs
from fedspallm_appfl.tensors.target import NM, Target

SPREAD = 2.0  # measured times lay between half and twice the estimate
SIDES = (256, 512)  # of the matrices that are timed
SHORTEST = 0.02  # seconds; what takes less is repeated
SYMMETRIC = 9 / 16  # of the operations of a product, that a Gram matrix takes


@dataclass(frozen=True)
class Durations:
    """Seconds of work on this machine.

    Attributes:
        clients: client -> seconds, in all rounds.
        server: seconds that the server prunes, where it does; aggregation is not counted.
    """

    clients: dict[str, float]
    server: float


def durations(job: Job) -> Durations:
    """Time a small step and scale it; takes about a second."""
    machines: dict[str, Machine] = {}
    clients = {}
    for client in job.clients:
        train = client.train_configs
        machine = machines.setdefault(str(train), Machine(train, job.model.arithmetic))
        clients[client.client_id] = sum(
            _sweep(job, client, machine, set(assigned[client.client_id]), exchange.up)
            for assigned in job.draws
            for exchange in _sweeps(job)
        )
    server = 0.0
    if job.algorithm.gathers:
        machine = next(iter(machines.values()))
        blocks = [set().union(*assigned.values()) for assigned in job.draws]
        server = sum(_solving(job, machine, block) for changed in blocks for block in changed)
    return Durations(clients, server)


def _sweeps(job: Job) -> list[Exchange]:
    """One exchange for each sweep of a round; all exchanges of Gram matrices are one."""
    return [exchange for number, exchange in enumerate(job.exchanges) if exchange.only is None or number == 0]


def _sweep(job: Job, client: Client, machine: "Machine", blocks: set[int], up: str) -> float:
    """Seconds of one sweep over the blocks."""
    model, tokens = job.model, client.data.windows * client.data.length
    last, total = max(blocks, default=-1), 0.0
    swept = job.algorithm.gathers and job.config.gram.propagate == "pruned"
    for block in range(last + 1):
        passes = float(block < last) + (block in blocks)
        if block in blocks:
            inputs = [model.shapes[block][names[0]][1] for names in model.groups[block]]
            passes += 0.5 * len(inputs) if swept else -(up == "grams" and block < last)  # collected while it goes on
            total += sum(machine.gram(features, tokens) for features in inputs)
            total += 0.0 if up == "grams" else _solving(job, machine, block)
        total += passes * machine.forward(model.entries(block), tokens, client.data.length, model.hidden)
    return total


def _solving(job: Job, machine: "Machine", block: int) -> float:
    """Seconds that pruning all matrices of a block takes."""
    return sum(machine.solve(rows, features) for rows, features in job.model.shapes[block].values())


class Machine:
    """How fast this machine is at the steps of one client."""

    def __init__(self, train: TrainConfigs, arithmetic: torch.dtype) -> None:
        self._train, self._arithmetic = train, arithmetic

    def forward(self, entries: int, tokens: int, length: int, hidden: int) -> float:
        """Seconds of a pass of all tokens through a block of so many entries."""
        return tokens * (2 * entries + 4 * length * hidden) / self._products

    def gram(self, features: int, tokens: int) -> float:
        """Seconds to collect what the pruner needs to know of an input."""
        kind = pruner_of(self._train).statistic(self._train.refit)
        return SYMMETRIC * 2 * tokens * features**2 / self._grams if kind is InputGram else 0.0

    def solve(self, rows: int, features: int) -> float:
        """Seconds to prune one matrix, its inputs being known: measured on small ones, and grown as these do."""
        small, large = self._solves
        growth = min(3.0, max(2.0, math.log2(large / small)))
        side = (rows * features * features) ** (1 / 3)
        return large * (side / SIDES[1]) ** growth

    @cached_property
    def _products(self) -> float:
        """Operations a second of a product in the model's arithmetic."""
        a, b = (torch.ones(SIDES[1], SIDES[1], dtype=self._arithmetic) for _ in range(2))
        return 2 * SIDES[1] ** 3 / self._seconds(lambda: a @ b)

    @cached_property
    def _grams(self) -> float:
        """Operations a second of a Gram matrix."""
        gram, inputs = InputGram(SIDES[1]), torch.ones(SIDES[1], SIDES[1])
        return SYMMETRIC * 2 * SIDES[1] ** 3 / self._seconds(lambda: gram.add(inputs))

    @cached_property
    def _solves(self) -> tuple[float, float]:
        """Seconds to prune a square matrix of either size."""
        small, large = (self._seconds(self._solving(side)) for side in SIDES)
        return small, large

    def _solving(self, side: int) -> Callable[[], object]:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(side, side, generator=generator)
        inputs = torch.randn(2 * side, side, generator=generator) + torch.randn(2 * side, 1, generator=generator)
        settings = _fitting(self._train)

        def solve() -> object:
            statistic = new_statistic(settings, side, inputs.device)
            if statistic is not None:
                statistic.add(inputs)
            return prepare(settings, statistic).prune(weight)

        return solve

    def _seconds(self, step: Callable[[], object]) -> float:
        """Wall seconds of a step with the client's threads, the least of a few."""
        before = torch.get_num_threads()
        torch.set_num_threads(self._train.threads or before)
        try:
            step()  # code that is loaded late
            return min(_timed(step) for _ in range(3))
        finally:
            torch.set_num_threads(before)


def _timed(step: Callable[[], object]) -> float:
    started, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - started) < SHORTEST or not count:
        step()
        count += 1
    return passed / count


def _fitting(train: TrainConfigs) -> Pruning:
    """The same settings with a target that fits the matrices that are timed."""
    target: Target = train.sparsity
    if isinstance(target, NM) and SIDES[0] % target.group:
        target = NM(2, 4)
    return Pruning(train.pruner, target, train.damping, train.damping_retries, train.iterations, train.refit)
