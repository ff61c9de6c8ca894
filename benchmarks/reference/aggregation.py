"""Aggregation of one matrix written straight down: stack all clients, take the l0 mean, sort all entries.

Source: Bai et al., "FedSpaLLM: Federated Pruning of Large Language Models", NAACL 2025, sections 3.2 and 3.3.

Legend: O out features, I in features, K clients.
"""

import torch
from torch import Tensor


def aggregate(weights: list[Tensor], masks: list[Tensor], share: float) -> tuple[Tensor, Tensor]:
    """Combine the clients' matrices.

    Args:
        weights: K times (O, I), any float dtype, zero where pruned.
        masks: K times (O, I) bool, True = kept.
        share: of zeros in the result.

    Returns:
        (weight (O, I) float32, mask (O, I) bool with True = kept).
    """
    values, kept = torch.stack(weights).float(), torch.stack(masks).float()
    mean = (values * kept).sum(0) / kept.sum(0).clamp(min=1)
    votes = len(masks) - kept.sum(0)
    mask = _keep(votes, mean.abs(), int(share * mean.numel()))
    return mean * mask, mask


def _keep(votes: Tensor, magnitude: Tensor, zeros: int) -> Tensor:
    """All entries but those with the most votes, and among equal votes the smallest magnitude. One key holds both."""
    key = votes.double() - magnitude.double() / (2 * magnitude.max().double())
    mask = torch.ones(key.numel(), dtype=torch.bool)
    mask[key.flatten().argsort(descending=True)[:zeros]] = False
    return mask.view(key.shape)
