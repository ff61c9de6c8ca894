"""The statistics of a linear's inputs that pruners need: their Gram matrix, or only its diagonal.

Raw sums over calibration tokens, never averages: SparseGPT's mask and compensation do not change with the scale of the
Hessian `2 G`, nor Wanda's order with that of `sqrt(diag G)`.

Legend: I in features, T tokens.
"""

import torch
from torch import Tensor

from fedspallm_appfl.errors import PruningError

STRIPS = 8  # of the symmetric product: 9/16 of the work, in GEMMs wide enough for full speed
NARROWEST = 64
LEAST_DAMPING = 0.005  # of a correlation matrix that needs damping
HALF_PRODUCTS = hasattr(torch.ops.aten.mm, "dtype")  # from torch 2.8 on
ROUNDING = 1e-3  # of a correlation matrix's eigenvalues, more than float32 sums have


class InputNorms:
    """Sum of squares of each input feature, which is all that Wanda needs.

    Attributes:
        squares: (I,) float32, `sum x_j^2`.
        tokens: T so far.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.squares = torch.zeros(in_features, device=device)
        self.tokens = 0

    @classmethod
    def of(cls, squares: Tensor, tokens: int) -> "InputNorms":
        """Norms from a stored sum of squares, (I,) float32, over this many tokens."""
        norms = cls(0, squares.device)
        norms.squares, norms.tokens = squares, tokens
        return norms

    def add(self, inputs: Tensor) -> None:
        """Fold inputs of shape (..., I), any float dtype."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        self.squares += rows.square().sum(0)
        self.tokens += len(rows)

    def merge(self, other: "InputNorms") -> None:
        """Fold what was folded elsewhere, maybe on another device."""
        self.squares += other.squares.to(self.squares.device)
        self.tokens += other.tokens

    def diagonal(self) -> Tensor:
        """(I,) float32, the diagonal of the Gram matrix."""
        return self.squares

    @staticmethod
    def nbytes(features: int) -> int:
        """Bytes of the norms of so many features."""
        return 4 * features


class InputGram:
    """Gram matrix of the inputs, `G = sum x x^T`.

    Only strips on and above the diagonal are accumulated, which halves the work; `matrix` mirrors them.

    Attributes:
        upper: (I, I) float32, right on and above the diagonal.
        tokens: T so far.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.upper = torch.zeros(in_features, in_features, device=device)
        self.tokens = 0

    @classmethod
    def of(cls, upper: Tensor, tokens: int) -> "InputGram":
        """A Gram matrix from a stored sum.

        Args:
            upper: (I, I) float32, right on and above the diagonal; not copied; users of the Gram matrix may overwrite it.
            tokens: number of summed inputs.
        """
        gram = cls(0, upper.device)
        gram.upper, gram.tokens = upper, tokens
        return gram

    def add(self, inputs: Tensor) -> None:
        """Fold inputs of shape (..., I), any float dtype."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        rows = rows if in_halves(rows) else rows.float()
        strip = _strip(len(self.upper))
        for start in range(0, rows.shape[1], strip):
            sums, left, right = (
                self.upper[start : start + strip, start:],
                rows[:, start : start + strip].T,
                rows[:, start:],
            )
            if rows.dtype == torch.float32:
                sums.addmm_(left, right)
            else:
                sums += torch.mm(left, right, out_dtype=torch.float32)
        self.tokens += len(rows)

    def merge(self, other: "InputGram") -> None:
        """Fold what was folded elsewhere, maybe on another device."""
        self.upper += other.upper.to(self.upper.device)
        self.tokens += other.tokens

    def diagonal(self) -> Tensor:
        """(I,) float32, `sum x_j^2`."""
        return self.upper.diagonal()

    @staticmethod
    def nbytes(features: int) -> int:
        """Bytes of the Gram matrix of so many features."""
        return 4 * features * features

    def matrix(self) -> Tensor:
        """(I, I) float32, the full symmetric matrix, a new tensor."""
        return mirror(self.upper.clone())


def in_halves(rows: Tensor) -> bool:
    """Whether products of inputs are taken as they are, in half precision, and summed in float32.

    Tensor cores do that several times as fast as products in float32. Each product is exact in float32, so nothing is
    lost: 11 bits of a float16, or 8 of a bfloat16, twice, are fewer than 24.
    """
    return rows.is_cuda and rows.dtype in (torch.float16, torch.bfloat16) and HALF_PRODUCTS


Statistic = InputGram | InputNorms


def mirror(upper: Tensor) -> Tensor:
    """Mirror the upper triangle of an (I, I) matrix to the lower one, in place. Returns the matrix."""
    width = _strip(len(upper))
    for start in range(0, len(upper), width):
        stop = start + width
        corner = upper[start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).T)
        upper[stop:, start:stop] = upper[start:stop, stop:].T
    return upper


def lift(upper: Tensor) -> None:
    """Make a rounded, slightly indefinite Gram matrix positive definite, in place.

    All diagonal entries are raised by the same share, the smallest of a doubling sequence that suffices. Raising only the
    lowest eigenvalues is not better for the pruned weights and needs an eigendecomposition.

    Args:
        upper: (I, I) float32, right on and above the diagonal.

    Raises:
        PruningError: the matrix holds NaN or infinity.
    """
    upper.diagonal().mul_(1.0 + damp(_correlation(upper), 0.0))


def is_indefinite(upper: Tensor) -> bool:
    """Whether a matrix (I, I), right on and above its diagonal, has lower eigenvalues than rounding gives a Gram matrix."""
    correlation = _correlation(upper)
    correlation.diagonal().fill_(1.0 + ROUNDING)
    return bool(torch.linalg.cholesky_ex(correlation, upper=True)[1])


def _correlation(upper: Tensor) -> Tensor:
    inverse = inverse_norms(upper.diagonal())
    return (upper * inverse).mul_(inverse.unsqueeze(1))


def inverse_norms(squares: Tensor) -> Tensor:
    """(I,) sums of squares -> 1 / norm, or 0 where that is 0."""
    return squares.rsqrt().masked_fill_(squares == 0, 0.0)


def damp(correlation: Tensor, damping: float) -> float:
    """Raise the diagonal of a correlation matrix, in place, until it is positive definite.

    Args:
        correlation: (I, I) float32, right above the diagonal, which is taken as 1.
        damping: the minimum to add; it is doubled until a Cholesky factorization succeeds.

    Returns:
        The added value.

    Raises:
        PruningError: the matrix holds NaN or infinity.
    """
    correlation.diagonal().fill_(1.0 + damping)
    while bool(torch.linalg.cholesky_ex(correlation, upper=True)[1]):
        damping = max(2.0 * damping, LEAST_DAMPING)
        if damping > 2 * len(correlation):  # then the diagonal dominates any numbers up to 1
            raise PruningError(
                "the Gram matrix of the inputs is invalid: it holds NaN, infinity or correlations above 1"
            )
        correlation.diagonal().fill_(1.0 + damping)
    return damping


def _strip(features: int) -> int:
    """Columns of a strip."""
    return max(NARROWEST, -(-features // STRIPS))
