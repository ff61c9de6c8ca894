"""What a client sends: the sweep over its private text that each kind of upload takes, and the bytes of it.

Legend: O out features, I in features.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch

from fedspallm_appfl.algorithms.algorithm import DELTAS, NOTHING, PROTOCOL, SQUARES, Exchange, Groups
from fedspallm_appfl.pruning.from_sums import Sums
from fedspallm_appfl.pruning.registry import keeps_weights
from fedspallm_appfl.rounds.gathering import gathered
from fedspallm_appfl.rounds.hidden.folds import squares_size
from fedspallm_appfl.rounds.hidden.sweeps import hidden_sizes, hidden_sweep
from fedspallm_appfl.rounds.pruning import Pruned, PrunedLinear, prune_blocks
from fedspallm_appfl.rounds.source import Source, require_tokens
from fedspallm_appfl.settings.schema import Gram
from fedspallm_appfl.tensors.targets import Sparsity
from fedspallm_appfl.wire.deltas import changed_entries, delta_size
from fedspallm_appfl.wire.grams import gram_size, pack_gram
from fedspallm_appfl.wire.hidden import PackedWords
from fedspallm_appfl.wire.packed import (
    Packed,
    Shapes,
    Unreached,
    kept_entries,
    pack,
    pack_mask,
    pack_values,
    packed_sizes,
)
from fedspallm_appfl.wire.update import Unit

Noted = tuple[Unit | PackedWords, dict[str, float]]  # what travels, and what the report should say about it
Sweep = Iterator[tuple[int, dict[str, Noted]]]


def sweep(source: Source, exchange: Exchange, blocks: set[int]) -> Sweep:
    """Make what an exchange sends of some blocks, block by block; nothing that was given is held while the sweep stands.

    Raises:
        PruningError: a matrix cannot be pruned; names client, block and linear.
        DataError: statistics would be of too few tokens to be sent.
    """
    if exchange.hidden:
        return hidden_sweep(source, exchange, blocks)
    return _SWEEPS[exchange.up](source, exchange, blocks)


def _weights(source: Source, exchange: Exchange, blocks: set[int]) -> Sweep:
    """Masks and kept weights; no weights where the pruner left them alone, as the server has them too."""
    if keeps_weights(source.settings):
        yield from _masks(source, exchange, blocks)
        return
    dtype = source.model.skeleton.stored_dtype
    yield from _packed(prune_blocks(source, blocks), lambda block, name, one: pack(one.weight, one.mask, dtype))


def _masks(source: Source, exchange: Exchange, blocks: set[int]) -> Sweep:
    return _packed(prune_blocks(source, blocks), lambda block, name, one: pack_mask(one.mask))


def _values(source: Source, exchange: Exchange, blocks: set[int]) -> Sweep:
    """Weights made for the masks that were agreed on."""
    dtype = source.model.skeleton.stored_dtype

    def packed(block: int, name: str, one: PrunedLinear) -> Packed:
        return pack_values(one.weight, (source.masks.get(block) or {})[name].bits, dtype)

    return _packed(prune_blocks(source, blocks, source.masks), packed)


def _packed(pruned: Pruned, pack_one: Callable[[int, str, PrunedLinear], Packed]) -> Sweep:
    """Pack matrix by matrix; none is kept that was packed."""
    for block, linears in pruned:
        yield block, {name: _noted(block, name, linears.pop(name), pack_one) for name in list(linears)}


def _noted(
    block: int, name: str, one: PrunedLinear | Unreached, pack_one: Callable[[int, str, PrunedLinear], Packed]
) -> Noted:
    if isinstance(one, Unreached):
        return one, {}
    return replace(pack_one(block, name, one), tokens=one.tokens), one.notes


def _grams(source: Source, exchange: Exchange, blocks: set[int]) -> Sweep:
    for block, found in gathered(source, blocks, exchange.only):
        yield block, {name: (_packed_gram(source, block, name, sums), {}) for name, sums in found}


def _packed_gram(source: Source, block: int, name: str, sums: Sums | Unreached) -> Unit:
    if isinstance(sums, Unreached):
        return sums
    require_tokens(source, block, name, sums.tokens, len(sums.upper))
    return pack_gram(sums, source.settings.gram.precision)


def _deltas(source: Source, exchange: Exchange, blocks: set[int]) -> Sweep:
    for block, changes in source.learnt(exchange.turn, blocks):
        yield block, {name: (changes.pop(name), {}) for name in list(changes)}


_SWEEPS: dict[str, Callable[[Source, Exchange, set[int]], Sweep]] = {
    "weights": _weights,
    "masks": _masks,
    "values": _values,
    "grams": _grams,
    DELTAS: _deltas,
    **dict.fromkeys((NOTHING, *PROTOCOL), lambda source, exchange, blocks: iter(())),
}


def down_sizes(
    exchange: Exchange, shapes: Mapping[int, Shapes], sparsity: Sparsity, dtype: torch.dtype, groups: Groups = ()
) -> dict[int, dict[str, int]]:
    """Bytes of what goes down after an exchange: block -> linear, or first linear of an input -> bytes.

    Args:
        exchange: the exchange.
        shapes: for each block (O, I) of each linear.
        sparsity: the target of each matrix.
        dtype: dtype of the checkpoint.
        groups: linears that share an input.
    """
    if exchange.down is None or exchange.hidden:  # of what is hidden something is made when it is opened
        return {}
    if exchange.down == SQUARES:
        return {
            block: {names[0]: squares_size(of[names[0]][1]) for names in groups[block]} for block, of in shapes.items()
        }
    down, blocks = exchange.down, [block for block in shapes if exchange.concerns(block)]
    return {block: packed_sizes(shapes[block], sparsity, dtype, down, block) for block in blocks}


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
    if exchange.hidden:
        return hidden_sizes(exchange, shapes, sparsity, groups)
    if exchange.up == "grams":
        gram = gram or Gram()
        return {
            block: {
                name: gram_size(shapes[block][name][1], gram.precision, gram.drift)
                for name in exchange.units_of(block, [names[0] for names in groups[block]])
            }
            for block in shapes
            if exchange.concerns(block)
        }
    if exchange.begins or exchange.speaks:
        return {}
    if exchange.trains:
        return {
            block: {
                name: delta_size(changed_entries(kept, linears[name][0], exchange.rank), exchange.delta)
                for name, kept in kept_entries(linears, sparsity, block).items()
            }
            for block, linears in shapes.items()
        }
    return {block: packed_sizes(linears, sparsity, dtype, exchange.up, block) for block, linears in shapes.items()}
