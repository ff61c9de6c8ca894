"""The kept entries of a matrix, each of which is trained, and whose changes travel.

An optimizer sees nothing but kept entries, so that its state is as small as they are few.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from fedspallm_appfl.models.layout import Linear
from fedspallm_appfl.recovery.rounding import ROUNDS_UP
from fedspallm_appfl.recovery.trained import Trained, largest_change
from fedspallm_appfl.tensors import bitmask
from fedspallm_appfl.wire.packed import Packed


class Kept(Trained):
    """The kept entries of one parameter: `values` are the weights themselves."""

    def __init__(self, parameter: nn.Parameter, linears: list[Linear], mask: Tensor) -> None:
        """As `Trained`."""

        def gradient(of: Tensor) -> Tensor:
            return of.masked_select(mask).float()

        weights = parameter.detach().masked_select(mask).float()
        super().__init__(parameter, linears, mask, weights, weights, gradient)

    def weights(self) -> Tensor:
        """The values."""
        return self.values

    @torch.no_grad()
    def changes(self, pruned: Mapping[str, Packed]) -> Iterator[tuple[str, Tensor]]:
        """What was added to each kept entry, in the order of packed values.

        No entry changes by more than the largest weight of its matrix, even once it is rounded: the server takes no more.
        """
        whole = torch.zeros(self.parameter.shape, device=self.parameter.device).masked_scatter_(self.mask, self.values)
        for linear in self.linears:
            before = pruned[linear.name]
            assert before.values is not None, "`recovered` refuses others"
            began = before.values.to(self.parameter.dtype).float()  # as the block holds it: rounding is no change
            change = bitmask.gather(linear.view(whole).cpu().contiguous(), before.bits) - began
            most = largest_change(before, 0) / ROUNDS_UP
            yield linear.name, change.clamp_(-most, most)
