"""Run a causal LM block by block, and prune some of its blocks (docs/method.md section 1).

First the model itself is called with every block replaced by a recorder. It makes masks, positions and all other inputs of
its blocks, and the recorder keeps the arguments of each call. Then the blocks run one after the other over all
batches, with exactly those arguments and the hidden states from the previous block. This module knows nothing about
attention masks or rotary embeddings, so a new release of transformers can break little.

For a sampled block, one pass collects the statistic of each distinct linear input (query, key and value share one, gate
and up share one) and, from the second batch on, stops after the last of them. Then the linears are pruned, and a
second pass with the pruned weights gives the next block's inputs. Other blocks run once. Nothing runs after the last
sampled block.

Legend: B windows in a batch, T tokens in a window, H hidden size, I in features.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fedspallm_appfl.errors import ModelError, PruningError
from fedspallm_appfl.heap import give_back
from fedspallm_appfl.models.activations import HiddenStates, hidden_states
from fedspallm_appfl.models.layout import Linear
from fedspallm_appfl.models.lazy_model import LazyModel
from fedspallm_appfl.pruning.pruner import Settings, new_statistic, prepare
from fedspallm_appfl.pruning.statistics import Statistic
from fedspallm_appfl.wire.packed import Packed, unpack_mask


@dataclass
class Call:
    """The arguments of one call of a block except the hidden states, which come first or as `hidden_states`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, block: nn.Module, hidden: Tensor) -> Any:
        """Call the block like the model did, with these hidden states."""
        if "hidden_states" in self.kwargs:
            return block(*self.args, **{**self.kwargs, "hidden_states": hidden})
        return block(hidden, *self.args[1:], **self.kwargs)


@dataclass
class Activations:
    """The inputs of the next block.

    Attributes:
        hidden: per batch (B, T, H), in the dtype of the model; a single copy, with batches replaced one by one.
        calls: per batch, per block, the recorded arguments.
        tuples: whether blocks return a tuple; known after the first one has run.
    """

    hidden: HiddenStates
    calls: list[list[Call]] = field(default_factory=list)
    tuples: bool = False

    def take_output(self, number: int, out: Any) -> None:
        """Replace a batch by the block's output for it."""
        self.tuples = isinstance(out, tuple)
        self.hidden[number] = out[0] if self.tuples else out


class Stop(Exception):  # noqa: N818 - not an error
    """Ends a forward pass once it is no longer needed."""


@torch.no_grad()
def embed(
    model: LazyModel, windows: Tensor, batch: int, activations: str = "memory", client: str = "local"
) -> Activations:
    """Record the inputs of the first block and the arguments of all blocks.

    Args:
        model: the model.
        windows: (n, T) int64 token ids.
        batch: windows in a batch.
        activations: where hidden states are kept, one of `ACTIVATIONS`.
        client: whom to name in errors.

    Returns:
        Activations before the first block.
    """
    state = Activations(hidden_states(activations, len(windows), client))
    for ids in windows.split(batch):
        calls: list[Call] = []
        recorder = _recorder(calls, len(model.blocks))
        with _forwards_replaced(model.blocks, [recorder] * len(model.blocks)), suppress(Stop):
            model.model(input_ids=ids.to(model.device), use_cache=False)
        if len(calls) != len(model.blocks):
            raise ModelError(
                f"{type(model.model).__name__} called {len(calls)} of the {len(model.blocks)} blocks of "
                f"`{model.layout.path}` in one pass; name its decoder blocks in `model.blocks`"
            )
        state.hidden.append(_hidden_of(calls[0]))
        state.calls.append([_without_hidden(call) for call in calls])
        _share_equal(state.calls)
    return state


def _recorder(calls: list[Call], blocks: int) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(Call(args, kwargs))
        if len(calls) == blocks:
            raise Stop
        return args[0] if args else kwargs["hidden_states"]

    return forward


def _hidden_of(call: Call) -> Tensor:
    return call.kwargs["hidden_states"] if "hidden_states" in call.kwargs else call.args[0]


def _without_hidden(call: Call) -> Call:
    if "hidden_states" in call.kwargs:
        return Call(call.args, {**call.kwargs, "hidden_states": None})
    return Call((None, *call.args[1:]), call.kwargs)


def _share_equal(batches: list[list[Call]]) -> None:
    """Keep one copy of masks and positions: a batch with the same arguments as the previous one shares them."""
    if len(batches) > 1 and _equal(batches[-2], batches[-1]):
        batches[-1] = batches[-2]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a is b or (isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))
    if isinstance(a, Call):
        return isinstance(b, Call) and _equal(a.args, b.args) and _equal(a.kwargs, b.kwargs)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return bool(a is b or (type(a) is type(b) and isinstance(a, int | float | str) and a == b))


