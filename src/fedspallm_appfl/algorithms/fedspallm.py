"""FedSpaLLM: the mean of each weight over the clients that kept it, then masks expanded to the target.

Source: Bai et al., "FedSpaLLM: Federated Pruning of Large Language Models", NAACL 2025, sections 3.2 and 3.3.

Legend: O out features, I in features.
"""

from torch import Tensor

from fedspallm_appfl.aggregation.l0_mean import L0Sums, l0_mean
from fedspallm_appfl.aggregation.mask_expansion import expand
from fedspallm_appfl.algorithms.exchange import Exchange
from fedspallm_appfl.tensors.sparsity import Target

LABEL = "FedSpaLLM"
EXCHANGES = (Exchange("weights", "weights"),)


def combine(sums: L0Sums, target: Target, group: str = "matrix") -> tuple[Tensor, Tensor]:
    """The global matrix.

    Args:
        sums: of the clients' weights and masks; its totals and weights, most of what a matrix takes, are dropped once used.
        target: ratio or n:m.
        group: `matrix` or `row`, where a ratio is counted in mask expansion.

    Returns:
        (weight (O, I) float32, mask (O, I) bool with True = kept).
    """
    mean = l0_mean(sums)
    sums.total, sums.kept = sums.total.new_empty(0), None
    return mean, expand(sums.votes, sums.clients, mean, target, group)
