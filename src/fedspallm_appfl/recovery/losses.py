"""What a step of recovery makes smaller.

Legend: B windows in a batch, T tokens in a window, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, mse_loss

Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def kl(logits: Tensor, ids: Tensor, dense: Tensor | None) -> Tensor:
    """Divergence of the pruned model's distribution from the dense model's, the mean over all tokens.

    Args:
        logits: (B, T, V) of the pruned model.
        ids: (B, T), not looked at.
        dense: (B, T, V) logits of the dense model.
    """
    assert dense is not None, "the divergence is from the dense model"
    theirs, mine = (log_softmax(one.float(), -1) for one in (dense, logits))
    return (theirs.exp() * (theirs - mine)).sum(-1).mean()


def next_token(logits: Tensor, ids: Tensor, dense: Tensor | None) -> Tensor:
    """The loss of language models, the mean over the tokens that are predicted; `dense` is not looked at."""
    return cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


def output_error(made: Tensor, wanted: Tensor) -> Tensor:
    """Squared error of a block's output as a share of the wanted output's mean square, whatever its magnitude."""
    wanted = wanted.float()
    return mse_loss(made.float(), wanted) / wanted.square().mean().clamp_min(torch.finfo(torch.float32).tiny)


LOSSES: dict[str, Loss] = {"kl": kl, "next_token": next_token}
