"""How long clients and server will work: small steps are timed on this machine, and arithmetic does the rest.

Timed are a product of matrices in the model's arithmetic, a Gram matrix, a pass through a block of the model without its
linears, and the pruner on square matrices of growing sides. The work of linears follows from their shapes, that of the
pruner from how its time grows. Not counted are start-up, the tokenizer, messages, and reading the checkpoint.

Legend: O out features, I in features, T tokens in a window.
"""

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from fedspallm_appfl.algorithms.algorithm import SQUARES, Exchange, of_round, parts_of_sweep
from fedspallm_appfl.allocation.choice import JUDGE, LEVELS, WIDTHS
from fedspallm_appfl.devices import threads
from fedspallm_appfl.estimates.job import Job, pruner_of, windows_of
from fedspallm_appfl.models.blockwise import embed
from fedspallm_appfl.models.lazy_model import HollowModel
from fedspallm_appfl.pruning.pruner import Prepared
from fedspallm_appfl.pruning.registry import new_statistic, prepare
from fedspallm_appfl.pruning.statistics import InputGram, Statistic
from fedspallm_appfl.recovery.steps import batches_of_step
from fedspallm_appfl.settings.schema import Client, Data, Pruning, TrainConfigs
from fedspallm_appfl.tensors.target import NM, Target

PASSES = 3  # forward, again and backward; or to collect, with what was pruned, and on other windows
SPREAD = 2.0  # measured times lay between half and twice the estimate
SIDES = (64, 128, 256, 512, 1024, 2048)  # of the matrices that are timed, as long as that does not take long
LONGEST = 0.05  # seconds; after a step that takes more, no larger one is timed
REPEATED = 0.03  # seconds; shorter steps are repeated
WIDEST = 1024  # of the product that is timed
TOKENS = 512  # of the product, and the longest window of the pass
ENTRIES = 2**19  # hidden states of the pass
STEP = {True: 4, False: 3}  # forward passes that a step of recovery takes; with blocks run again, and without
SYMMETRIC = 9 / 16  # of the operations of a product, that a Gram matrix takes


@dataclass(frozen=True)
class Durations:
    """Seconds of work on this machine.

    Attributes:
        clients: client -> seconds, in all rounds.
        server: seconds that the server prunes, where it does; aggregation is not counted.
        allocation: seconds that it takes to choose the targets of all matrices, where they are chosen.
    """

    clients: dict[str, float]
    server: float
    allocation: float = 0.0


def durations(job: Job) -> Durations:
    """Time small steps and scale them; takes about a second for each kind of pruner among the clients."""
    machines: dict[str, Machine] = {}

    def machine_of(train: TrainConfigs) -> Machine:
        """Clients of the same settings share what is timed."""
        return machines.setdefault(f"{_fitting(train)}, {train.threads}", Machine(train, job))

    clients = {
        client.client_id: sum(
            _sweep(job, client, machine_of(client.train_configs), set(assigned[client.client_id]), exchange)
            for assigned in job.draws
            for exchange in _sweeps(job)
        )
        + job.config.recovery.rounds * _recovering(job, client, machine_of(client.train_configs))
        for client in job.clients
    }
    server = 0.0
    if job.algorithm.gathers:
        machine = machine_of(job.config.client_configs.train_configs)
        changed = (set().union(*assigned.values()) for assigned in job.draws)
        server = sum(_solving(job, machine, block) for blocks in changed for block in blocks)
    allocating = _allocating(job, machine_of) if job.config.allocates else 0.0
    return Durations(clients, server, allocating)


