"""Perplexity, block by block (docs/method.md section 6).

Windows of `length` tokens do not overlap; the first token of a window is not predicted. The dense model is always
evaluated with the same settings, as the reference.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedspallm_appfl.errors import DataError
from fedspallm_appfl.models.blockwise import advance, embed, finish
from fedspallm_appfl.models.lazy_model import LazyModel
from fedspallm_appfl.models.text import check_vocabulary, cut_windows, read_text
from fedspallm_appfl.wire.packed import Packed

PrunedBlock = Callable[[int], Mapping[str, Packed] | None]


def held_out_windows(
    name: str, text: str | Sequence[str], length: int, tokenizer: Any = None, vocabulary: int = 0
) -> Tensor:
    """The windows of one text of a configuration's `evaluation`.

    Args:
        name: its name there.
        text: file, folder or a list of these.
        length: tokens in a window.
        tokenizer: the model's; None to check only whether the text can be read.
        vocabulary: number of token ids with an embedding.

    Returns:
        (n, length) int64; n is at least 1 if there is a tokenizer.

    Raises:
        DataError: names the key and the file that cannot be read, is too short, or does not match the model.
    """
    where = f"evaluation.texts.{name}"
    try:
        words = read_text(text)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    if tokenizer is None:
        return torch.empty(0, length, dtype=torch.int64)
    windows = cut_windows(tokenizer, words, length)
    if not len(windows):
        files = text if isinstance(text, str) else ", ".join(text)
        raise DataError(
            f"{where}: {files} has no whole window of {length} tokens; give more text, or lower evaluation.length"
        )
    check_vocabulary(windows, vocabulary, where)
    return windows


def perplexities(
    model: LazyModel, texts: Mapping[str, Tensor], pruned: PrunedBlock = lambda block: None, batch: int = 1
) -> dict[str, float]:
    """Perplexity on each text; the blocks are read once for all texts.

    Args:
        model: the dense model.
        texts: name -> (windows, length) int64 token ids; all of one length.
        pruned: block index -> its pruned matrices, or None for a dense block.
        batch: windows in a batch.

    Returns:
        Name -> perplexity; infinity if the mean loss overflows, NaN if the model gives NaN.

    Raises:
        DataError: a text has no whole window.
    """
    for name, windows in texts.items():
        if not len(windows) or windows.shape[1] < 2:
            raise DataError(f"evaluation text {name} has no window of {windows.shape[1]} tokens; give more text")
    names, parts = list(texts), list(texts.values())
    states = [embed(model, part, batch) for part in parts]
    for index in range(len(model.blocks)):
        with model.block(index, pruned(index)) as block:
            for state in states:
                advance(block, index, state)
    losses = [_mean_loss(finish(model, part, state, batch)) for part, state in zip(parts, states, strict=True)]
    return {
        name: math.exp(loss) if loss < 700 or math.isnan(loss) else math.inf
        for name, loss in zip(names, losses, strict=True)
    }


def _mean_loss(batches: Iterator[tuple[Tensor, Tensor]]) -> float:
    total, tokens = 0.0, 0
    with torch.no_grad():
        for ids, logits in batches:
            targets = ids[:, 1:].to(logits.device).flatten()
            total += float(cross_entropy(logits[:, :-1].float().flatten(0, 1), targets, reduction="sum"))
            tokens += len(targets)
            del logits  # freed before the next ones are computed
    return total / tokens
