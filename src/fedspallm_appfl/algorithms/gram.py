"""Gram: clients send sums of x x^T of their inputs, the server adds them up and prunes each matrix once.

All that SparseGPT, Wanda, ADMM and least squares know of the calibration text is the Gram matrix of a linear's inputs,
and Gram matrices of texts add up: a pruner on the server with the sum does what it would do with all the text. Ours;
the statistics are those of Frantar & Alistarh, "SparseGPT", ICML 2023.

With inputs of the dense model one exchange is enough. In a sweep an exchange is about one input of one block: the clients
send its Gram in the model that is pruned so far, get the pruned matrices, and go on. With the dense output as target they
also send the drift E = sum (x_dense - x) x^T, since the minimizer of |W X_dense - Q X|^2 without a mask is

    W + W E (G + damping)^-1,

and the loss of any other Q is its distance from that, measured with G: pruners need not know where their target comes from.

Legend: O out features, I in features, G a Gram matrix, W dense weights, Q pruned ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedspallm_appfl.algorithms.exchange import Exchange, Groups
from fedspallm_appfl.pruning.pruner import Settings, prepare
from fedspallm_appfl.pruning.statistics import InputGram, lift, mirror

Pruned = tuple[Tensor, Tensor]

LABEL = "Gram"
PROPAGATE = ("dense", "pruned")
TARGETS = ("own", "dense")
FIRST_INPUTS = ("public", "private")


def exchanges(groups: Groups, propagate: str) -> tuple[Exchange, ...]:
    """One exchange, or in a sweep one for each input, in the order of the forward pass."""
    if propagate == "dense":
        return (Exchange("grams", None),)
    return tuple(
        Exchange("grams", "weights", (block, linears[0])) for block, inputs in enumerate(groups) for linears in inputs
    )


@dataclass(frozen=True)
class GramSettings:
    """What clients send.

    Attributes:
        precision: of what is above the diagonal: `fp32`, `bf16` or `int8`.
        propagate: inputs of the `dense` model, or of the one that is being `pruned`.
        target: outputs that a pruned matrix should give: those of its `own` dense weights, or of the `dense` model.
        first_input: statistics of the first block's first input from `public` random tokens, or from the `private` text,
            of which they give back how often each token occurs.
        min_tokens: fewer tokens than this are not sent; None for the width of the input.
    """

    precision: str = "int8"
    propagate: str = "dense"
    target: str = "own"
    first_input: str = "public"
    min_tokens: int | None = None

    @property
    def drift(self) -> bool:
        """Whether the drift from the dense model's inputs travels too."""
        return self.propagate == "pruned" and self.target == "dense"

    def least(self, features: int) -> int:
        """Tokens that a Gram matrix of so many features must be of."""
        return features if self.min_tokens is None else self.min_tokens


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


def prune(weights: Mapping[str, Tensor], sums: Sums, settings: Settings, rounded: bool) -> dict[str, Pruned]:
    """Prune all matrices that take one input.

    Args:
        weights: linear -> its dense weight (O, I) float32.
        sums: of all clients; used up.
        settings: how to prune.
        rounded: whether what came was rounded so that the sum may be indefinite.

    Returns:
        linear -> (pruned weight (O, I) float32, mask (O, I) bool with True = kept).

    Raises:
        PruningError: SparseGPT's factorization keeps failing.
    """
    if rounded and (settings.pruner == "sparsegpt" or sums.drift is not None):  # others do not factor it, or lift it
        lift(sums.upper)
    shift = None if sums.drift is None else _shift(sums, settings.damping)
    prepared = prepare(settings, InputGram.of(sums.upper, sums.tokens))
    return {name: prepared.prune(w if shift is None else torch.addmm(w, w, shift)) for name, w in weights.items()}


def _shift(sums: Sums, damping: float) -> Tensor:
    """What takes W to the weights that give the dense output best if nothing is pruned: (I, I), `E (G + damping)^-1`."""
    gram = mirror(sums.upper.clone())
    gram.diagonal().add_(damping * (float(gram.diagonal().mean()) or 1.0))
    assert sums.drift is not None
    return torch.linalg.solve(gram, sums.drift.T).T
