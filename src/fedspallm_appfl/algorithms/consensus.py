"""Consensus: agree on the mask first, then every client solves again under it and the values are averaged.

With FedSpaLLM a weight is the mean over the clients that kept it, each of which made up for other pruned entries than the
final ones. Here the mask is settled before any weight is compensated, so all values of a matrix belong together, and the
l0 mean is a plain one: all clients keep the same entries.

Ours; the votes are those of FedSpaLLM's mask expansion (Bai et al., NAACL 2025, section 3.3).

Legend: O out features, I in features.
"""

from torch import Tensor

from fedspallm_appfl.aggregation.mask_expansion import Votes, expand
from fedspallm_appfl.algorithms.algorithm import Algorithm, Exchange, Matrix


def agree(votes: Votes, matrix: Matrix) -> Tensor:
    """The mask of all clients, (O, I) bool with True = kept: the most voted entries go, ties by smallest dense weight."""
    return expand(votes.pruned, votes.clients, matrix.dense(), matrix.target, matrix.group)


ALGORITHM = Algorithm(
    "consensus",
    [Exchange("masks", "masks", agree), Exchange("values", "weights")],
    averages=True,
    expands=True,
    accumulates=False,  # the values of a round belong to its masks
    changes_weights=True,
)
