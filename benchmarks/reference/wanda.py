"""Wanda as its authors' code does it: a running mean of input norms for every linear, a stable sort of every row.

Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024.

Legend: O out features, I in features, T tokens.
"""

import torch
from torch import Tensor


class Wanda:
    """One linear on its way to being pruned.

    Attributes:
        weight: (O, I), pruned in place.
        squares: (I,) float32, the running mean of squared input norms.
        windows: calibration windows so far.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.squares = torch.zeros(weight.shape[1])
        self.windows = 0

    def add(self, inputs: Tensor) -> None:
        """Fold the inputs of some windows, (windows, T, I)."""
        count = len(inputs)
        columns = inputs.reshape(-1, inputs.shape[-1]).t().float()
        self.squares *= self.windows / (self.windows + count)
        self.windows += count
        self.squares += columns.norm(p=2, dim=1) ** 2 / self.windows

    def prune(self, share: float = 0.0, pattern: tuple[int, int] | None = None) -> None:
        """Prune to a share of zeros in every row, or to `(zeros, group)` in every group of a row."""
        scores = self.weight.abs() * self.squares.reshape(1, -1).sqrt()
        pruned = torch.zeros_like(scores, dtype=torch.bool)
        if pattern is None:
            order = scores.sort(dim=-1, stable=True).indices
            pruned.scatter_(1, order[:, : int(scores.shape[1] * share)], True)
        else:
            zeros, group = pattern
            for start in range(0, scores.shape[1], group):
                chosen = scores[:, start : start + group].topk(zeros, dim=1, largest=False).indices
                pruned.scatter_(1, start + chosen, True)
        self.weight[pruned] = 0
