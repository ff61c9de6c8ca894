"""Uploads of a client: the sweep over its private text for each kind of upload.

Legend: O out features, I in features.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedspallm_appfl.algorithms.exchange import Exchange, Groups
from fedspallm_appfl.algorithms.gram import GramSettings, Sums
from fedspallm_appfl.errors import DataError
from fedspallm_appfl.models.blockwise import prune_blocks
from fedspallm_appfl.models.lazy_model import LazyModel
from fedspallm_appfl.pruning.pruner import Settings
from fedspallm_appfl.rounds.gathering import dense_grams, swept_grams
from fedspallm_appfl.tensors.sparsity import Target
from fedspallm_appfl.wire.agreed_blocks import AgreedBlocks
from fedspallm_appfl.wire.grams import gram_size, pack_gram
from fedspallm_appfl.wire.packed import Packed, Shapes, pack, pack_mask, pack_values, packed_sizes

Unit = tuple[Packed, dict[str, float]]  # the data to send, and notes for the report
Sweep = Iterator[tuple[int, dict[str, Unit]]]


@dataclass(frozen=True)
class Source:
    """The state of a client that a sweep needs.

    Attributes:
        client: its id, for errors.
        model: the dense model.
        windows: (n, T) int64 calibration tokens.
        pruning: how to prune a matrix.
        gram: which statistics to send.
        groups: linears that share an input; empty if only matrices are sent.
        agreed: pruned blocks from the server.
        masks: masks from the server.
        options: batch, activations: how to run the model.
        seed: the experiment's.
    """

    client: str
    model: LazyModel
    windows: Tensor
    pruning: Settings
    gram: GramSettings
    groups: Groups
    agreed: AgreedBlocks
    masks: AgreedBlocks
    options: Mapping[str, Any]
    seed: int = 0


def sweep(source: Source, exchange: Exchange, blocks: set[int]) -> Sweep:
    """Make the upload of an exchange for some blocks, block by block.

    Raises:
        PruningError: a matrix cannot be pruned; names client, block and linear.
        DataError: the statistics cover too few tokens to be sent.
    """
    return _SWEEPS[exchange.up](source, exchange, blocks)


def _weights(source: Source, exchange: Exchange, blocks: set[int]) -> Sweep:
    """Masks and kept weights; no weights if the pruner did not change them, because the server has them."""
    dtype = source.model.skeleton.stored_dtype
    for block, linears in _pruned(source, blocks):
        yield (
            block,
            {
                name: (
                    pack_mask(one.mask) if source.pruning.keeps_weights else pack(one.weight, one.mask, dtype),
                    one.notes,
                )
                for name, one in linears
            },
        )


def _masks(source: Source, exchange: Exchange, blocks: set[int]) -> Sweep:
    for block, linears in _pruned(source, blocks):
        yield block, {name: (pack_mask(one.mask), one.notes) for name, one in linears}


def _values(source: Source, exchange: Exchange, blocks: set[int]) -> Sweep:
    """Weights solved for the agreed masks."""
    dtype = source.model.skeleton.stored_dtype
    for block, linears in _pruned(source, blocks, source.masks):
        masks = source.masks.get(block) or {}
        yield block, {name: (pack_values(one.weight, masks[name]["mask"], dtype), one.notes) for name, one in linears}


def _pruned(source: Source, blocks: set[int], masks: AgreedBlocks | None = None) -> Iterator[tuple[int, Any]]:
    """(block, iterator of (linear, pruned matrix) that keeps no reference to yielded matrices)."""
    swept = prune_blocks(
        source.model,
        source.windows,
        blocks,
        source.pruning,
        pruned=source.agreed,
        masks=masks,
        client=source.client,
        **source.options,
    )
    for block, linears in swept:
        yield block, ((name, linears.pop(name)) for name in list(linears))


def _grams(source: Source, exchange: Exchange, blocks: set[int]) -> Sweep:
    public_first = source.seed if source.gram.first_input == "public" else None
    where: dict[str, Any] = {"client": source.client, "public_first": public_first, **source.options}
    if source.gram.propagate == "dense":
        found = dense_grams(source.model, source.windows, blocks, source.groups, **where)
    else:
        where |= {"start": exchange.only, "dense_target": source.gram.drift}
        found = swept_grams(source.model, source.windows, blocks, source.groups, source.agreed, **where)
    for block, sums in found:
        for name in sums:
            _require_tokens(source, block, name, sums[name])
        yield block, {name: (pack_gram(sums.pop(name), source.gram.precision), {}) for name in list(sums)}


def _require_tokens(source: Source, block: int, name: str, sums: Sums) -> None:
    least = source.gram.least(len(sums.upper))
    if sums.tokens < least:
        raise DataError(
            f"client {source.client}, block {block}, {name}: statistics of {sums.tokens} tokens are not sent: text might "
            f"be recovered from fewer than {least}; give more calibration windows, or lower gram.min_tokens"
        )


_SWEEPS = {"weights": _weights, "masks": _masks, "values": _values, "grams": _grams}


def sizes(
    exchange: Exchange,
    shapes: Mapping[int, Shapes],
    target: Target,
    dtype: torch.dtype,
    groups: Groups = (),
    gram: GramSettings | None = None,
) -> dict[int, dict[str, int]]:
    """Bytes of each unit of an exchange, uncompressed: block -> linear, or first linear of an input -> bytes.

    Args:
        exchange: the exchange.
        shapes: for each block (O, I) of each linear.
        target: sparsity.
        dtype: dtype of the checkpoint.
        groups: linears that share an input, for `grams`.
        gram: which statistics, for `grams`.
    """
    if exchange.up == "grams":
        gram = gram or GramSettings()
        return {
            block: {
                names[0]: gram_size(shapes[block][names[0]][1], gram.precision, gram.drift)
                for names in groups[block]
                if exchange.only in (None, (block, names[0]))
            }
            for block in shapes
            if exchange.concerns(block)
        }
    return {block: packed_sizes(linears, target, dtype, exchange.up) for block, linears in shapes.items()}
