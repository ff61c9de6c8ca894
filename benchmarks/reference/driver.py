"""Prune a whole model as the authors' scripts do: block after block, two passes each, the model in memory all the time.

The inputs of the first block are caught for all windows; then, for each block, one pass with a hook on every linear fills
its statistic, the linears are pruned, and a second pass makes the inputs of the next block.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.reference.sparsegpt import SparseGPT
from benchmarks.reference.wanda import Wanda

PRUNERS = {"sparsegpt": SparseGPT, "wanda": Wanda}


class _Caught(Exception):  # noqa: N818 - nothing went wrong
    """Ends a forward pass in front of the first block."""


@torch.no_grad()
def prune(model: Any, windows: Tensor, pruner: str, share: float) -> None:
    """Prune every linear of every block in place.

    Args:
        model: a LLaMA of transformers.
        windows: (n, T) int64 calibration tokens.
        pruner: `sparsegpt` or `wanda`.
        share: of zeros.
    """
    blocks = model.model.layers
    inputs, arguments = _inputs_of_first_block(model, blocks[0], windows)
    outputs = torch.zeros_like(inputs)
    for block in blocks:
        pruners = {
            name: PRUNERS[pruner](m.weight.data) for name, m in block.named_modules() if isinstance(m, nn.Linear)
        }
        hooks = [block.get_submodule(name).register_forward_hook(_hook(one)) for name, one in pruners.items()]
        _forward(block, inputs, outputs, arguments)
        for hook in hooks:
            hook.remove()
        for one in pruners.values():
            one.prune(share)
        _forward(block, inputs, outputs, arguments)
        inputs, outputs = outputs, inputs


def _hook(pruner: SparseGPT | Wanda) -> Callable[..., None]:
    return lambda module, args, output: pruner.add(args[0])


def _forward(block: nn.Module, inputs: Tensor, outputs: Tensor, arguments: dict[str, Any]) -> None:
    for number in range(len(inputs)):
        outputs[number] = block(inputs[number].unsqueeze(0), **arguments)[0]


def _inputs_of_first_block(model: Any, first: nn.Module, windows: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """(n, T, hidden) and the keyword arguments of the call, which are the same for all windows and blocks."""
    caught: list[Tensor] = []
    arguments: dict[str, Any] = {}

    def catch(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        caught.append(args[0])
        arguments.update(kwargs)
        raise _Caught

    hook = first.register_forward_pre_hook(catch, with_kwargs=True)
    for window in windows:
        try:
            model(window.unsqueeze(0), use_cache=False)
        except _Caught:
            continue
    hook.remove()
    return torch.cat(caught), arguments
