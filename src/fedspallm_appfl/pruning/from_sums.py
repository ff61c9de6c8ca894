"""Prune all matrices that take one input, from sums over the texts of all clients.

All that SparseGPT, Wanda, ADMM and least squares know of the calibration text is the Gram matrix of a linear's inputs, and
Gram matrices of texts add up: a pruner with the sum does what it would do with all the text.

With the dense output as target the drift E = sum (x_dense - x) x^T is known too. The minimizer of |W X_dense - Q X|^2
without a mask is

    W + W E (G + damping)^-1,

and the loss of any other Q is its distance from that, measured with G: pruners need not know where their target comes from.

Source of the statistics: Frantar & Alistarh, "SparseGPT", ICML 2023. Legend: O out features, I in features, G a Gram
matrix, W dense weights, Q pruned ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedspallm_appfl.pruning.pruner import Pruned, by_target
from fedspallm_appfl.pruning.registry import find
from fedspallm_appfl.pruning.statistics import InputGram, is_indefinite, lift, mirror
from fedspallm_appfl.settings.schema import Pruning
from fedspallm_appfl.tensors.sparsity import already_zero

PRUNED = 5  # bytes an entry of a matrix that was pruned: float32 and a mask


@dataclass(frozen=True)
class Sums:
    """What is known of one input, of one client or of all together.

    Attributes:
        upper: (I, I) float32, the Gram matrix on and above its diagonal.
        tokens: calibration tokens in it.
        drift: (I, I) float32, `sum (x_dense - x) x^T`; None where the target is the output of the matrix itself.
    """

    upper: Tensor
    tokens: int
    drift: Tensor | None = None


def prune(
    weights: Mapping[str, Tensor], sums: Sums, settings: Pruning, rounded: bool, block: int = 0, keep_zeros: bool = True
) -> dict[str, Pruned]:
    """Prune all matrices that take one input.

    Args:
        weights: linear -> its dense weight (O, I) float32.
        sums: of all clients; used up.
        settings: how to prune.
        rounded: whether what came was rounded, so that the sum may be indefinite.
        block: whose matrices they are; their targets may depend on it.
        keep_zeros: whether entries of the dense weights that are zero stay zero.

    Returns:
        linear -> (pruned weight (O, I) float32, mask (O, I) bool with True = kept).

    Raises:
        PruningError: a factorization keeps failing.
    """
    factored = find(settings.pruner).factors or sums.drift is not None
    if factored and (rounded or is_indefinite(sums.upper)):
        lift(sums.upper)
    shift = None if sums.drift is None else _shift(sums, settings.damping)
    made, gram = {}, InputGram.of(sums.upper, sums.tokens)
    for own, names, known in by_target(settings, block, list(weights), gram):
        prepared = find(settings.pruner).ready(own, known)
        for name in names:
            weight = weights[name]
            zero = already_zero(weight) if keep_zeros else None
            aim = weight if shift is None else torch.addmm(weight, weight, shift)
            made[name] = prepared.prune_all(aim, own.own_target, zero)
    return made


def working_bytes(shapes: Sequence[tuple[int, int]], settings: Pruning, drift: bool) -> int:
    """Bytes that `prune` takes at most, sums and dense weights included.

    Args:
        shapes: (O, I) of the matrices that take the input.
        settings: how to prune.
        drift: whether the drift is known too.
    """
    pruner, features = find(settings.pruner), shapes[0][1]
    square, dense = InputGram.nbytes(features), 4 * sum(rows * features for rows, _ in shapes)
    known = square * (3 if drift else 1)  # Gram matrix, drift, and what the drift comes to
    # Lifted and factored; or solving for the dense target: Gram, drift, a copy of either, and the solution.
    most, done = max(5 * square if drift else 0, known + 2 * square), 0
    for rows, _ in shapes:
        shifted = drift * 4 * rows * features
        solving = pruner.ready_bytes(features, settings.refit) + pruner.solving_bytes(rows, features, settings.refit)
        most = max(most, known + done + shifted + solving)
        done += PRUNED * rows * features
    return dense + most


def _shift(sums: Sums, damping: float) -> Tensor:
    """What takes W to the weights that give the dense output best if nothing is pruned: (I, I), `E (G + damping)^-1`."""
    gram = mirror(sums.upper.clone())
    gram.diagonal().add_(damping * (float(gram.diagonal().mean()) or 1.0))
    assert sums.drift is not None
    return torch.linalg.solve(gram, sums.drift.T).T
