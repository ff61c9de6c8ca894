"""FedAvg on pruned models: zeros count in the mean, which is then pruned by magnitude to the target.

Source: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017; with
pruning to the target as in Bai et al., "FedSpaLLM", NAACL 2025, where it is the plain alternative.

Legend: O out features, I in features.
"""

from torch import Tensor

from fedspallm_appfl.aggregation.l0_mean import L0Sums, plain_mean
from fedspallm_appfl.algorithms.algorithm import Algorithm, Exchange, Matrix
from fedspallm_appfl.tensors.sparsity import select


def combine(sums: L0Sums, matrix: Matrix) -> tuple[Tensor, Tensor]:
    """The global matrix: (weight (O, I) float32, mask (O, I) bool with True = kept)."""
    mean = plain_mean(sums)
    return mean, ~select(mean.abs(), matrix.target, per_row=False)


ALGORITHM = Algorithm(
    "fedavg", [Exchange("weights", "weights", combine)], label="FedAvg", averages=True, closing_bytes=18
)
