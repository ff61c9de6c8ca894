"""The best weights for a given mask: least squares on the support of each row.

Row by row, `min |(q - w) X|^2` over q that are zero where the mask is False. The normal equations on the support S are
`q_S H_SS = (w H)_S` with H the damped Gram matrix, and differ from row to row; conjugate gradients (Hestenes & Stiefel,
1952) solve those of many rows at once, with one product `direction @ H` an iteration whose entries outside the support are
dropped. Meng et al., "ALPS", NeurIPS 2024, section 3.3, does the same.

Source of the scaling: `correlation`. Legend: O out features, I in features.
"""

import torch
from torch import Tensor

from fedspallm_appfl.pruning.correlation import Correlation

ROWS = 1024  # solved together: enough for a GEMM at full speed, few enough to need little memory
MOST_ITERATIONS = 50
TOLERANCE = 1e-4  # stop when an iteration lowers the error by a smaller share
ROUNDING = 1e-6  # a row whose residual falls to this share of the initial one is solved: the rest is rounding


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
    lost = weight.sub_(solution)
    residual = lost @ matrix
    error = float(_dots(lost, residual).sum())
    direction = lost.copy_(residual.mul_(mask))
    square = _dots(residual, residual)
    solved = ROUNDING**2 * square
    for _ in range(MOST_ITERATIONS):
        image = (direction @ matrix).mul_(mask)
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


def slices(rows: int) -> list[slice]:
    """Strips of rows."""
    return [slice(start, start + ROWS) for start in range(0, rows, ROWS)]
