"""FedPrLLM: masks alone travel; the most voted entries of the dense weights go, the others stay as they were.

Source: Guo et al., "Can Large Language Models Be Pruned Federatedly?" (FedPrLLM), arXiv 2505.13547: one-shot, entries
compared over a whole matrix, no weight scaling - the variant that its authors found best.

Legend: O out features, I in features.
"""

from torch import Tensor

from fedspallm_appfl.aggregation.mask_expansion import expand
from fedspallm_appfl.aggregation.votes import Votes
from fedspallm_appfl.algorithms.exchange import Exchange
from fedspallm_appfl.tensors.sparsity import Target

LABEL = "FedPrLLM"
EXCHANGES = (Exchange("masks", "weights"),)


def combine(votes: Votes, dense: Tensor, target: Target, group: str = "matrix") -> tuple[Tensor, Tensor]:
    """The global matrix.

    Args:
        votes: how many clients pruned each entry.
        dense: (O, I) float32, the dense weights; they break ties, smallest first.
        target: ratio or n:m.
        group: `matrix` or `row`.

    Returns:
        (weight (O, I) float32, the dense one; mask (O, I) bool with True = kept).
    """
    return dense, expand(votes.pruned, votes.clients, dense, target, group)
