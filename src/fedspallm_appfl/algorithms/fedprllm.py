"""FedPrLLM: masks alone travel; the most voted entries of the dense weights go, the others stay as they were.

Source: Guo et al., "Can Large Language Models Be Pruned Federatedly?" (FedPrLLM), arXiv 2505.13547: one-shot, entries
compared over a whole matrix, no weight scaling - the variant that its authors found best.

Legend: O out features, I in features.
"""

from torch import Tensor

from fedspallm_appfl.aggregation.mask_expansion import Votes, expand
from fedspallm_appfl.algorithms.algorithm import Algorithm, Exchange, Matrix


def combine(votes: Votes, matrix: Matrix) -> tuple[Tensor, Tensor]:
    """The global matrix.

    Args:
        votes: how many clients pruned each entry.
        matrix: target, group of comparison, and the dense weights; these break ties, smallest first.

    Returns:
        (weight (O, I) float32, the dense one; mask (O, I) bool with True = kept).
    """
    dense = matrix.dense()
    return dense, expand(votes.pruned, votes.clients, dense, matrix.target, matrix.group)


ALGORITHM = Algorithm(
    "fedprllm", [Exchange("masks", "weights", combine)], label="FedPrLLM", expands=True, drops_values=True
)
