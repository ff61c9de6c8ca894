"""A client's sweep that prunes: run the blocks one by one, and prune those that were assigned (docs/method.md section 1).

For an assigned block one pass collects the statistic of each distinct linear input and, from the second batch on, stops as
soon as the last of them was seen; the linears are pruned; a second pass with the pruned weights gives the next block's
inputs. Other blocks run once. After the last assigned block nothing runs but a batch of it.

How far pruning moves what a block gives costs no pass of its own: the first batch runs to the end of the dense block
anyway, and again through the pruned one.

Legend: O out features, I in features.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedspallm_appfl.devices import give_back
from fedspallm_appfl.errors import PruningError
from fedspallm_appfl.models.blockwise import Activations, advance, output_of
from fedspallm_appfl.models.inputs import SharedInputs, collected
from fedspallm_appfl.models.layout import Linear
from fedspallm_appfl.pruning.pruner import Prepared, by_target
from fedspallm_appfl.pruning.registry import new_statistic, prepare
from fedspallm_appfl.pruning.statistics import Statistic
from fedspallm_appfl.rounds.source import Agreed, Source, check_statistics
from fedspallm_appfl.tensors.sparsity import already_zero
from fedspallm_appfl.tensors.target import Target
from fedspallm_appfl.wire.packed import Unreached

OUTPUT_ERROR = "output_error"  # in the notes of one matrix of a block: of the whole block
SAMPLE = 1024  # tokens that it is measured on, at most

Statistics = Iterator[tuple[list[str], Statistic | None]]  # (linears that share an input, what is known of it)


@dataclass(frozen=True, eq=False)
class PrunedLinear:
    """One pruned matrix.

    Attributes:
        weight: (O, I) in the dtype of the checkpoint, zero where pruned.
        mask: (O, I) bool, True = kept.
        notes: what the report should say about it.
        tokens: those that reached an expert; None for a matrix that all tokens reach.
    """

    weight: Tensor
    mask: Tensor
    notes: dict[str, float]
    tokens: int | None = None


Pruned = Iterator[tuple[int, dict[str, PrunedLinear | Unreached]]]  # (block, linear -> what became of it)


@dataclass(frozen=True)
class _Block:
    """A block that is being pruned."""

    source: Source
    module: nn.Module
    index: int
    masks: Agreed | None
    dense: list[Tensor] = field(default_factory=list)  # (S, H): some of what it gave for the first batch before

    @property
    def linears(self) -> dict[str, Linear]:
        return {linear.name: linear for linear in self.source.model.layout.blocks[self.index]}


def prune_blocks(source: Source, assigned: set[int], masks: Agreed | None = None) -> Pruned:
    """Sweep over the blocks and prune the assigned ones from their dense weights.

    Matrices that the federation already agreed on are used in the forward pass of blocks that are not assigned.

    Args:
        source: the client.
        assigned: blocks to prune.
        masks: packed masks of the assigned blocks that the federation agreed on; None to choose them here.

    Yields:
        (block, linear name -> pruned matrix), as soon as each assigned block is done.

    Raises:
        PruningError: activations that are not finite, an input that was never seen, a factorization that keeps failing, a
            plugin that gives something wrong; names client, block and linear.
        ConfigError: there is no room for a file of hidden states.
    """
    wanted, model = assigned - source.finished, source.model
    if not wanted:
        return
    state, last = source.embedded(), max(wanted)
    for index in range(source.restored(state, min(wanted)), last + 1):
        source.keep(index, state)
        agreed = None if index in assigned else source.agreed.get(index)
        with model.block(index, agreed) as module:
            if index in assigned:
                block, before = _Block(source, module, index, masks), _sample(state.hidden[0])
                done = [_prune_block(block, state)]
            give_back()
            if index < last:
                advance(module, index, state)
            if index in wanted:
                _note_error(block, state, before, done[0], moved=index < last)
                del block, before
        if index in wanted:
            yield index, done.pop()  # a client that stands still here holds no finished block


@torch.no_grad()  # not on the generator: the wrapper would keep what was yielded last
def _prune_block(block: _Block, state: Activations) -> dict[str, PrunedLinear | Unreached]:
    done: dict[str, PrunedLinear | Unreached] = {}
    for names, statistic in collect(block.source, block.module, block.index, state, block.dense):
        done |= _prune_group(block, names, statistic)
        del statistic  # not kept while the next is made
    return {name: done[name] for name in block.linears}


def _prune_group(
    block: _Block, names: list[str], statistic: Statistic | None
) -> Mapping[str, PrunedLinear | Unreached]:
    """Prune linears that share an input, in place; those of an expert if enough tokens reached it."""
    tokens = None if statistic is None else statistic.tokens
    few = tokens is not None and tokens < block.source.settings.min_tokens
    left = [name for name in names if few and block.linears[name].expert]
    done: dict[str, PrunedLinear | Unreached] = {name: Unreached(tokens or 0) for name in left}
    pruned, name = [name for name in names if name not in left], names[0]
    try:
        for settings, alike, known in by_target(block.source.settings, block.index, pruned, statistic):
            prepared = prepare(settings, known)
            for name in alike:
                made = _prune_linear(block, block.linears[name], prepared, settings.own_target)
                done[name] = replace(made, tokens=tokens if block.linears[name].expert else None)
                block.source.model.skeleton.files.release()
    except PruningError as error:
        raise PruningError(f"{block.source.where(block.index, name)}: {error}") from error
    return done


def _prune_linear(block: _Block, linear: Linear, prepared: Prepared, target: Target) -> PrunedLinear:
    model, keep = block.source.model, block.source.settings.prune.keep_zeros
    dense = model.skeleton.dense_weight(block.index, linear).to(model.device).float()  # it travels as it is stored
    zero = already_zero(dense) if keep else None
    if block.masks is None:
        weight, mask = prepared.prune_all(dense, target, zero)
    else:
        mask = (block.masks.get(block.index) or {})[linear.name].unpack_mask().to(model.device)
        weight = prepared.fit_all(dense, mask, zero)
    rounded = model.put(block.module, linear, weight)
    if not bool(rounded.isfinite().all()):
        if not bool(dense.isfinite().all()):
            raise PruningError("its weights in the checkpoint hold NaN or infinity; fetch the model again")
        raise PruningError("pruning gave NaN or infinity; raise `damping`")
    return PrunedLinear(rounded, mask, prepared.notes)


def _sample(hidden: Tensor) -> Tensor:
    """(S, H) float32, some rows of hidden states (B, T, H), from all over them."""
    rows = hidden.flatten(0, -2)
    return rows[:: -(-len(rows) // SAMPLE)].to(torch.float32, copy=True)


@torch.no_grad()
def _note_error(
    block: _Block, state: Activations, before: Tensor, done: dict[str, PrunedLinear | Unreached], moved: bool
) -> None:
    """Note how far pruning has moved what a block gives, as a share of what the dense block adds to what it is given.

    Both are norms over some tokens of the first batch. Nothing is noted where no inputs were needed, or where the server is
    to learn sums only.

    Args:
        block: the pruned block.
        state: activations in front of it, or behind it.
        before: (S, H), those in front of it.
        done: its matrices; the note is added to one of them.
        moved: whether `state` is behind it.
    """
    last = next((name for name, one in reversed(done.items()) if isinstance(one, PrunedLinear)), None)
    if last is None or not block.dense or block.source.settings.secure_sums:
        return
    now = state.hidden[0] if moved else output_of(state.calls[0][block.index](block.module, state.hidden[0]))
    dense = block.dense.pop()
    same = before.shape == dense.shape  # else the block gives something else than it is given
    error = float((_sample(now) - dense).norm() / (dense - before).norm()) if same else math.nan
    if math.isfinite(error):
        made = done[last]
        assert isinstance(made, PrunedLinear)
        done[last] = replace(made, notes=made.notes | {OUTPUT_ERROR: float(f"{error:.6g}")})


def collect(
    source: Source, module: nn.Module, index: int, state: Activations, dense: list[Tensor] | None = None
) -> Statistics:
    """Statistics of the distinct inputs of a block's linears; those of an expert are made when they are asked for.

    `dense` gets some of what the block gives for the first batch, which no other batch need run for.
    """
    linears, settings = source.model.layout.blocks[index], source.settings
    if new_statistic(settings, 1, source.model.device) is None:
        yield [linear.name for linear in linears], None
        return
    new = partial(SharedInputs, linears, partial(new_statistic, settings), kept=source.kept)

    def take(number: int, out: Any) -> None:
        if dense is not None and number == 0 and out is not None:
            dense.append(_sample(output_of(out)))

    inputs = collected(module, index, state, new, take)
    give_back()  # what the forward pass used; the solve allocates other sizes
    found = inputs.groups()
    check_statistics(source, index, found)
    while found:
        yield found.pop(0)  # not kept once it was used: a Gram matrix may be larger than the weight
    for names, statistic in inputs.of_experts(module):
        check_statistics(source, index, [(names, statistic)])
        yield names, statistic
        del statistic
