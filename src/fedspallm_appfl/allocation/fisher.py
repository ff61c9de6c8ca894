"""How much the loss depends on each output of each linear: the diagonal of the Fisher information, block by block.

Labels are drawn from what the model predicts. The mean square of the gradient of their loss with respect to an output is
then the curvature of the loss there: a change d of the output costs `f d^2 / 2` (Martens, "New insights and perspectives on
the natural gradient method", JMLR 2020, sections 5 and 9).

The backward pass goes from the last block to the first with the weights of one in memory. It runs each again from the
hidden states in front of it, and keeps of the gradients only sums of squares.

Legend: O out features, B windows in a batch, T tokens in a window, H hidden size.
"""

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedspallm_appfl.allocation.curves import Key, Pass
from fedspallm_appfl.models.blockwise import logits, output_of
from fedspallm_appfl.models.lazy_model import LazyModel


class Squares:
    """Sum of squared gradients of the outputs of one linear.

    Attributes:
        total: (O,) float64.
        tokens: how many were added.
    """

    def __init__(self, out_features: int) -> None:
        self.total = torch.zeros(out_features, dtype=torch.float64)
        self.tokens = 0

    def add(self, gradient: Tensor) -> None:
        """Fold gradients of shape (..., O), any float dtype."""
        rows = gradient.detach().reshape(-1, gradient.shape[-1]).float()
        self.total += rows.square().sum(0, dtype=torch.float64).cpu()
        self.tokens += len(rows)

    def mean(self) -> Tensor:
        """(O,) float64, per token; 0 where none came."""
        return self.total / max(1, self.tokens)


def sensitivities(model: LazyModel, windows: Tensor, made: Pass, seed: int, batch: int = 1) -> dict[Key, Tensor]:
    """The mean squared gradient of the loss of a token with respect to the outputs of each linear.

    Args:
        model: the dense model.
        windows: (n, T) int64, those of the forward pass.
        made: what the forward pass left; its hidden states are used up.
        seed: of the labels.
        batch: as in the forward pass.

    Returns:
        (block, linear) -> (O,) float64.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = zip(windows.split(batch), made.state.hidden, strict=True)
    gradients = [_of_loss(model, ids, hidden, generator) for ids, hidden in parts]
    found: dict[Key, Tensor] = {}
    for index in reversed(range(len(model.blocks))):
        before = made.before.pop()
        squares = {linear.name: Squares(linear.shape[0]) for linear in model.layout.blocks[index]}
        with model.block(index) as block, ExitStack() as hooks:
            for name, one in squares.items():
                hook = block.get_submodule(name).register_forward_hook(partial(_watch, one))
                hooks.callback(hook.remove)
            for number, hidden in enumerate(before):
                call = partial(made.state.calls[number][index], block)
                gradients[number] = _through(call, hidden.to(model.device), gradients[number])
        found |= {(index, name): one.mean() for name, one in squares.items()}
    return found


def _of_loss(model: LazyModel, ids: Tensor, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """(B, T, H), the gradient behind the last block of the loss of drawn labels, summed over tokens."""
    with torch.enable_grad():
        behind = hidden.detach().requires_grad_()
        scores = logits(model, ids, behind).float().flatten(0, 1)
        drawn = torch.multinomial(scores.detach().softmax(-1).cpu(), 1, generator=generator).flatten()
        return torch.autograd.grad(cross_entropy(scores, drawn.to(scores.device), reduction="sum"), behind)[0]


def _watch(squares: Squares, module: nn.Module, args: Any, out: Tensor) -> None:
    """A forward hook that adds the gradient of what a linear gives, once it is known."""
    if out.requires_grad:
        out.register_hook(squares.add)


def _through(call: Any, hidden: Tensor, gradient: Tensor) -> Tensor:
    """(B, T, H), the gradient in front of a block from the one behind it."""
    with torch.enable_grad():
        before = hidden.detach().requires_grad_()
        return torch.autograd.grad(output_of(call(before)), before, gradient)[0]
