"""Perplexity, block by block (docs/method.md section 7).

Windows of `length` tokens that do not overlap; the first token of a window is not predicted. The dense model is always
evaluated with the same settings, so that numbers stand beside their reference.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedspallm_appfl.errors import DataError
from fedspallm_appfl.models.blockwise import advance, embed, finish
from fedspallm_appfl.models.lazy_model import LazyModel
from fedspallm_appfl.wire.packed import Packed

PrunedBlock = Callable[[int], Mapping[str, Packed] | None]


@dataclass(frozen=True)
class Loss:
    """The loss on a text.

    Attributes:
        total: sum over the tokens that are predicted, in nats.
        tokens: how many these are.
    """

    total: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """Infinity where the mean loss overflows, NaN where the model gives NaN."""
        mean = self.total / self.tokens
        return math.exp(mean) if mean < 700 or math.isnan(mean) else math.inf


def perplexities(
    model: LazyModel, texts: Mapping[str, Tensor], pruned: PrunedBlock = lambda block: None, batch: int = 1
) -> dict[str, float]:
    """Perplexity on each text; the blocks are read once for all of them.

    Args:
        model: the dense model.
        texts: name -> (windows, length) int64 token ids; all of one length.
        pruned: block index -> its pruned matrices, or None for a dense block.
        batch: windows in a batch.

    Returns:
        Name -> perplexity.

    Raises:
        DataError: a text has no whole window.
    """
    return {name: loss.perplexity for name, loss in losses(model, texts, pruned, batch).items()}


def losses(
    model: LazyModel, texts: Mapping[str, Tensor], pruned: PrunedBlock = lambda block: None, batch: int = 1
) -> dict[str, Loss]:
    """The same before it is divided and exponentiated."""
    for name, windows in texts.items():
        if not len(windows) or windows.shape[1] < 2:
            raise DataError(
                f"evaluation text {name} has no window of {windows.shape[1]} tokens; give more text, or a shorter length"
            )
    names, parts = list(texts), list(texts.values())
    states = [embed(model, part, batch) for part in parts]
    for index in range(len(model.blocks)):
        with model.block(index, pruned(index)) as block:
            for state in states:
                advance(block, index, state)
    found = [_loss(finish(model, part, state, batch)) for part, state in zip(parts, states, strict=True)]
    return dict(zip(names, found, strict=True))


def _loss(batches: Iterator[tuple[Tensor, Tensor]]) -> Loss:
    total, tokens = 0.0, 0
    with torch.no_grad():
        for ids, logits in batches:
            targets = ids[:, 1:].to(logits.device).flatten()
            total += float(cross_entropy(logits[:, :-1].float().flatten(0, 1), targets, reduction="sum"))
            tokens += len(targets)
            del logits  # not kept while the next ones are made
    return Loss(total, tokens)
