"""Mixtures of experts: the matrices of each expert, and what reaches them.

transformers keeps the experts of a block in one module with tensors of three dimensions, (experts, O, I) or transposed, and
calls it with the hidden states and the experts that a router chose for each token. So the inputs of one expert are known
without a look at the module's own arithmetic: the rows that chose it go into its first matrices, and what the module makes
of their result goes into the last. Gate and up projection that lie one above the other are two matrices here.

Some models still hold a list of modules; those are linears like any others, reached by some tokens only.

Legend: E experts, O out features, I in features, H hidden size, T tokens, K experts of a token.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedspallm_appfl.errors import ModelError

LAYOUT = ("has_gate", "has_bias", "is_transposed", "is_concatenated")  # what transformers says of such a module
LISTED = r"(?:^|\.)(?!shared)\w*experts?\.(\d+)(?:\.|$)"  # how an expert of a list is called; its number
CALL = ("hidden_states", "top_k_index", "top_k_weights")


@dataclass(frozen=True)
class Part:
    """Where one matrix of one expert lies.

    Attributes:
        module: dotted name of the module inside the block, e.g. `mlp.experts`.
        parameter: dotted name of the tensor of all experts, e.g. `mlp.experts.gate_up_proj`.
        expert: its index along the first dimension.
        rows: the rows of the expert's matrix that are this one; None for all.
        shape: (O, I).
        first: whether hidden states go in, and not what the first matrices made of them.
    """

    module: str
    parameter: str
    expert: int
    rows: tuple[int, int] | None
    shape: tuple[int, int]
    first: bool

    def view(self, parameter: Tensor, transposed: bool) -> Tensor:
        """The matrix (O, I), a view of the tensor of all experts."""
        matrix = parameter[self.expert].T if transposed else parameter[self.expert]
        return matrix if self.rows is None else matrix[slice(*self.rows)]


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds all experts and is told which tokens go to which of them."""
    return all(hasattr(module, name) for name in LAYOUT) and all(
        isinstance(getattr(module, name, None), Tensor) for name in (_first(module), "down_proj")
    )


def _first(module: nn.Module) -> str:
    return "gate_up_proj" if getattr(module, "has_gate", False) else "up_proj"


def parts(path: str, module: Any) -> Iterator[tuple[str, Part]]:
    """The matrices of a fused module: name inside the block, and where it lies.

    Args:
        path: dotted name of the module inside the block.
        module: the module.
    """
    first = _first(module)
    for expert in range(len(module.down_proj)):
        for parameter in (first, "down_proj"):
            sizes = tuple(getattr(module, parameter).shape[1:])
            rows, columns = sizes[::-1] if module.is_transposed else sizes
            split = parameter == "gate_up_proj" and module.is_concatenated
            names = ("gate_proj", "up_proj") if split else (parameter,)
            height = rows // len(names)
            for number, name in enumerate(names):
                span = (number * height, (number + 1) * height) if split else None
                part = Part(path, f"{path}.{parameter}", expert, span, (height, columns), parameter == first)
                yield f"{path}.{expert}.{name}", part


def is_inside(name: str) -> bool:
    """Whether a module of a block is in a list of experts, of which a token reaches some only."""
    return re.search(LISTED, name) is not None


def gates(block: nn.Module) -> set[str]:
    """Linears that choose experts or weigh them: routers, and beside experts what has one output for each, or one."""
    linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    found = {name for name in linears if "router" in name.lower()}
    for path, count in _mixtures(block):
        around = path.rpartition(".")[0]
        for name, module in linears.items():
            beside = name.startswith(f"{around}.") if around else "." not in name
            beside = beside and not name.startswith(f"{path}.")
            if beside and module.out_features in (1, count):
                found.add(name)
    return found


def _mixtures(block: nn.Module) -> Iterator[tuple[str, int]]:
    """Dotted name of whatever holds experts, and their number."""
    for path, module in block.named_modules():
        if isinstance(module, nn.ModuleList) and is_inside(f"{path}.0"):
            yield path, len(module)
    for name, parameter in block.named_parameters():
        if _is_stacked(block, name, parameter):
            yield name.rpartition(".")[0], len(parameter)


def unreadable(block: nn.Module) -> list[str]:
    """Tensors of several matrices whose module does not tell which tokens go to which of them."""
    return [
        name
        for name, parameter in block.named_parameters()
        if _is_stacked(block, name, parameter) and not is_fused(block.get_submodule(name.rpartition(".")[0]))
    ]


def _is_stacked(block: nn.Module, name: str, parameter: Tensor) -> bool:
    """Whether a parameter holds several matrices."""
    owner = block.get_submodule(name.rpartition(".")[0])
    return parameter.ndim == 3 and min(parameter.shape) > 1 and not isinstance(owner, nn.modules.conv._ConvNd)


@dataclass(frozen=True)
class Routed:
    """What came into a fused module for one batch.

    Attributes:
        hidden: (T, H).
        chosen: (T, K) indices of experts.
    """

    hidden: Tensor
    chosen: Tensor

    def of(self, expert: int) -> Tensor:
        """The tokens of one expert, (tokens, H)."""
        return self.hidden[(self.chosen == expert).any(-1)]


def routed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Routed:
    """What a fused module was called with.

    Raises:
        ModelError: it is called in another way.
    """
    given = dict(zip(CALL, args, strict=False)) | kwargs
    hidden, chosen = given.get(CALL[0]), given.get(CALL[1])
    if not isinstance(hidden, Tensor) or not isinstance(chosen, Tensor) or hidden.shape[:-1] != chosen.shape[:-1]:
        raise ModelError(f"experts are called with {', '.join(CALL)}, got {sorted(given)}: this model is not supported")
    return Routed(hidden.reshape(-1, hidden.shape[-1]), chosen.reshape(-1, chosen.shape[-1]))


@torch.no_grad()
def inner(module: Any, expert: int, inputs: Tensor) -> Tensor:
    """What goes into the last matrix of one expert, (tokens, I).

    Args:
        module: a fused module.
        expert: which of its experts.
        inputs: (tokens, H).
    """
    name = _first(module)
    weight = getattr(module, name)[expert]
    bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
    made = functional.linear(inputs.to(weight.dtype), weight.T if module.is_transposed else weight, bias)
    return module._apply_gate(made) if module.has_gate else module.act_fn(made)
