"""What an optimizer changes of a block, in the place of its matrices: vectors in float32, so that small steps are not lost.

The block computes with whole matrices in the model's arithmetic, made of the vectors after each step. Zeros stay zero
whatever an optimizer does. A gradient is taken over and dropped as soon as the backward pass has made it.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from fedspallm_appfl.models.layout import Linear
from fedspallm_appfl.wire.packed import Packed


def largest_change(before: Packed, rank: int) -> float:
    """How large an entry may be that travels of a matrix: no weight changes by more than the largest of them.

    Args:
        before: the matrix.
        rank: of the factors; 0 if changes themselves travel.
    """
    return before.largest / math.sqrt(rank or 1)


class Trained(ABC):
    """What is trained of one parameter, which may hold several matrices.

    Attributes:
        parameter: of the block.
        linears: the matrices in it.
        mask: bool, of the parameter's shape, True = kept.
        values: what the optimizer changes, a vector in float32, with the gradient of all passes since the last step.
        magnitude: root of the mean square of the kept weights, as training began.
    """

    def __init__(
        self,
        parameter: nn.Parameter,
        linears: list[Linear],
        mask: Tensor,
        weights: Tensor,
        values: Tensor,
        gradient: Callable[[Tensor], Tensor],
    ) -> None:
        """From now on the parameter gets gradients.

        Args:
            parameter: of the block.
            linears: the matrices in it.
            mask: bool, of its shape.
            weights: the kept weights, (kept,).
            values: what is trained, float32.
            gradient: of the parameter -> of the values; it refers to no parameter, so that memory is freed.
        """
        self.parameter, self.linears, self.mask = parameter, linears, mask
        self.magnitude = float(weights.float().square().mean().sqrt()) if len(weights) else 0.0
        self.values = nn.Parameter(values)
        parameter.requires_grad_(True)
        parameter.register_post_accumulate_grad_hook(partial(_take, self.values, gradient))

    @abstractmethod
    def weights(self) -> Tensor:
        """The kept weights, (kept,) float32."""

    @abstractmethod
    def changes(self, pruned: Mapping[str, Packed]) -> Iterator[tuple[str, Tensor]]:
        """What travels of each matrix: (linear, its entries, float32 on the CPU), none larger than the server takes.

        Args:
            pruned: the matrices as training began.
        """

    @torch.no_grad()
    def put_back(self) -> None:
        """Let the block compute with the values."""
        self.parameter.masked_scatter_(self.mask, self.weights().to(self.parameter.dtype))


def _take(values: nn.Parameter, gradient: Callable[[Tensor], Tensor], parameter: Tensor) -> None:
    """Add the gradient of a parameter to that of its values, and drop it."""
    assert parameter.grad is not None, "it has just been made"
    mine = gradient(parameter.grad)
    values.grad = mine if values.grad is None else values.grad.add_(mine)
    parameter.grad = None