def _allocating(job: Job, machine_of: Callable[[TrainConfigs], "Machine"]) -> float:
    """Seconds that the server takes before the run: loss curves, gradients, and a model for each width that is tried."""
    train = dataclasses.replace(job.config.client_configs.train_configs, pruner=JUDGE, refit=False)
    machine, data = machine_of(train), Data(windows=job.config.allocation.windows, batch=job.config.allocation.batch)
    data.length = job.allocation_length
    tokens, total = data.windows * data.length, 0.0
    tries = len(WIDTHS) if job.config.allocation.width == "auto" else 0
    for block in job.model.layout.pruned:
        once = machine.forward(block, tokens, data)
        inputs = [job.model.shapes[block][names[0]][1] for names in job.model.groups[block]]
        collecting = sum(machine.collecting(features, tokens, True) for features in inputs)
        changes = sum(machine.collecting(features, rows, True) for rows, features in job.model.shapes[block].values())
        total += PASSES * once + collecting + LEVELS * (_solving(job, machine, block) + changes)
        total += tries * (PASSES * once + collecting + _solving(job, machine, block))
    return total


def _sweeps(job: Job) -> list[Exchange]:
    """One exchange for each sweep of a round; all exchanges of Gram matrices are one, and recovery is not a sweep."""
    own = of_round(job.exchanges, last=False)
    sweeps = [exchange for number, exchange in enumerate(own) if exchange.only is None or number == 0]
    return [one for one in sweeps if not one.speaks and not (one.hidden and one.up == "grams")]  # these were collected


def _sweep(job: Job, client: Client, machine: "Machine", blocks: set[int], exchange: Exchange) -> float:
    """Seconds of one sweep over the blocks."""
    windows, length = windows_of(job, client)
    tokens, last, total = windows * length, max(blocks, default=-1), 0.0
    gathers = exchange.up in ("grams", SQUARES)
    for block in range(last + 1):
        total += _passes(job, client, block, blocks) * machine.forward(block, tokens, client.data)
        if block in blocks:
            inputs = [job.model.shapes[block][names[0]][1] for names in job.model.groups[block]]
            total += sum(machine.collecting(features, tokens, gathers) for features in inputs)
            total += 0.0 if gathers else _solving(job, machine, block)
    return total


def _recovering(job: Job, client: Client, machine: "Machine") -> float:
    """Seconds of a round of recovery: passes of the dense model and of the pruned one, and steps."""
    recovery, model, (windows, length) = job.config.recovery, job.model, windows_of(job, client)
    whole = recovery.scope == "all"
    before = (recovery.loss == "kl") if whole else 2  # passes of all windows
    stepping = STEP[whole] * recovery.steps * batches_of_step(recovery, client.data.batch) * client.data.batch
    passes = length * (windows * before + stepping)
    blocks = sum(machine.forward(block, 1, client.data) for block in range(len(model.blocks)))
    head = machine.product(length * stepping, model.hidden * model.vocabulary) if whole else 0.0
    return passes * blocks + head


def _passes(job: Job, client: Client, block: int, blocks: set[int]) -> float:
    """How often all tokens run through a block; a pass that collects an input ends in front of it."""
    assigned, goes_on = block in blocks, block < max(blocks)
    before = _shares_before(job, block) or [0.0]  # nothing of it is pruned
    if not job.algorithm.gathers:
        train = client.train_configs
        collected = assigned and pruner_of(train).statistic(train.refit) is not None
        return goes_on + collected * before[-1]
    gram = job.config.gram
    if gram.propagate == "dense":
        return 1.0 if goes_on else before[-1]
    if gram.by_input:
        return job.hidden_copies * (goes_on + assigned * sum(before))
    return _passes_by_block(job, block, blocks, before[-1])


def _passes_by_block(job: Job, block: int, blocks: set[int], at_end: float) -> float:
    """In a sweep: a pass ahead to the last block of each part, and one of what was pruned to the last part."""
    parts = parts_of_sweep(job.model.groups, job.config.gram.stride)
    assigned = ((part[0][0], blocks & {index for index, _ in part}) for part in parts)
    mine = [(first, max(of)) for first, of in assigned if of]
    ahead = sum((block < last) + at_end * (block == last) for first, last in mine if first <= block)
    return ahead + (block < mine[-1][0])


