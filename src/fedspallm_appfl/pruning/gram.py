"""What a pruner has to know of the inputs of a linear: their Gram matrix, or only its diagonal.

Raw sums over calibration tokens, never averages: SparseGPT's mask and compensation do not change with the scale of the
Hessian `2 G`, nor Wanda's order with that of `sqrt(diag G)`.

Legend: I in features, T tokens.
"""

import torch
from torch import Tensor

STRIPS = 8  # of the symmetric product: 9/16 of the work, in GEMMs still wide enough to run at full speed
NARROWEST = 64


class InputNorms:
    """Sum of squares of each input feature, all that Wanda needs.

    Attributes:
        squares: (I,) float32, `sum x_j^2`.
        tokens: T so far.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.squares = torch.zeros(in_features, device=device)
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Fold inputs of shape (..., I), any float dtype."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        self.squares += rows.square().sum(0)
        self.tokens += len(rows)

    def diagonal(self) -> Tensor:
        """(I,) float32, the diagonal of the Gram matrix."""
        return self.squares


class InputGram:
    """Gram matrix of the inputs, `G = sum x x^T`.

    Only strips above and on the diagonal are accumulated, half of the work; `matrix` mirrors them.

    Attributes:
        upper: (I, I) float32, right on and above the diagonal.
        tokens: T so far.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.upper = torch.zeros(in_features, in_features, device=device)
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Fold inputs of shape (..., I), any float dtype."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        strip = self._strip()
        for start in range(0, rows.shape[1], strip):
            self.upper[start : start + strip, start:].addmm_(rows[:, start : start + strip].T, rows[:, start:])
        self.tokens += len(rows)

    def diagonal(self) -> Tensor:
        """(I,) float32, `sum x_j^2`."""
        return self.upper.diagonal()

    def matrix(self) -> Tensor:
        """(I, I) float32, the whole symmetric matrix, a new tensor."""
        upper = self.upper.triu()
        return upper + upper.triu(1).T

    def _strip(self) -> int:
        """Columns of a strip."""
        return max(NARROWEST, -(-len(self.upper) // STRIPS))


Statistic = InputGram | InputNorms
