"""What a client sends: the sweep over its private text that each kind of upload takes, and the bytes of it.

Legend: O out features, I in features.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from fedspallm_appfl.algorithms.algorithm import Exchange, Groups
from fedspallm_appfl.errors import DataError
from fedspallm_appfl.pruning.from_sums import Sums
from fedspallm_appfl.pruning.registry import keeps_weights
from fedspallm_appfl.rounds.gathering import gathered
from fedspallm_appfl.rounds.pruning import prune_blocks
from fedspallm_appfl.rounds.source import Agreed, Source
from fedspallm_appfl.settings.schema import Gram
from fedspallm_appfl.tensors.targets import Sparsity
from fedspallm_appfl.wire.grams import gram_size, pack_gram
from fedspallm_appfl.wire.packed import Shapes, pack, pack_mask, pack_values, packed_sizes
from fedspallm_appfl.wire.update import Unit

Noted = tuple[Unit, dict[str, float]]  # what travels, and what the report should say about it
Sweep = Iterator[tuple[int, dict[str, Noted]]]


def sweep(source: Source, exchange: Exchange, blocks: set[int]) -> Sweep:
    """Make what an exchange sends of some blocks, block by block.

    Raises:
        PruningError: a matrix cannot be pruned; names client, block and linear.
        DataError: statistics would be of too few tokens to be sent.
    """
    return _SWEEPS[exchange.up](source, exchange, blocks)


def _weights(source: Source, exchange: Exchange, blocks: set[int]) -> Sweep:
    """Masks and kept weights; no weights where the pruner left them alone, as the server has them too."""
    if keeps_weights(source.settings):
        yield from _masks(source, exchange, blocks)
        return
    dtype = source.model.skeleton.stored_dtype
    for block, linears in _pruned(source, blocks):
        yield block, {name: (pack(one.weight, one.mask, dtype), one.notes) for name, one in linears}


def _masks(source: Source, exchange: Exchange, blocks: set[int]) -> Sweep:
    for block, linears in _pruned(source, blocks):
        yield block, {name: (pack_mask(one.mask), one.notes) for name, one in linears}


def _values(source: Source, exchange: Exchange, blocks: set[int]) -> Sweep:
    """Weights made for the masks that were agreed on."""
    dtype = source.model.skeleton.stored_dtype
    for block, linears in _pruned(source, blocks, source.masks):
        masks = source.masks.get(block) or {}
        yield block, {name: (pack_values(one.weight, masks[name].bits, dtype), one.notes) for name, one in linears}


def _pruned(source: Source, blocks: set[int], masks: Agreed | None = None) -> Iterator[tuple[int, Any]]:
    """(block, iterator of (linear, pruned matrix) that keeps none that it has given)."""
    for block, linears in prune_blocks(source, blocks, masks):
        yield block, ((name, linears.pop(name)) for name in list(linears))


def _grams(source: Source, exchange: Exchange, blocks: set[int]) -> Sweep:
    for block, sums in gathered(source, blocks, exchange.only):
        for name in sums:
            _require_tokens(source, block, name, sums[name])
        precision = source.settings.gram.precision
        yield block, {name: (pack_gram(sums.pop(name), precision), {}) for name in list(sums)}


def _require_tokens(source: Source, block: int, name: str, sums: Sums) -> None:
    least = source.settings.gram.fewest_tokens(len(sums.upper))
    if sums.tokens < least:
        raise DataError(
            f"{source.where(block, name)}: statistics of {sums.tokens} tokens are not sent: text might be read back from "
            f"fewer than {least}; give more calibration windows, or lower gram.min_tokens"
        )


_SWEEPS: dict[str, Callable[[Source, Exchange, set[int]], Sweep]] = {
    "weights": _weights,
    "masks": _masks,
    "values": _values,
    "grams": _grams,
}


def sizes(
    exchange: Exchange,
    shapes: Mapping[int, Shapes],
    sparsity: Sparsity,
    dtype: torch.dtype,
    groups: Groups = (),
    gram: Gram | None = None,
) -> dict[int, dict[str, int]]:
    """Bytes of each unit of an exchange, uncompressed: block -> linear, or first linear of an input -> bytes.

    Args:
        exchange: the exchange.
        shapes: for each block (O, I) of each linear.
        sparsity: the target of each matrix.
        dtype: dtype of the checkpoint.
        groups: linears that share an input, for `grams`.
        gram: which statistics, for `grams`.
    """
    if exchange.up == "grams":
        gram = gram or Gram()
        return {
            block: {
                names[0]: gram_size(shapes[block][names[0]][1], gram.precision, gram.drift)
                for names in groups[block]
                if exchange.only in (None, (block, names[0]))
            }
            for block in shapes
            if exchange.concerns(block)
        }
    return {block: packed_sizes(linears, sparsity, dtype, exchange.up, block) for block, linears in shapes.items()}