def _shares_before(job: Job, block: int) -> list[float]:
    """For each input of a block the share of its linears that run before."""
    shapes, done, shares = job.model.shapes[block], 0, []
    for names in job.model.groups[block]:
        shares.append(done / job.model.entries(block))
        done += sum(math.prod(shapes[name]) for name in names)
    return shares


def _solving(job: Job, machine: "Machine", block: int) -> float:
    """Seconds that pruning all matrices of a block takes."""
    shapes = job.model.shapes[block]
    return sum(
        machine.preparing(shapes[names[0]][1]) + sum(machine.pruning(*shapes[name]) for name in names)
        for names in job.model.groups[block]
    )


class Machine:
    """How fast this machine is at the steps of clients with the same settings."""

    def __init__(self, train: TrainConfigs, job: Job) -> None:
        self._train, self._job = train, job
        self._passes: dict[tuple[int, int], float] = {}

    def forward(self, block: int, tokens: int, data: Data) -> float:
        """Seconds of a pass of all tokens through a block."""
        model, length = self._job.model, min(data.length, TOKENS)
        batch = max(1, min(data.batch, data.windows, ENTRIES // (length * model.hidden)))
        if (batch, length) not in self._passes:
            step = _Pass(self._job, batch, length).run
            self._passes[batch, length] = self._seconds(step) / (batch * length)
        attention = 4 * (data.length - length) * model.hidden  # of a longer window than was timed
        return tokens * (
            self._passes[batch, length]
            + (2 * sum(linear.entries for linear in model.linears[block]) + attention) / self._products
        )

    def product(self, tokens: int, entries: int) -> float:
        """Seconds to multiply tokens by a matrix of so many entries."""
        return tokens * 2 * entries / self._products

    def collecting(self, features: int, tokens: int, gram: bool) -> float:
        """Seconds to collect what is to be known of an input; `gram` if its Gram matrix is sent."""
        known = gram or pruner_of(self._train).statistic(self._train.refit) is InputGram
        drift = gram and self._job.config.gram.drift
        return (SYMMETRIC + drift) * 2 * tokens * features**2 / self._grams if known else 0.0

    def preparing(self, features: int) -> float:
        """Seconds to make the pruner ready for all matrices that take an input."""
        return _grown(self._steps[0], features)

    def pruning(self, rows: int, features: int) -> float:
        """Seconds to prune a matrix; a pruner's time is proportional to the rows."""
        return rows / features * _grown(self._steps[1], features)

    @cached_property
    def _products(self) -> float:
        """Operations a second of the widest linear, in the model's arithmetic."""
        shapes = (shape for shapes in self._job.model.shapes.values() for shape in shapes.values())
        rows, features = (min(side, WIDEST) for side in max(shapes, key=math.prod))
        weight, inputs = (torch.ones(n, features, dtype=self._job.model.arithmetic) for n in (rows, TOKENS))
        seconds = self._seconds(lambda: nn.functional.linear(inputs, weight))
        return 2 * TOKENS * rows * features / seconds

    @cached_property
    def _grams(self) -> float:
        """Operations a second of a Gram matrix."""
        side = min(self._widest, TOKENS)
        gram, inputs = InputGram(side), torch.ones(TOKENS, side)
        return SYMMETRIC * 2 * TOKENS * side**2 / self._seconds(lambda: gram.add(inputs))

    @property
    def _widest(self) -> int:
        return max(features for shapes in self._job.model.shapes.values() for _, features in shapes.values())

    @cached_property
    def _steps(self) -> tuple[dict[int, float], dict[int, float]]:
        """Side of a square matrix -> seconds to make the pruner ready, and to prune it."""
        preparing: dict[int, float] = {}
        pruning: dict[int, float] = {}
        for side in SIDES:
            step = _Solve(self._train, side)
            preparing[side], pruning[side] = self._seconds(step.prepare), self._seconds(step.prune)
            if side >= self._widest or max(preparing[side], pruning[side]) > LONGEST:
                break
        return preparing, pruning

    def _seconds(self, step: Callable[[], object]) -> float:
        """Seconds of a step with the client's threads: the least of several, as nothing makes it faster than it is."""
        with threads(self._train.threads):
            found, started = [_timed(step)], time.perf_counter()
            while found[0] < LONGEST and time.perf_counter() - started < REPEATED:
                found.append(_timed(step))
        return min(found)


def _timed(step: Callable[[], object]) -> float:
    """Wall seconds or those of the CPU, whichever are fewer: other processes make the former longer."""
    started, worked = time.perf_counter(), time.process_time()
    step()
    return min(time.perf_counter() - started, time.process_time() - worked)


def _grown(timed: dict[int, float], side: int) -> float:
    """Seconds at a side: between two that were timed by a power of it, beyond them by its square and its cube."""
    sides = list(timed)
    if side <= sides[0]:
        return timed[sides[0]]
    if side > sides[-1]:
        return _beyond(timed, sides[-2:], side)
    above = next(one for one in sides if one >= side)
    below = above // 2
    power = math.log2(timed[above] / timed[below])
    return timed[below] * (side / below) ** power


def _beyond(timed: dict[int, float], sides: Sequence[int], side: int) -> float:
    """The two largest sides tell what grows with the square, as looking at entries, and with the cube, as products."""
    small, large = (timed[one] / one**2 for one in (sides[0], sides[-1]))
    slope = (large - small) / (sides[-1] - sides[0]) if len(sides) > 1 else 0.0
    slope = min(max(slope, 0.0), large / sides[-1])
    return side**2 * (large + slope * (side - sides[-1]))


class _Pass:
    """A pass of a few windows through the first block that is pruned, without its linears."""

    def __init__(self, job: Job, batch: int, length: int) -> None:
        model = job.model
        hollow = HollowModel(model.folder, model.layout, str(model.arithmetic).removeprefix("torch."))
        index = next(iter(model.layout.pruned))
        self._block, self._index = hollow.blocks[index], index
        for linear in model.layout.blocks[index]:
            if linear.part is None:
                self._block.get_submodule(linear.name).forward = _of_width(linear.shape[0])
            else:
                self._block.get_submodule(linear.part.module).forward = _as_wide
        windows = torch.zeros(batch, length, dtype=torch.int64)
        self._state = embed(hollow, windows, batch)

    @torch.no_grad()
    def run(self) -> None:
        """Do it once."""
        self._state.calls[0][self._index](self._block, self._state.hidden[0])


def _of_width(rows: int) -> Callable[[Tensor], Tensor]:
    return lambda inputs: inputs.new_zeros(*inputs.shape[:-1], rows)


def _as_wide(hidden: Tensor, *routing: Tensor) -> Tensor:
    return torch.zeros_like(hidden)


class _Solve:
    """Pruning a square matrix, in two steps."""

    def __init__(self, train: TrainConfigs, side: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._settings, self._weight = _fitting(train), torch.randn(side, side, generator=generator)
        self._statistic: Statistic | None = new_statistic(self._settings, side, self._weight.device)
        if self._statistic is not None:  # inputs that are alike in part, as those of a model
            inputs = torch.randn(2 * side, side, generator=generator)
            self._statistic.add(inputs + torch.randn(2 * side, 1, generator=generator))
        self._ready: Prepared | None = None

    def prepare(self) -> None:
        """Once for all matrices with the same input; the statistic is used up."""
        self._ready = prepare(self._settings, copy.deepcopy(self._statistic))

    def prune(self) -> None:
        """One matrix."""
        assert self._ready is not None
        self._ready.prune(self._weight)


def _fitting(train: TrainConfigs) -> Pruning:
    """The same settings with a target that fits the matrices that are timed."""
    target: Target = train.sparsity.default
    if isinstance(target, NM) and SIDES[0] % target.group:
        target = NM(2, 4)
    return Pruning(train.pruner, target, train.damping, train.damping_retries, train.iterations, train.refit)
