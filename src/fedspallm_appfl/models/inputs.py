"""What goes into the linears of a block: which of them share an input, and statistics of each distinct one.

Query, key and value share an input, gate and up share one; nothing is known here of such names. An input is known by the
identity of the tensor that goes in. Experts in one tensor share theirs as `experts` says.

Legend: T tokens, I in features.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedspallm_appfl.algorithms.algorithm import Groups
from fedspallm_appfl.errors import ModelError, PruningError
from fedspallm_appfl.models import experts
from fedspallm_appfl.models.activations import HiddenStates
from fedspallm_appfl.models.blockwise import Activations, Stop, each_batch, embed, room
from fedspallm_appfl.models.experts import Routed
from fedspallm_appfl.models.layout import Layout, Linear
from fedspallm_appfl.models.lazy_model import HollowModel, Skeleton
from fedspallm_appfl.pruning.statistics import InputNorms, Statistic

New = Callable[[int, torch.device], Any]  # (features, device) -> an empty statistic
_Kept = tuple[HiddenStates, list[Tensor]]  # of each batch hidden states, and the experts of each token
PROBE = 8  # tokens of the pass that finds out which linears share an input


class SharedInputs:
    """One statistic for each distinct input of a block's linears, known by the identity of the tensor that goes in.

    What goes into the experts of a mixture is kept as it came in, and statistics are made of it one expert at a time: those
    of all experts together may be larger than everything else.
    """

    def __init__(
        self,
        linears: tuple[Linear, ...],
        new: New,
        device: torch.device,
        kept: Callable[[], HiddenStates] = list,
    ) -> None:
        """Nothing seen yet.

        Args:
            linears: the block's.
            new: an empty statistic for an input of so many features, on a device.
            device: which one.
            kept: where what goes into experts is kept.
        """
        self._linears = tuple(linear for linear in linears if linear.part is None)
        self._experts = tuple(linear for linear in linears if linear.part is not None)
        self._new: Callable[[Linear], Any] = lambda linear: new(linear.shape[1], device)
        self._device = device
        self._routed: dict[str, list[_Kept]] = {  # module -> what went into it, by device
            linear.part.module: [(kept(), [])] for linear in self._experts if linear.part is not None
        }
        self._leader: dict[str, str] = {}  # linear -> the first linear that was called with the same tensor
        self._statistics: dict[str, Any] = {}
        self._seen: list[tuple[Tensor, str]] = []  # inputs of this batch; held, so that no address is used again
        self._called: set[str] = set()  # in this batch
        self._newest: str | None = None  # of the inputs of this batch
        self._last: str | None = None

    @contextmanager
    def watched(self, block: nn.Module) -> Iterator[None]:
        """Fold what goes into the linears of a block while it runs."""
        with ExitStack() as hooks:
            for linear in self._linears:
                hook = self._hook(linear)
                hooks.callback(block.get_submodule(linear.name).register_forward_pre_hook(hook).remove)
            for module in self._routed:
                keep = self._keep(module)
                hooks.callback(block.get_submodule(module).register_forward_pre_hook(keep, with_kwargs=True).remove)
            yield

    def _hook(self, linear: Linear) -> Callable[..., None]:
        """A forward pre-hook that folds the linear's inputs, unless another linear folds them already."""
        name = linear.name

        def fold(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._called.add(name)
            if name not in self._leader:
                self._leader[name] = next((other for tensor, other in self._seen if tensor is args[0]), name)
                if self._leader[name] == name:
                    self._statistics[name] = self._new(linear)
            if self._leader[name] == name:
                self._seen.append((args[0], name))
                self._newest = name
                self._statistics[name].add(args[0])
            if name == self._last:
                raise Stop

        return fold

    def _keep(self, path: str) -> Callable[..., None]:
        """A forward pre-hook that keeps what goes into the experts of a module."""

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            came, [(hidden, chosen)] = experts.routed(args, kwargs), self._routed[path]
            hidden.append(came.hidden)
            chosen.append(came.chosen)
            self._called.add(path)
            self._newest = path
            if path == self._last:
                raise Stop

        return keep

    def end_of_batch(self, stop: bool = True) -> None:
        """After a batch in which everything was called, later ones may stop at the last new input."""
        if stop and len(self._called) == len(self._linears) + len(self._routed):
            self._last = self._newest
        self._called.clear()
        self._seen.clear()

    def merge(self, other: "SharedInputs") -> None:
        """Take over what was seen on another device; statistics are let go of there, one after the other.

        What went into experts stays there, and is moved when statistics are made of it.

        Raises:
            ModelError: the same linears share an input there and have different ones here.
        """
        for name, leader in other._leader.items():
            if self._leader.setdefault(name, leader) != leader:
                raise ModelError(
                    f"{name} shares an input with {leader} in some batches, with {self._leader[name]} in others; use one "
                    "device for this model, without train_configs.devices"
                )
            if name != leader:
                continue
            if name not in self._statistics:
                self._statistics[name] = self._new(next(one for one in self._linears if one.name == name))
            self._statistics[name].merge(other._statistics.pop(name))
        for path, kept in other._routed.items():
            self._routed[path] += kept

    def groups(self) -> list[tuple[list[str], Any]]:
        """(linears that share an input, statistic), and an empty statistic for a linear that was never called.

        In the order of the forward pass of the first device; linears that were never called come last. Without experts in
        one tensor. The statistics are handed over: they may be larger than the weights, and whoever uses them drops them
        one by one.
        """
        statistics, self._statistics = self._statistics, {}
        members: dict[str, list[str]] = {leader: [] for leader in statistics}
        for linear in self._linears:
            members.setdefault(self._leader.get(linear.name, linear.name), []).append(linear.name)
        by_name = {linear.name: linear for linear in self._linears}
        return [(names, statistics.get(leader) or self._new(by_name[leader])) for leader, names in members.items()]

    def of_experts(self, block: nn.Module) -> Iterator[tuple[list[str], Any]]:
        """(linears that share an input, statistic) for each expert, made one after the other from what was kept.

        Args:
            block: with the weights of the pass. Matrices may be pruned in place once all inputs of their expert were given.
        """
        for (path, expert), groups in _by_expert(self._experts).items():
            module, kept = block.get_submodule(path), self._routed[path]
            if not any(chosen for _, chosen in kept):
                raise ModelError(
                    f"{type(module).__name__} `{path}` holds experts, but the block does not call it: this model is "
                    "not supported"
                )
            statistics = {first: self._new(linears[0]) for first, linears in groups.items()}
            for states, indices in (pair for hidden, chosen in kept for pair in zip(hidden, chosen, strict=True)):
                inputs = Routed(states, indices).of(expert).to(self._device)
                for first in groups:
                    statistics[first].add(inputs if first else experts.inner(module, expert, inputs))
            for first, linears in groups.items():
                yield [linear.name for linear in linears], statistics.pop(first)  # not kept once it was used


def collected(
    block: nn.Module,
    index: int,
    state: Activations,
    new: Callable[[torch.device], SharedInputs],
    take: Callable[[int, Any], None] = lambda number, out: None,
    stop: bool = True,
) -> SharedInputs:
    """What goes into the linears of a block in one pass over all batches.

    Each device has statistics of its own, which are added to those of the first in the order of the devices.

    Args:
        block: with its weights.
        index: which one it is.
        state: what goes into it.
        new: inputs of which nothing is seen yet, on a device.
        take: is told the number of a batch, and what the block gives for it; None where the pass ended before.
        stop: whether a pass may end as soon as the last input was seen; that of a device's first batch never does.
    """
    seen = [new(device) for device in state.at_work]

    def end(number: int, place: int, out: Any) -> None:
        take(number, out)
        seen[place].end_of_batch(stop)

    each_batch(block, index, state, end, [inputs.watched for inputs in seen])
    with room(state.client, state.devices[0], f"sums of block {index} from two devices", "name fewer devices"):
        while len(seen) > 1:
            seen[0].merge(seen.pop(1))
    return seen[0]


def _by_expert(linears: tuple[Linear, ...]) -> dict[tuple[str, int], dict[bool, list[Linear]]]:
    """Matrices in one tensor by module and expert: those that hidden states go into (True), and the last one."""
    found: dict[tuple[str, int], dict[bool, list[Linear]]] = {}
    for linear in linears:
        if linear.part is not None:
            groups = found.setdefault((linear.part.module, linear.part.expert), {})
            groups.setdefault(linear.part.first, []).append(linear)
    return found


def _groups_of_experts(linears: tuple[Linear, ...]) -> Iterator[tuple[str, ...]]:
    """Linears of experts in one tensor that share an input, in the order of `SharedInputs.of_experts`."""
    for groups in _by_expert(linears).values():
        yield from (tuple(linear.name for linear in mine) for mine in groups.values())


@torch.no_grad()
def shared_inputs(folder: Path, layout: Layout) -> Groups:
    """Which linears of each block get the same input, from a pass of a few tokens through one block of each kind.

    It needs no weights. Server and clients come to the same answer without a word, as they hold the same model.

    Args:
        folder: the model folder.
        layout: its blocks.

    Returns:
        For each block the inputs in the order of the forward pass, each as the names of its linears.
    """
    model = HollowModel(folder, layout)
    windows = torch.arange(PROBE).unsqueeze(0) % model.vocabulary
    state, found, kinds = embed(model, windows, 1), [], {}
    for index, linears in enumerate(layout.blocks):
        kind = type(model.blocks[index]), linears
        if kind not in kinds:
            inputs, block = SharedInputs(linears, InputNorms, model.device), model.blocks[index]
            with inputs.watched(block), suppress(Stop):
                state.calls[0][index](block, state.hidden[0])
            kinds[kind] = (*(tuple(names) for names, _ in inputs.groups()), *_groups_of_experts(linears))
        found.append(kinds[kind])
    return tuple(found)


def check_statistic(statistic: Statistic, where: str, skeleton: Skeleton, block: int) -> None:
    """Refuse statistics that no pruner can use.

    Args:
        statistic: of an input.
        where: what errors begin with.
        skeleton: the model, whose weights are looked at where the input is not finite.
        block: the input's block.

    Raises:
        PruningError: no token reached the input, or it holds NaN or infinity; says `where`, and which weight is to blame.
    """
    if statistic.tokens == 0:
        raise PruningError(
            f"{where}: no token of the calibration text reached it, so it cannot be pruned by its inputs"
        )
    if not bool(statistic.diagonal().isfinite().all()):
        if weight := skeleton.not_finite(block):
            raise PruningError(
                f"{where}: its inputs hold NaN or infinity, because {weight} in {skeleton.folder} does; fetch or save the "
                "model again"
            )
        raise PruningError(
            f"{where}: its inputs hold NaN or infinity; look at the calibration text and at `model.dtype` "
            "(float16 overflows at 65504, bfloat16 and float32 do not)"
        )


def inputs_of(block: nn.Module, linear: Linear, state: Activations, number: int, index: int, hidden: Tensor) -> Tensor:
    """What goes into a linear for one batch at its first call, (tokens, I) float32; the pass ends there."""
    seen: list[Tensor] = []

    def take(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        part = linear.part
        if part is None:
            inputs = args[0].reshape(-1, args[0].shape[-1])
        else:
            inputs = experts.routed(args, kwargs).of(part.expert)
            inputs = inputs if part.first else experts.inner(module, part.expert, inputs)
        seen.append(inputs.float())
        raise Stop

    owner = block.get_submodule(linear.name if linear.part is None else linear.part.module)
    hook = owner.register_forward_pre_hook(take, with_kwargs=True)
    try:
        with suppress(Stop):
            state.calls[number][index](block, hidden)
    finally:
        hook.remove()  # also where memory is short: others use the model after this client
    return seen[0] if seen else hidden.new_zeros(0, linear.shape[1], dtype=torch.float32)
