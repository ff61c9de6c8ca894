"""Run a causal LM block by block.

First the model itself is called with every block replaced by a recorder: it makes masks, positions and whatever else its
blocks want, and the recorder keeps the arguments of each call. Then the blocks are run one after the other over all
batches, with exactly those arguments and the hidden states that the block before produced. Nothing is known here about
attention masks or rotary embeddings, so a new release of transformers has little to break.

Legend: B windows in a batch, T tokens in a window, H hidden size.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedspallm_appfl.devices import deal, moved
from fedspallm_appfl.errors import FedSpaLLMError, ModelError, first_line
from fedspallm_appfl.models.activations import HiddenStates, hidden_states
from fedspallm_appfl.models.lazy_model import HollowModel, LazyModel
from fedspallm_appfl.models.probe import wrapped


class Stop(Exception):  # noqa: N818 - nothing went wrong
    """Ends a forward pass that has done what it was run for."""


@dataclass
class Call:
    """The arguments of one call of a block but for the hidden states, which come first or as `hidden_states`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    index: int = 0

    def __call__(self, block: nn.Module, hidden: Tensor) -> Any:
        """Call the block as the model did, with these hidden states.

        Raises:
            ModelError: its code fails; names the block.
        """
        try:
            return self._call(block, hidden)
        except (FedSpaLLMError, Stop, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever the block's code raises
            raise ModelError(
                f"block {self.index} ({type(block).__name__}) fails: {type(error).__name__}: {first_line(error)}"
            ) from error

    def on(self, device: torch.device) -> "Call":
        """The same with its tensors on a device.

        Raises:
            ModelError: an argument may hide tensors; names the block.
        """
        try:
            return replace(self, args=moved(self.args, device), kwargs=moved(self.kwargs, device))
        except TypeError as error:
            raise ModelError(
                f"block {self.index}: an argument of it, {error}; use one device for this model, without "
                "train_configs.devices"
            ) from error

    def _call(self, block: nn.Module, hidden: Tensor) -> Any:
        if "hidden_states" in self.kwargs:
            return block(*self.args, **{**self.kwargs, "hidden_states": hidden})
        return block(hidden, *self.args[1:], **self.kwargs)


@dataclass
class Activations:
    """What goes into the next block.

    Attributes:
        hidden: per batch (B, T, H), in the dtype of the model; one copy, whose batches are replaced one by one.
        calls: per batch, per block, the recorded arguments.
        devices: those of the client; hidden states in memory lie on the first.
        client: whom to name in errors.
    """

    hidden: HiddenStates
    calls: list[list[Call]] = field(default_factory=list)
    devices: tuple[torch.device, ...] = (torch.device("cpu"),)
    client: str = "local"

    @property
    def at_work(self) -> tuple[torch.device, ...]:
        """The devices among which the batches of a pass are dealt: not more than there are batches."""
        return self.devices[: max(1, len(self.hidden))]

    def input_on(self, device: torch.device, number: int) -> Tensor:
        """What goes into the next block for a batch, (B, T, H), on a device."""
        return self.hidden[number].to(device) if isinstance(self.hidden, list) else self.hidden.on(device, number)

    def copy(self) -> "Activations":
        """The same, to be moved on apart from these; batches in memory are shared until one of them is replaced."""
        return replace(self, hidden=self.hidden.copy())

    def take_output(self, number: int, out: Any) -> None:
        """Put what a block gave for a batch in the place of its input, which stays where the pass was ended early."""
        if out is not None:
            hidden = output_of(out)
            self.hidden[number] = hidden.to(self.devices[0]) if isinstance(self.hidden, list) else hidden


def output_of(out: Any) -> Tensor:
    """The hidden states among what a block returns."""
    return out[0] if isinstance(out, tuple | list) else out


@torch.no_grad()
def embed(
    model: LazyModel | HollowModel, windows: Tensor, batch: int, activations: str = "memory", client: str = "local"
) -> Activations:
    """Record the inputs of the first block and the arguments of all blocks.

    Args:
        model: the model.
        windows: (n, T) int64 token ids.
        batch: windows in a batch.
        activations: where hidden states are kept, one of `ACTIVATIONS`.
        client: whom to name in errors.

    Returns:
        Activations in front of the first block.
    """
    state = Activations(hidden_states(activations, len(windows), client), devices=model.devices, client=client)
    for ids in windows.split(batch):
        calls: list[Call] = []
        recorder = _recorder(calls, _returns(model))
        with _forwards_replaced(model.blocks, [recorder] * len(model.blocks)), suppress(Stop):
            _run_model(model, ids)
        if len(calls) != len(model.blocks):
            raise ModelError(
                f"{type(model.model).__name__} called {len(calls)} of the {len(model.blocks)} blocks of "
                f"`{model.layout.path}` in one pass; name its decoder blocks in `model.blocks`"
            )
        state.hidden.append(_hidden_of(calls[0]))
        state.calls.append([_without_hidden(call) for call in calls])
        _share_equal(state.calls)
    return state


def _run_model(model: LazyModel | HollowModel, ids: Tensor) -> Any:
    """Call the model itself.

    Raises:
        ModelError: its code fails.
    """
    try:
        return model.model(input_ids=ids.to(model.device), use_cache=False)
    except (FedSpaLLMError, Stop, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the model's code raises
        raise ModelError(f"{type(model.model).__name__} fails: {type(error).__name__}: {first_line(error)}") from error


def _returns(model: LazyModel | HollowModel) -> tuple[int, ...]:
    """How many values each block returns, 0 for hidden states alone, as far as it is known."""
    return model.layout.returns or (0,) * len(model.blocks)


def _recorder(calls: list[Call], returns: tuple[int, ...]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(Call(args, kwargs, len(calls)))
        if len(calls) == len(returns):
            raise Stop
        return wrapped(_hidden_of(calls[-1]), returns[len(calls) - 1])

    return forward


def _hidden_of(call: Call) -> Tensor:
    return call.kwargs["hidden_states"] if "hidden_states" in call.kwargs else call.args[0]


def _without_hidden(call: Call) -> Call:
    if "hidden_states" in call.kwargs:
        return Call(call.args, {**call.kwargs, "hidden_states": None}, call.index)
    return Call((None, *call.args[1:]), call.kwargs, call.index)


def _share_equal(batches: list[list[Call]]) -> None:
    """Keep one copy of masks and positions: a batch that was called like the one before refers to its arguments."""
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
    """Replace what the blocks do but not the blocks: models read attributes of them between the calls."""
    for block, forward in zip(blocks, forwards, strict=True):
        block.forward = forward
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


@torch.no_grad()
def each_batch(
    block: nn.Module,
    index: int,
    state: Activations,
    take: Callable[[int, int, Any], None],
    watched: Sequence[Callable[[nn.Module], AbstractContextManager[None]]] = (),
) -> None:
    """Run one block over all batches, which are dealt among the devices in turn.

    Args:
        block: with its weights.
        index: which one it is.
        state: what goes into it.
        take: is told the number of a batch, the place of its device in `state.at_work`, and what the block gives, on that
            device and in its thread; None where a hook ended the pass.
        watched: for each of these devices, what is around the pass of the block there; none for nothing.

    Raises:
        ModelError: the block's code fails, or a device has no room for it; names the block.
    """
    devices = state.at_work
    blocks = [block, *(_copy_on(device, block, index, state.client) for device in devices[1:])]
    calls = [_Moved(device) for device in devices]

    def run(number: int, place: int) -> None:
        with room(state.client, devices[place], f"block {index} with its statistics and a batch", "lower data.batch"):
            call, hidden, out = state.calls[number][index], state.input_on(devices[place], number), None
            if place:
                call = calls[place].of(call)
            with suppress(Stop):
                out = call(blocks[place], hidden)
            take(number, place, out)

    with ExitStack() as around:
        for watch, each in zip(watched, blocks, strict=True) if watched else ():
            around.enter_context(watch(each))
        deal(len(state.hidden), devices, run)


class _Moved:
    """Calls on a device; of those that share their arguments, as most do, they are moved there once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: tuple[Call, Call] | None = None  # as it was, and there

    def of(self, call: Call) -> Call:
        if self._last is None or self._last[0] is not call:
            self._last = call, call.on(self._device)
        return self._last[1]


def _copy_on(device: torch.device, block: nn.Module, index: int, client: str) -> nn.Module:
    """A copy of a block on another device, made tensor by tensor; what other objects hold stays where it is."""
    plain = [one for module in block.modules() for one in _tensors(list(vars(module).values()))]
    size = sum(one.nbytes for one in (*block.parameters(), *plain))
    advice = "leave it out of train_configs.devices"
    with room(client, device, f"a copy of block {index}, {size:,} bytes", advice):
        tensors: dict[int, Any] = {id(one): one.to(device, copy=True) for one in plain}
        for one in block.parameters():
            tensors[id(one)] = nn.Parameter(one.detach().to(device, copy=True), requires_grad=False)
        return copy.deepcopy(block, tensors)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Tensors in attributes of a module that are no parameters, and in lists, tuples and dicts of such."""
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        yield value
    elif type(value) in (list, tuple):
        for one in value:
            yield from _tensors(one)
    elif type(value) is dict:
        yield from _tensors(list(value.values()))


@contextmanager
def room(client: str, device: torch.device, what: str, advice: str) -> Iterator[None]:
    """Say who has no room for what on a device.

    Raises:
        ModelError: the device's memory is used up; names client and device.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ModelError(f"client {client}: {device} has no room for {what}; {advice}") from error


def advance(block: nn.Module, index: int, state: Activations) -> None:
    """Run one block over all batches; its outputs take the place of its inputs."""
    each_batch(block, index, state, lambda number, place, out: state.take_output(number, out))


def finish(model: LazyModel, windows: Tensor, state: Activations, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Run what comes after the blocks: for each batch (token ids (B, T), logits (B, T, vocabulary))."""
    for ids, hidden in zip(windows.split(batch), state.hidden, strict=True):
        with torch.no_grad():
            made = logits(model, ids, hidden)
        yield ids, made
        del made  # not kept while the next ones are made


def logits(model: LazyModel, ids: Tensor, hidden: Tensor) -> Tensor:
    """What the model makes of the last block's output: (B, T, vocabulary), with a graph if one is wanted.

    Args:
        model: the model.
        ids: (B, T) int64 token ids.
        hidden: (B, T, H).
    """
    *returns, last = _returns(model)
    through = [_return_input(values) for values in returns]
    with _forwards_replaced(model.blocks, [*through, _return_always(wrapped(hidden, last))]):
        return _run_model(model, ids).logits


def _return_input(values: int) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return wrapped(_hidden_of(Call(args, kwargs)), values)

    return forward


def _return_always(out: Any) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return out

    return forward
