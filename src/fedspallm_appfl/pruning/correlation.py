"""The Gram matrix of the inputs for least squares: scaled to inputs of norm 1, and damped.

With D = diag G, the error of a pruned weight Q is `tr (Q - W) G (Q - W)^T = tr E C E^T` for `C = D^-1/2 G D^-1/2` and
`E = (Q - W) D^1/2`. C has a diagonal of 1. Weights are then comparable across columns, one damping and one penalty suit all
layers, and conjugate gradients need no further preconditioner. Damping draws what is kept towards the dense weight.

Legend: O out features, I in features.
"""

import torch
from torch import Tensor

from fedspallm_appfl.pruning.statistics import damp, inverse_norms


class Correlation:
    """A damped correlation matrix, for all linears that have the same input.

    Attributes:
        matrix: (I, I) float32, symmetric and positive definite; its diagonal is 1 + damping.
        scale: (I,) float32, norms of the inputs, the largest made 1; 0 for dead features, whose scaled weights are 0.
        damping: the value added to the diagonal.
    """

    def __init__(self, gram: Tensor, damping: float) -> None:
        """Scale and damp a Gram matrix.

        Args:
            gram: (I, I) float32, symmetric; its memory is taken over.
            damping: added to the diagonal of 1; doubled until the matrix is positive definite.

        Raises:
            PruningError: the matrix holds NaN or infinity.
        """
        squares = gram.diagonal().clone()
        inverse = inverse_norms(squares)
        self.scale = (squares / (squares.max() or 1.0)).sqrt()
        self.matrix = gram.mul_(inverse).mul_(inverse.unsqueeze(1))
        self.damping = damp(self.matrix, damping)

    def scaled(self, weight: Tensor) -> Tensor:
        """(O, I) float -> (O, I) float32, a new tensor."""
        return weight * self.scale

    def unscaled(self, solution: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        """Undo `scaled`, in place; weights of dead features are those of `weight` where `mask` is True."""
        dead = self.scale == 0
        solution /= self.scale
        solution[:, dead] = (weight[:, dead] * mask[:, dead]).to(solution.dtype)
        return solution

    def shrinkage(self, penalty: float) -> Tensor:
        """(I, I) float32, `rho (C + rho)^-1`, the step of ADMM."""
        damped = self.matrix.clone()
        damped.diagonal().add_(penalty)
        by_column = damped.mT  # the layout of LAPACK, which avoids copies
        torch.linalg.cholesky(by_column, out=by_column)
        torch.cholesky_inverse(by_column, out=by_column)
        return damped.mul_(penalty)
