"""FedSpaLLM: the mean of each weight over the clients that kept it, then masks expanded to the target.

Source: Bai et al., "FedSpaLLM: Federated Pruning of Large Language Models", NAACL 2025, sections 3.2 and 3.3.

Legend: O out features, I in features.
"""

from torch import Tensor

from fedspallm_appfl.aggregation.l0_mean import L0Sums, l0_mean
from fedspallm_appfl.aggregation.mask_expansion import expand
from fedspallm_appfl.algorithms.algorithm import Algorithm, Exchange, Matrix


def combine(sums: L0Sums, matrix: Matrix) -> tuple[Tensor, Tensor]:
    """The global matrix.

    Args:
        sums: of the clients' weights and masks; its totals and weights, most of what a matrix takes, are dropped once used.
        matrix: target, and group of comparison.

    Returns:
        (weight (O, I) float32, mask (O, I) bool with True = kept).
    """
    mean = l0_mean(sums)
    sums.total, sums.kept = sums.total.new_empty(0), None
    return mean, expand(sums.votes, sums.clients, mean, matrix.target, matrix.group)


ALGORITHM = Algorithm(
    "fedspallm",
    [Exchange("weights", "weights", combine)],
    label="FedSpaLLM",
    averages=True,
    expands=True,
    compares=True,
)