@contextmanager
def _forwards_replaced(blocks: nn.ModuleList, forwards: list[Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward methods of the blocks but not the blocks: models read their attributes between calls."""
    for block, forward in zip(blocks, forwards, strict=True):
        block.forward = forward
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


@torch.no_grad()
def advance(block: nn.Module, index: int, state: Activations) -> None:
    """Run one block over all batches and replace its inputs by its outputs."""
    for number, hidden in enumerate(state.hidden):
        state.take_output(number, state.calls[number][index](block, hidden))


def finish(model: LazyModel, windows: Tensor, state: Activations, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Run the part after the blocks: for each batch (token ids (B, T), logits (B, T, vocabulary))."""
    for ids, hidden in zip(windows.split(batch), state.hidden, strict=True):
        yield ids, _logits(model, ids, hidden, state.tuples)


@torch.no_grad()
def _logits(model: LazyModel, ids: Tensor, hidden: Tensor, tuples: bool) -> Tensor:
    through = [_return_input(tuples)] * (len(model.blocks) - 1)
    with _forwards_replaced(model.blocks, [*through, _return_always((hidden,) if tuples else hidden)]):
        return model.model(input_ids=ids.to(model.device), use_cache=False).logits


def _return_input(tuples: bool) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden,) if tuples else hidden

    return forward


def _return_always(out: Any) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return out

    return forward


class Agreed(Protocol):
    """Pruned matrices by block, such as a dict or `AgreedBlocks`."""

    def get(self, block: int, /) -> Mapping[str, Packed] | None:
        """The matrices of a block, or None if it is dense."""


@dataclass
class PrunedLinear:
    """One pruned matrix.

    Attributes:
        weight: (O, I) in the dtype of the checkpoint, zero where pruned.
        mask: (O, I) bool, True = kept.
        notes: notes for the report.
    """

    weight: Tensor
    mask: Tensor
    notes: dict[str, float]


def prune_blocks(
    model: LazyModel,
    windows: Tensor,
    assigned: set[int],
    settings: Settings,
    *,
    batch: int = 1,
    pruned: Agreed | None = None,
    masks: Agreed | None = None,
    client: str = "local",
    activations: str = "memory",
) -> Iterator[tuple[int, dict[str, PrunedLinear]]]:
    """Sweep over the blocks and prune the assigned ones, starting from their dense weights.

    Args:
        model: the dense model.
        windows: (n, T) int64 calibration tokens.
        assigned: blocks to prune.
        settings: how to prune a matrix.
        batch: windows in a batch.
        pruned: matrices agreed on so far, used in the forward pass of blocks not assigned.
        masks: packed agreed masks of the assigned blocks; None to choose them here.
        client: whom to name in errors.
        activations: where hidden states between the blocks are kept, `memory` or `file`; both give the same bits.

    Yields:
        (block, linear name -> pruned matrix), as soon as each assigned block is done.

    Raises:
        PruningError: activations are not finite, an input was never seen, or a factorization keeps failing;
            names client, block and linear.
        ConfigError: the disk has no room for a file of hidden states.
    """
    state = embed(model, windows, batch, activations, client)
    last = max(assigned, default=-1)
    for index in range(last + 1):
        agreed = None if index in assigned or pruned is None else pruned.get(index)
        with model.block(index, agreed) as block:
            if index in assigned:
                given = None if masks is None else masks.get(index)
                done = [_prune_block(model, block, index, state, settings, given, client)]
            give_back()
            if index < last:
                advance(block, index, state)
        if index in assigned:
            yield index, done.pop()  # a client that is paused here holds no finished block


@torch.no_grad()  # not on the generator: the wrapper would keep the last yielded value
def _prune_block(
    model: LazyModel,
    block: nn.Module,
    index: int,
    state: Activations,
    settings: Settings,
    given: Mapping[str, Packed] | None,
    client: str,
) -> dict[str, PrunedLinear]:
    linears = {linear.name: linear for linear in model.layout.blocks[index]}
    where = f"client {client}, block {index}"
    done: dict[str, PrunedLinear] = {}
    statistics = _statistics(model, block, index, state, settings)
    give_back()  # memory of the forward pass; the solve allocates other sizes
    for names, statistic in statistics:
        if statistic is not None:
            check_statistic(statistic, f"{where}, {names[0]}")
    while statistics:
        names, statistic = statistics.pop(0)  # dropped after use: a Gram matrix may be larger than the weight
        group = [linears[name] for name in names]
        done |= _prune_group(model, block, index, group, statistic, settings, given, where)
    return {name: done[name] for name in linears}


def _prune_group(
    model: LazyModel,
    block: nn.Module,
    index: int,
    linears: list[Linear],
    statistic: Statistic | None,
    settings: Settings,
    given: Mapping[str, Packed] | None,
    where: str,
) -> dict[str, PrunedLinear]:
    """Prune linears that share an input, in place."""
    try:
        prepared = prepare(settings, statistic)
    except PruningError as error:
        raise PruningError(f"{where}, {linears[0].name}: {error}") from error
    done = {}
    for linear in linears:
        dense = model.skeleton.dense_weight(index, linear).to(model.device, torch.float32)
        if given is None:
            weight, mask = prepared.prune(dense)
        else:
            mask = unpack_mask(given[linear.name]).to(model.device)
            weight = prepared.compensate(dense, mask)
        if not bool(weight.isfinite().all()):
            what = "pruning gave NaN or infinity; lower `damping`"
            if not bool(dense.isfinite().all()):
                what = "its weights in the checkpoint hold NaN or infinity; download the model again"
            raise PruningError(f"{where}, {linear.name}: {what}")
        done[linear.name] = PrunedLinear(model.put(block, linear, weight), mask, prepared.notes)
        del dense, weight
        model.skeleton.files.release()
    return done


def check_statistic(statistic: Statistic, where: str) -> None:
    """Refuse statistics that no pruner can use.

    Raises:
        PruningError: no token reached the input, or it holds NaN or infinity; names `where`.
    """
    if statistic.tokens == 0:
        raise PruningError(
            f"{where}: no token of the calibration text reached it, so it cannot be pruned by its inputs"
        )
    if not bool(statistic.diagonal().isfinite().all()):
        raise PruningError(
            f"{where}: its inputs hold NaN or infinity; check the calibration text and `model.dtype` "
            "(float16 overflows at 65504, bfloat16 and float32 do not)"
        )


def _statistics(
    model: LazyModel, block: nn.Module, index: int, state: Activations, settings: Settings
) -> list[tuple[list[str], Statistic | None]]:
    """Statistics of the distinct inputs of a block's linears: (linears that share an input, statistic)."""
    linears = model.layout.blocks[index]
    if new_statistic(settings, 1, model.device) is None:
        return [([linear.name for linear in linears], None)]
    inputs = SharedInputs(linears, lambda linear: new_statistic(settings, linear.shape[1], model.device))
    with inputs.watched(block):
        for number, hidden in enumerate(state.hidden):
            with suppress(Stop):
                state.calls[number][index](block, hidden)
            inputs.end_of_batch()
    return inputs.groups()


class SharedInputs:
    """One statistic for each distinct input of a block's linears, identified by the input tensor object."""

    def __init__(self, linears: tuple[Linear, ...], new: Callable[[Linear], Any]) -> None:
        self._linears = linears
        self._new = new
        self._leader: dict[str, str] = {}  # linear -> the first linear that was called with the same tensor
        self._statistics: dict[str, Any] = {}
        self._seen: list[tuple[Tensor, str]] = []  # inputs of this batch; kept because a freed address could be reused
        self._called: set[str] = set()  # in this batch
        self._last: str | None = None

    @contextmanager
    def watched(self, block: nn.Module) -> Iterator[None]:
        """Fold the inputs of a block's linears while it runs."""
        with ExitStack() as hooks:
            for linear in self._linears:
                hook = self._hook(linear)
                hooks.callback(block.get_submodule(linear.name).register_forward_pre_hook(hook).remove)
            yield

    def _hook(self, linear: Linear) -> Callable[..., None]:
        """A forward pre-hook that folds the linear's inputs, unless another linear already does."""
        name = linear.name

        def fold(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._called.add(name)
            if name not in self._leader:
                self._leader[name] = next((other for tensor, other in self._seen if tensor is args[0]), name)
                if self._leader[name] == name:
                    self._statistics[name] = self._new(linear)
            if self._leader[name] == name:
                self._seen.append((args[0], name))
                self._statistics[name].add(args[0])
            if name == self._last:
                raise Stop

        return fold

    def end_of_batch(self, stop: bool = True) -> None:
        """After a batch in which every linear was called, later batches may stop at the last new input."""
        if stop and len(self._called) == len(self._linears):
            self._last = self._seen[-1][1]
        self._called.clear()
        self._seen.clear()

    def groups(self) -> list[tuple[list[str], Any]]:
        """(linears that share an input, statistic), and an empty statistic for a linear that was never called.

        In the order of the forward pass; linears that were never called come last.
        """
        members: dict[str, list[str]] = {leader: [] for leader in self._statistics}
        for linear in self._linears:
            members.setdefault(self._leader.get(linear.name, linear.name), []).append(linear.name)
        by_name = {linear.name: linear for linear in self._linears}
        return [
            (names, self._statistics.get(leader) or self._new(by_name[leader])) for leader, names in members.items()
        ]
