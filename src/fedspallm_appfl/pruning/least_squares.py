"""The best weights for a given mask: least squares on the support of each row.

Row by row, `min |(q - w) X|^2` over q that are zero where the mask is False. The normal equations on the support S are
`q_S H_SS = (w H)_S` with H the damped Gram matrix, and differ from row to row; conjugate gradients (Hestenes & Stiefel,
1952) solve those of many rows at once, with one product `direction @ H` an iteration whose entries outside the support are
dropped. Meng et al., "ALPS", NeurIPS 2024, section 3.3, does the same.

Columns are scaled to inputs of norm 1: with D = diag G, the error of a pruned weight Q is
`tr (Q - W) G (Q - W)^T = tr E C E^T` for `C = D^-1/2 G D^-1/2` and `E = (Q - W) D^1/2`. C has a diagonal of 1, so weights
compare across columns, one damping and one penalty suit all layers, and conjugate gradients need no further preconditioner.
Damping draws what is kept towards the dense weight.

Legend: O out features, I in features.
"""

import torch
from torch import Tensor

from fedspallm_appfl.pruning.statistics import damp, inverse_norms

ROWS = 1024  # solved together: enough for a GEMM at full speed, and few enough to need little memory
STRIPS = 5  # float32 copies of the rows that are solved together
MOST_ITERATIONS = 50
TOLERANCE = 1e-3  # stop when an iteration lowers the error by a smaller share
ROUNDING = 1e-6  # a row whose residual falls to this share of the initial one is solved: the rest is rounding


class Correlation:
    """A damped correlation matrix, for all linears that have the same input.

    Attributes:
        matrix: (I, I) float32, symmetric and positive definite; its diagonal is 1 + damping.
        scale: (I,) float32, norms of the inputs, the largest made 1; 0 for dead features, whose scaled weights are 0.
        damping: what was added to the diagonal in the end.
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


def inverted(matrix: Tensor) -> Tensor:
    """The inverse of a symmetric, positive definite matrix (I, I) float32, in its place."""
    by_column = matrix.mT  # as LAPACK wants it, so that no copies are made
    torch.linalg.cholesky(by_column, out=by_column)
    torch.cholesky_inverse(by_column, out=by_column)
    return matrix


def refit(weight: Tensor, mask: Tensor, start: Tensor, correlation: Correlation) -> Tensor:
    """Fit the kept weights of one matrix.

    Args:
        weight: (O, I) float, the weight to approximate; not changed.
        mask: (O, I) bool, True = kept.
        start: (O, I) float, the starting point, zero outside the mask; not changed.
        correlation: of the layer's inputs.

    Returns:
        (O, I) float32, zero where the mask is False.
    """
    return fit(weight, mask, correlation.scaled(start), correlation)


def fit(weight: Tensor, mask: Tensor, solution: Tensor, correlation: Correlation) -> Tensor:
    """`refit` from a scaled start, (O, I) float32, which is overwritten by the solution."""
    for rows in slices(len(weight)):
        descend(solution[rows], correlation.scaled(weight[rows]), mask[rows], correlation.matrix)
    return correlation.unscaled(solution, weight, mask)


def descend(solution: Tensor, weight: Tensor, mask: Tensor, matrix: Tensor) -> None:
    """Conjugate gradients, until an iteration gains little.

    Args:
        solution: (O, I) float32, zero outside the mask: the start, overwritten by the solution.
        weight: (O, I) float32; overwritten.
        mask: (O, I) bool, True = kept.
        matrix: (I, I) float32, symmetric and positive definite, with a constant diagonal.
    """
    kept = numbers(mask)
    lost = weight.sub_(solution)
    residual = lost @ matrix
    error = float(_dots(lost, residual).sum())
    direction = lost.copy_(residual.mul_(kept))
    square = _dots(residual, residual)
    solved = ROUNDING**2 * square
    for _ in range(MOST_ITERATIONS):
        image = (direction @ matrix).mul_(kept)
        step = torch.where(square > solved, square / _dots(direction, image), 0.0)
        solution.addcmul_(direction, step)
        gain = float((step * square).sum())
        if gain <= TOLERANCE * error:
            return
        error -= gain
        residual.addcmul_(image, step, value=-1)
        before, square = square, _dots(residual, residual)
        direction.mul_(torch.where(square > solved, square / before, 0.0)).add_(residual)


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """(O, 1), the inner products of the rows."""
    return torch.linalg.vecdot(a, b).unsqueeze(1)


def numbers(mask: Tensor) -> Tensor:
    """A bool mask as zeros and ones, by which torch multiplies much faster; the same memory."""
    return mask.view(torch.int8)


def slices(rows: int) -> list[slice]:
    """Strips of rows."""
    return [slice(start, start + ROWS) for start in range(0, rows, ROWS)]


def fitting_bytes(rows: int, features: int, start: int) -> int:
    """Bytes that a fit takes beside the dense weight: `start` an entry, and float32 copies of a strip of rows."""
    return start * rows * features + STRIPS * 4 * min(ROWS, rows) * features
