"""The kept entries of a block's matrices, as vectors that an optimizer changes.

An optimizer sees nothing but kept entries, so that zeros stay zero whatever it does, and its state is as small as they are
few. The block computes with the whole matrices in the model's arithmetic; the vectors are float32, so that small steps
are not lost. A gradient is taken over and dropped as soon as the backward pass has made it.

Legend: O out features, I in features.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from fedspallm_appfl.models.layout import Linear
from fedspallm_appfl.recovery.rounding import ROUNDS_UP
from fedspallm_appfl.tensors import bitmask
from fedspallm_appfl.wire.packed import Packed


@dataclass(eq=False)
class Kept:
    """The kept entries of one parameter, which may hold several matrices.

    Attributes:
        parameter: of the block.
        mask: bool, of the parameter's shape, True = kept.
        values: (kept,) float32, with the gradient of all passes since the last step.
        linears: the matrices in it.
    """

    parameter: nn.Parameter
    mask: Tensor
    values: nn.Parameter
    linears: list[Linear]

    @classmethod
    def of(cls, parameter: nn.Parameter, linears: list[Linear], pruned: Mapping[str, Packed]) -> "Kept":
        """The entries that the masks of some matrices keep; the block's parameter gets gradients from now on."""
        mask = torch.zeros(parameter.shape, dtype=torch.bool, device=parameter.device)
        for linear in linears:
            linear.view(mask).copy_(pruned[linear.name].unpack_mask())
        values = nn.Parameter(parameter.detach().masked_select(mask).float())
        parameter.requires_grad_(True)
        parameter.register_post_accumulate_grad_hook(partial(_take_gradient, mask, values))  # no cycle: memory is freed
        return cls(parameter, mask, values, linears)

    @torch.no_grad()
    def put_back(self) -> None:
        """Let the block compute with the values."""
        self.parameter.masked_scatter_(self.mask, self.values.to(self.parameter.dtype))

    @property
    def magnitude(self) -> float:
        """Root of the mean square of the values."""
        return float(self.values.detach().square().mean().sqrt()) if len(self.values) else 0.0

    @torch.no_grad()
    def changes(self, pruned: Mapping[str, Packed]) -> Iterator[tuple[str, Tensor]]:
        """What was added to each matrix: (linear, (kept,) float32 on the CPU, in the order of its packed values).

        No entry changes by more than the largest weight of its matrix, even once it is rounded: the server takes no more.
        """
        whole = torch.zeros(self.parameter.shape, device=self.parameter.device).masked_scatter_(self.mask, self.values)
        for linear in self.linears:
            before = pruned[linear.name]
            assert before.values is not None, "`recovered` refuses others"
            began = before.values.to(self.parameter.dtype).float()  # as the block holds it: rounding is no change
            change = bitmask.gather(linear.view(whole).cpu().contiguous(), before.bits) - began
            most = before.largest / ROUNDS_UP
            yield linear.name, change.clamp_(-most, most)


def _take_gradient(mask: Tensor, values: nn.Parameter, parameter: Tensor) -> None:
    """Add the gradient of a parameter to that of its kept entries, and drop it."""
    assert parameter.grad is not None, "it has just been made"
    mine = parameter.grad.masked_select(mask).float()
    values.grad = mine if values.grad is None else values.grad.add_(mine)
    parameter.grad = None


def kept_of(block: nn.Module, linears: tuple[Linear, ...], pruned: Mapping[str, Packed]) -> list[Kept]:
    """The kept entries of a block's pruned matrices."""
    inside: dict[str, list[Linear]] = {}
    for linear in linears:
        if linear.name in pruned:
            inside.setdefault(linear.parameter, []).append(linear)
    return [Kept.of(block.get_parameter(name), alike, pruned) for name, alike in inside.items()]
