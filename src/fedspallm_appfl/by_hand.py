"""The pruners as functions of one matrix, without files, clients or a configuration.

Legend: O out features, I in features.
"""

import torch
from torch import Tensor

from fedspallm_appfl.pruning import registry
from fedspallm_appfl.pruning.pruner import Pruned
from fedspallm_appfl.pruning.statistics import InputGram, InputNorms, Statistic
from fedspallm_appfl.settings.schema import Pruning
from fedspallm_appfl.tensors.target import Target, check_divides, parse_target


def sparsegpt(weight: Tensor, gram: Tensor, target: Target | float | str, damping: float = Pruning.damping) -> Pruned:
    """SparseGPT (Frantar & Alistarh, ICML 2023).

    Args:
        weight: (O, I), any float dtype.
        gram: (I, I) float32, `sum x x^T` over the inputs x of calibration tokens.
        target: share to prune, in [0, 1), or n:m.
        damping: share of the mean of the diagonal that is added to it.

    Returns:
        (weight (O, I) float32, zero where pruned; mask (O, I) bool, True = kept).

    Raises:
        ValueError: shapes do not fit, or the target is none.
        PruningError: the Gram matrix holds NaN, or its factorization keeps failing.
    """
    return _pruned("sparsegpt", weight, _gram(weight, gram), target, damping=damping)


def admm(
    weight: Tensor,
    gram: Tensor,
    target: Target | float | str,
    damping: float = Pruning.damping,
    iterations: int = Pruning.iterations,
) -> Pruned:
    """ADMM with least squares on what is kept (ALPS; Meng et al., NeurIPS 2024).

    Args:
        weight: (O, I), any float dtype.
        gram: (I, I) float32, `sum x x^T`.
        target: share to prune, in [0, 1), or n:m.
        damping: share of each entry of the diagonal that is added to it.
        iterations: steps at most.

    Returns:
        As of `sparsegpt`.

    Raises:
        ValueError: shapes do not fit, or the target is none.
        PruningError: the Gram matrix holds NaN.
    """
    return _pruned("admm", weight, _gram(weight, gram), target, damping=damping, iterations=iterations)


def wanda(weight: Tensor, squares: Tensor, target: Target | float | str) -> Pruned:
    """Wanda (Sun et al., ICLR 2024): magnitude times the norm of the input.

    Args:
        weight: (O, I), any float dtype.
        squares: (I,) float32, `sum x_j^2`, the diagonal of the Gram matrix.
        target: share to prune, in [0, 1), or n:m.

    Returns:
        As of `sparsegpt`.

    Raises:
        ValueError: shapes do not fit, or the target is none.
    """
    if tuple(squares.shape) != (weight.shape[-1],):
        raise ValueError(f"squares is (I,) with I = {weight.shape[-1]}, got {list(squares.shape)}")
    return _pruned("wanda", weight, InputNorms.of(squares.float(), 0), target)


def magnitude(weight: Tensor, target: Target | float | str) -> Pruned:
    """Prune the smallest weights.

    Args:
        weight: (O, I), any float dtype.
        target: share to prune, in [0, 1), or n:m.

    Returns:
        As of `sparsegpt`.

    Raises:
        ValueError: shapes do not fit, or the target is none.
    """
    return _pruned("magnitude", weight, None, target)


def _gram(weight: Tensor, gram: Tensor) -> InputGram:
    features = weight.shape[-1]
    if tuple(gram.shape) != (features, features):
        raise ValueError(f"gram is (I, I) with I = {features}, got {list(gram.shape)}")
    return InputGram.of(gram.to(torch.float32, copy=True), 0)  # a copy, as pruners work in it


def _pruned(
    name: str, weight: Tensor, statistic: Statistic | None, target: Target | float | str, **settings: float
) -> Pruned:
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"weight is a tensor (O, I) of floats, got {getattr(weight, 'dtype', type(weight))}")
    parsed = target if isinstance(target, Target) else parse_target(target)
    if problem := check_divides(parsed, weight.shape[1]):
        raise ValueError(problem)
    how = Pruning(pruner=name, sparsity=parsed, **settings)  # type: ignore[arg-type]
    return registry.prune(weight.detach(), how, statistic)
