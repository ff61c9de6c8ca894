"""Inputs, pruners and slow oracles in float64 for least squares and ADMM."""

import numpy as np
import torch

from fedspallm_appfl.pruning.registry import prepare
from fedspallm_appfl.pruning.statistics import InputGram
from fedspallm_appfl.settings.schema import Pruning
from fedspallm_appfl.tensors.target import parse_target

DAMPING = 0.01


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated_inputs(features, tokens=None, seed=0):
    """(tokens, features), features that share a few directions and differ in size."""
    tokens = tokens or 4 * features
    shared = normal(tokens, 5, seed=seed) @ normal(5, features, seed=seed + 2)
    return (normal(tokens, features, seed=seed + 1) + shared) * normal(features, seed=seed + 3).exp()


def matrix_of(inputs):
    return inputs.T @ inputs


def prepared(pruner, text, matrix, **settings):
    """A pruner for a Gram matrix, of which it may use up a copy."""
    return prepare(Pruning(pruner, parse_target(text), **settings), InputGram.of(matrix.clone(), 1))


def damped(matrix, damping=DAMPING):
    """`G + 0.01 diag G` in float64."""
    matrix = matrix.double().numpy()
    return matrix + damping * np.diag(matrix.diagonal())


def solve_oracle(weight, mask, matrix, damping=DAMPING):
    """Oracle: `q_S H_SS = (w H)_S` row by row in float64; weights of inputs that are always zero stay as they were."""
    h, best = damped(matrix, damping), (weight * mask).double().numpy()
    for row, kept in enumerate((mask & (matrix.diagonal() > 0)).numpy()):
        best[row, kept] = np.linalg.solve(h[np.ix_(kept, kept)], (weight[row].double().numpy() @ h)[kept])
    return torch.from_numpy(best)


def error(pruned, weight, matrix, damping=DAMPING):
    """`tr (Q - W) H (Q - W)^T` in float64."""
    lost = (pruned.double() - weight.double()).numpy()
    return float(((lost @ damped(matrix, damping)) * lost).sum())


def rounded(matrix, levels=15):
    """A Gram matrix whose correlations were rounded to so many steps on either side of 0."""
    norms = matrix.diagonal().sqrt()
    norms = torch.where(norms > 0, norms, 1.0)
    return (matrix / norms / norms[:, None] * levels).round() / levels * norms * norms[:, None]
