"""Consensus: agree on the mask first, then every client solves again under it and the values are averaged.

With FedSpaLLM a weight is the mean over the clients that kept it, each of which made up for other pruned entries than the
final ones. Here the mask is settled before any weight is compensated, so all values of a matrix belong together, and the
l0 mean is a plain one: all clients keep the same entries.

Ours; the votes are those of FedSpaLLM's mask expansion (Bai et al., NAACL 2025, section 3.3).

Legend: O out features, I in features.
"""

from torch import Tensor

from fedspallm_appfl.aggregation.mask_expansion import expand
from fedspallm_appfl.aggregation.votes import Votes
from fedspallm_appfl.algorithms.exchange import Exchange
from fedspallm_appfl.tensors.sparsity import Target

LABEL = "consensus"
EXCHANGES = (Exchange("masks", "masks"), Exchange("values", "weights"))


def agree(votes: Votes, dense: Tensor, target: Target, group: str = "matrix") -> Tensor:
    """The mask of all clients, (O, I) bool with True = kept: the most voted entries go, ties by smallest dense weight."""
    return expand(votes.pruned, votes.clients, dense, target, group)
