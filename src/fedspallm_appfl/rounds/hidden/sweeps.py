"""What a client makes of its private text for secure sums: integers, before masks are added to them."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from fedspallm_appfl.algorithms.algorithm import DELTAS, SQUARES, Exchange, Groups
from fedspallm_appfl.errors import UpdateError
from fedspallm_appfl.pruning.from_sums import Sums
from fedspallm_appfl.rounds.gathering import gathered
from fedspallm_appfl.rounds.hidden import coding as code
from fedspallm_appfl.rounds.hidden.folds import read_squares
from fedspallm_appfl.rounds.pruning import PrunedLinear, prune_blocks
from fedspallm_appfl.rounds.source import Source, require_tokens
from fedspallm_appfl.tensors import seeds
from fedspallm_appfl.tensors.targets import Sparsity
from fedspallm_appfl.wire.deltas import PackedDelta, changed_entries
from fedspallm_appfl.wire.hidden import PackedWords
from fedspallm_appfl.wire.packed import Shapes, Unreached
from fedspallm_appfl.wire.store import GramStore

Noted = tuple[Any, dict[str, float]]  # words, and what the report should say about them
Units = dict[str, Noted]
Made = Iterator[tuple[int, Units]]


def hidden_sweep(source: Source, exchange: Exchange, blocks: set[int]) -> Made:
    """Make what a hidden exchange sends of some blocks, block by block.

    Raises:
        PruningError: a matrix cannot be pruned, or its numbers are too large; names client, block and linear.
        DataError: statistics would be of too few tokens to be sent.
    """
    return _SWEEPS[exchange.up](source, exchange, blocks)


def _masks(source: Source, exchange: Exchange, blocks: set[int]) -> Made:
    for block, linears in prune_blocks(source, blocks):
        yield block, {name: _mask(exchange, linears.pop(name)) for name in list(linears)}


def _mask(exchange: Exchange, one: PrunedLinear | Unreached) -> Noted:
    assert not isinstance(one, Unreached), "models with experts are refused"
    of = code.coding("masks", one.mask.numel(), 0, exchange.hidden)
    return PackedWords(of.pack((~one.mask).flatten().to(torch.uint8).cpu())), one.notes


def _values(source: Source, exchange: Exchange, blocks: set[int]) -> Made:
    for block, linears in prune_blocks(source, blocks, source.masks):
        yield block, {name: _kept(source, exchange, block, name, linears.pop(name)) for name in list(linears)}


def _kept(source: Source, exchange: Exchange, block: int, name: str, one: PrunedLinear | Unreached) -> Noted:
    assert not isinstance(one, Unreached), "models with experts are refused"
    dense, where = source.model.skeleton.dense_matrix(block, name), source.where(block, name)
    kept = one.weight[one.mask].to(source.model.skeleton.stored_dtype).cpu()
    of = code.coding("values", 0, len(kept), exchange.hidden)
    return PackedWords(of.pack(code.fixed(kept, dense, exchange.hidden, where))), one.notes


def _squares(source: Source, exchange: Exchange, blocks: set[int]) -> Made:
    for block, found in gathered(source, blocks):
        yield block, {name: _square(source, exchange, block, name, sums) for name, sums in found}


def _square(source: Source, exchange: Exchange, block: int, name: str, sums: Sums | Unreached) -> Noted:
    """The statistics are kept in a file until the scale of what is above the diagonal is known."""
    assert not isinstance(sums, Unreached), "models with experts are refused"
    require_tokens(source, block, name, sums.tokens, len(sums.upper))
    GramStore(source.scratch()).save(block, (name,), sums, rounded=False)
    of = code.coding(SQUARES, len(sums.upper), 0, exchange.hidden)
    return PackedWords(of.pack(code.squares(sums, source.where(block, name)))), {}


def _grams(source: Source, exchange: Exchange, blocks: set[int]) -> Made:
    for block in sorted(blocks):
        yield block, {names[0]: _gram(source, exchange, block, names[0]) for names in source.groups[block]}


def _gram(source: Source, exchange: Exchange, block: int, name: str) -> Noted:
    found, known = GramStore(source.scratch()).load(block, name), (source.squares.get(block) or {})[name]
    assert found is not None, "squares were sent of it"
    total, _ = read_squares(known)
    of = code.coding("grams", len(total), 0, exchange.hidden)
    return PackedWords(of.pack(code.correlations(found[1], total, exchange.hidden))), {}


def _changes(source: Source, exchange: Exchange, blocks: set[int]) -> Made:
    for block, changes in source.learnt(exchange.turn, blocks):
        yield block, _levels(source, exchange, block, changes)


def _levels(source: Source, exchange: Exchange, block: int, changes: dict[str, PackedDelta]) -> Units:
    settings, before, made = source.settings, source.agreed.get(block) or {}, Units()
    for name in list(changes):
        packed = before[name]
        sent = changed_entries(packed.kept, packed.shape[0], exchange.rank)
        of = code.of_linear(exchange, packed.shape, settings.sparsity.of(block, name))
        if sent > of.count - code.DIGITS:
            raise UpdateError(
                f"{source.where(block, name)}: the server has sent {sent} entries to recover, and the target keeps "
                f"{of.count - code.DIGITS}; nothing is sent"
            )
        random = seeds.generator("levels", settings.seed, exchange.turn, settings.client_id, block, name)
        most = code.farthest(packed, settings.recovery)
        numbers = code.levels(changes.pop(name).changes(sent), most, of.count - code.DIGITS, random)
        made[name] = PackedWords(of.pack(numbers)), {}
    return made


_SWEEPS: dict[str, Callable[[Source, Exchange, set[int]], Made]] = {
    "masks": _masks,
    "values": _values,
    SQUARES: _squares,
    "grams": _grams,
    DELTAS: _changes,
}


def hidden_sizes(
    exchange: Exchange, shapes: Mapping[int, Shapes], sparsity: Sparsity, groups: Groups
) -> dict[int, dict[str, int]]:
    """Bytes of each unit of a hidden exchange: block -> linear, or first linear of an input -> bytes.

    Args:
        exchange: the exchange.
        shapes: for each block (O, I) of each linear.
        sparsity: the target of each matrix.
        groups: linears that share an input.
    """
    of_inputs = exchange.up in (SQUARES, "grams")
    return {
        block: {
            name: 8 * code.of_linear(exchange, linears[name], sparsity.of(block, name)).size
            for name in ([names[0] for names in groups[block]] if of_inputs else linears)
        }
        for block, linears in shapes.items()
    }
