"""Whether a model can be run block by block, seen in one pass of a few tokens through a model without weights.

Blocks are run one after the other with recorded arguments (`blockwise`). That is exact if a block gets nothing from the
one before but its hidden states, as they are. Here the model is called once; one block of each kind runs, the others give
what it gave. Server, clients and validation come to the same answer, as it follows from `config.json`.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from fedspallm_appfl.errors import FedSpaLLMError, ModelError, first_line
from fedspallm_appfl.models.experts import is_inside
from fedspallm_appfl.models.layout import Layout

TOKENS = 8


class Hollow(Protocol):
    """A model without weights, see `lazy_model.HollowModel`."""

    model: Any
    layout: Layout

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks."""


@dataclass(frozen=True)
class Probed:
    """What a pass has shown.

    Attributes:
        returns: for each block the number of values that it returns, 0 for hidden states alone.
        uncalled: (block, linear) that is never called, so that its inputs are unknown: its weight is used otherwise, or not
            at all. Not those of experts that only the few tokens of the pass did not reach.
    """

    returns: tuple[int, ...]
    uncalled: frozenset[tuple[int, str]]

    def known(self, layout: Layout) -> Layout:
        """The layout with what blocks return, and without linears whose inputs are unknown."""
        blocks = tuple(
            tuple(linear for linear in linears if (block, linear.name) not in self.uncalled)
            for block, linears in enumerate(layout.blocks)
        )
        return replace(layout, blocks=blocks, returns=self.returns)


class _Uses(TorchFunctionMode):
    """Which of some weights something is computed from."""

    def __init__(self, weights: dict[int, str]) -> None:
        super().__init__()
        self._weights = weights
        self.used: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if any(isinstance(one, Tensor) for one in _parts(made)):  # not where only its dtype or device is asked for
            self.used |= {self._weights[id(one)] for one in _parts((args, kwargs)) if id(one) in self._weights}
        return made


class _Pass:
    """One pass: the forward functions that take the place of the blocks'."""

    def __init__(self, model: Hollow) -> None:
        self._model = model
        self._kinds: dict[Any, tuple[int, set[str]]] = {}
        self._extras: dict[int, Any] = {}  # id -> what a block returned beside hidden states; held
        self._last: Tensor | None = None  # hidden states that the block before returned
        self.order: list[int] = []
        self.returns: dict[int, int] = {}
        self.uncalled: set[tuple[int, str]] = set()

    def forward_of(self, index: int) -> Callable[..., Any]:
        """What a block does in the pass."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._forward(index, args, kwargs)

        return forward

    def _forward(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0] if args else None
        if not isinstance(hidden, Tensor):
            raise ModelError(f"block {index} does not take hidden states as its first argument")
        if self._last is not None and hidden is not self._last:
            raise ModelError(f"the model changes hidden states between blocks {self.order[-1]} and {index}")
        if any(id(one) in self._extras for one in _parts((args, kwargs))):
            raise ModelError(f"blocks carry state: what block {self.order[-1]} returns goes into block {index}")
        block, linears = self._model.blocks[index], self._model.layout.blocks[index]
        kind = type(block), linears
        if kind not in self._kinds:
            self._kinds[kind] = self._run(index, args, kwargs, hidden)
        values, uncalled = self._kinds[kind]
        self.order.append(index)
        self.returns[index] = values
        self.uncalled |= {(index, name) for name in uncalled}
        self._last = torch.zeros_like(hidden)
        return wrapped(self._last, values, [self._extra() for _ in range(values - 1)])

    def _extra(self) -> Tensor:
        """Something that nobody may look at."""
        made = torch.zeros(1)
        self._extras[id(made)] = made
        return made

    def _run(self, index: int, args: Any, kwargs: Any, hidden: Tensor) -> tuple[int, set[str]]:
        """One block: (number of values that it returns, linears that are not called)."""
        block = self._model.blocks[index]
        linears = {name: one for name, one in block.named_modules() if isinstance(one, nn.Linear | Conv1D)}
        called: set[str] = set()
        uses = _Uses({id(one.weight): name for name, one in linears.items()})
        with ExitStack() as hooks:
            for name, one in linears.items():
                handle = one.register_forward_pre_hook(lambda module, inputs, name=name: called.add(name))
                hooks.callback(handle.remove)
            hooks.enter_context(uses)
            try:
                out = type(block).forward(block, *args, **kwargs)
            except Exception as error:  # whatever the block's code raises
                raise ModelError(
                    f"block {index} ({type(block).__name__}) fails: {type(error).__name__}: {first_line(error)}"
                ) from error
        values = len(out) if isinstance(out, tuple | list) else 0
        first = out[0] if values else out
        if not isinstance(first, Tensor) or first.shape != hidden.shape:
            raise ModelError(f"block {index} ({type(block).__name__}) does not return hidden states, alone or first")
        return values, {name for name in linears if name not in called and (name in uses.used or not is_inside(name))}


@torch.no_grad()
def probe(model: Hollow, vocabulary: int) -> Probed:
    """Call the model once with a few tokens.

    Raises:
        ModelError: it cannot be run block by block; names its class and says why.
    """
    who = f"{type(model.model).__name__} (model type {model.model.config.model_type})"
    for kind in dict.fromkeys(map(type, model.blocks)):
        if "state" in inspect.signature(kind.forward).parameters:  # type: ignore[attr-defined]
            raise ModelError(f"{who} is not supported: its blocks ({kind.__name__}) carry state from token to token")
    run = _Pass(model)
    for index, block in enumerate(model.blocks):
        block.forward = run.forward_of(index)
    try:
        model.model(input_ids=torch.arange(TOKENS).unsqueeze(0) % vocabulary, use_cache=False)
    except FedSpaLLMError as error:
        raise ModelError(f"{who} is not supported, as its blocks cannot be run one by one: {error}") from error
    except Exception as error:  # whatever the model's code raises
        raise ModelError(
            f"{who} is not supported, as it does not run without weights: {type(error).__name__}: {first_line(error)}"
        ) from error
    finally:
        for block in model.blocks:
            del block.forward
    if run.order != list(range(len(model.blocks))):
        raise ModelError(
            f"{who} called the blocks {run.order} of the {len(model.blocks)} of `{model.layout.path}` in one pass; name "
            "its decoder blocks in `model.blocks`"
        )
    return Probed(tuple(run.returns[index] for index in run.order), frozenset(run.uncalled))


def wrapped(hidden: Tensor, values: int, extras: list[Any] | None = None) -> Any:
    """Hidden states as a block returns them that returns so many values, 0 for hidden states alone."""
    return (hidden, *(extras or [None] * (values - 1))) if values else hidden


def _parts(value: Any) -> Iterator[Any]:
    """What is in nested lists, tuples and dicts."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, list | tuple):
        for one in value:
            yield from _parts(one)
    else:
        yield value
