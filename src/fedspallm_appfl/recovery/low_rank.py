"""Changes of a matrix as a product B A under its mask, of which B alone is trained and travels.

A is random, the same for all clients, and made anew in each round of recovery, so that several rounds reach further than
one. As all clients have the same A, the mean of their products is the product of their mean: the server adds up factors,
and multiplies once. Entries of A are 1 or -1 by the root of the rank. So an entry of the product is about as large as one
of B, and a learning rate means what it means for kept entries. An optimizer has state for B alone.

Source: Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024 (FFA-LoRA: A is fixed). The
mask, the signs, and a new A for each round are ours.

Legend: O out features, I in features, R rank.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedspallm_appfl.models.layout import Linear
from fedspallm_appfl.recovery.rounding import ROUNDS_UP
from fedspallm_appfl.recovery.trained import Trained, largest_change
from fedspallm_appfl.tensors import seeds
from fedspallm_appfl.wire.packed import Packed


@dataclass(frozen=True)
class Basis:
    """The A of every matrix in a round of recovery.

    Attributes:
        rank: R.
        seed: of the run.
        turn: the round of recovery, from 0.
    """

    rank: int
    seed: int
    turn: int

    def of(self, block: int, linear: str, features: int) -> Tensor:
        """A of a matrix: (R, I) float32 on the CPU."""
        random = seeds.generator("basis", self.seed, self.turn, block, linear)
        signs = torch.randint(2, (self.rank, features), generator=random)
        return signs.mul(2).sub(1).float() / math.sqrt(self.rank)


class LowRank(Trained):
    """The factors of one parameter: `values` are the entries of each B, (O, R), one after the other."""

    def __init__(self, parameter: nn.Parameter, linears: list[Linear], mask: Tensor, basis: Basis, block: int) -> None:
        """As `Trained`; products of zeros."""
        each = [basis.of(block, linear.name, linear.shape[1]).to(parameter.device) for linear in linears]

        def gradient(of: Tensor) -> Tensor:
            masked = of.masked_fill_(~mask, 0)
            factors = (linear.view(masked).float() @ one.T for linear, one in zip(linears, each, strict=True))
            return torch.cat([factor.flatten() for factor in factors])

        values = torch.zeros(sum(linear.shape[0] * basis.rank for linear in linears), device=parameter.device)
        self._before, self._basis, self._bases = parameter.detach().masked_select(mask), basis, each
        super().__init__(parameter, linears, mask, self._before, values, gradient)

    def weights(self) -> Tensor:
        """Those that training began with, and their entries of the products."""
        change = torch.zeros(self.parameter.shape, device=self.parameter.device)
        for linear, factor, basis in zip(self.linears, self._factors(), self._bases, strict=True):
            linear.view(change).copy_(factor @ basis)
        return change.masked_select(self.mask).add_(self._before)

    @torch.no_grad()
    def changes(self, pruned: Mapping[str, Packed]) -> Iterator[tuple[str, Tensor]]:
        """The entries of each B, (O * R,)."""
        for linear, factor in zip(self.linears, self._factors(), strict=True):
            most = largest_change(pruned[linear.name], self._basis.rank) / ROUNDS_UP
            yield linear.name, factor.flatten().cpu().clamp(-most, most)

    def _factors(self) -> list[Tensor]:
        """B of each matrix, (O, R)."""
        parts = self.values.detach().split([linear.shape[0] * self._basis.rank for linear in self.linears])
        return [part.view(-1, self._basis.rank) for part in parts]
