"""A client's sweep that prunes: run the blocks one by one, and prune those that were assigned (docs/method.md section 1).

For an assigned block one pass collects the statistic of each distinct linear input and, from the second batch on, stops as
soon as the last of them was seen; the linears are pruned; a second pass with the pruned weights gives the next block's
inputs. Other blocks run once. Nothing runs after the last assigned block.

Legend: O out features, I in features.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedspallm_appfl.devices import give_back
from fedspallm_appfl.errors import PruningError
from fedspallm_appfl.models.blockwise import Activations, Stop, advance
from fedspallm_appfl.models.inputs import SharedInputs
from fedspallm_appfl.models.layout import Linear
from fedspallm_appfl.pruning.pruner import Prepared, by_target
from fedspallm_appfl.pruning.registry import new_statistic, prepare
from fedspallm_appfl.pruning.statistics import Statistic
from fedspallm_appfl.rounds.source import Agreed, Source, check_statistics
from fedspallm_appfl.tensors.sparsity import already_zero
from fedspallm_appfl.tensors.target import Target
from fedspallm_appfl.wire.packed import Unreached

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
                done = [_prune_block(_Block(source, module, index, masks), state)]
            give_back()
            if index < last:
                advance(module, index, state)
        if index in wanted:
            yield index, done.pop()  # a client that stands still here holds no finished block


@torch.no_grad()  # not on the generator: the wrapper would keep what was yielded last
def _prune_block(block: _Block, state: Activations) -> dict[str, PrunedLinear | Unreached]:
    done: dict[str, PrunedLinear | Unreached] = {}
    for names, statistic in collect(block.source, block.module, block.index, state):
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
    if not bool(weight.isfinite().all()):
        if not bool(dense.isfinite().all()):
            raise PruningError("its weights in the checkpoint hold NaN or infinity; fetch the model again")
        raise PruningError("pruning gave NaN or infinity; lower `damping`")
    return PrunedLinear(model.put(block.module, linear, weight), mask, prepared.notes)


def collect(source: Source, module: nn.Module, index: int, state: Activations) -> Statistics:
    """Statistics of the distinct inputs of a block's linears; those of an expert are made when they are asked for."""
    linears, settings, device = source.model.layout.blocks[index], source.settings, source.model.device
    if new_statistic(settings, 1, device) is None:
        yield [linear.name for linear in linears], None
        return
    inputs = SharedInputs(linears, lambda linear: new_statistic(settings, linear.shape[1], device), source.kept)
    with inputs.watched(module):
        for number, hidden in enumerate(state.hidden):
            with suppress(Stop):
                state.calls[number][index](module, hidden)
            inputs.end_of_batch()
    give_back()  # what the forward pass used; the solve allocates other sizes
    found = inputs.groups()
    check_statistics(source, index, found)
    while found:
        yield found.pop(0)  # not kept once it was used: a Gram matrix may be larger than the weight
    for names, statistic in inputs.of_experts(module):
        check_statistics(source, index, [(names, statistic)])
        yield names, statistic
        del statistic
