"""A client's sweep that prunes: run the blocks one by one, and prune those that were assigned (docs/method.md section 1).

For an assigned block one pass collects the statistic of each distinct linear input and, from the second batch on, stops as
soon as the last of them was seen; the linears are pruned; a second pass with the pruned weights gives the next block's
inputs. Other blocks run once. Nothing runs after the last assigned block.

Legend: O out features, I in features.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedspallm_appfl.devices import give_back
from fedspallm_appfl.errors import PruningError
from fedspallm_appfl.models.blockwise import Activations, Stop, advance
from fedspallm_appfl.models.inputs import SharedInputs, check_statistic
from fedspallm_appfl.models.layout import Linear
from fedspallm_appfl.pruning.pruner import Prepared, by_target
from fedspallm_appfl.pruning.registry import new_statistic, prepare
from fedspallm_appfl.pruning.statistics import Statistic
from fedspallm_appfl.rounds.source import Agreed, Source
from fedspallm_appfl.tensors.sparsity import already_zero
from fedspallm_appfl.tensors.target import Target

Statistics = list[tuple[list[str], Statistic | None]]  # (linears that share an input, what is known of it)


@dataclass(frozen=True, eq=False)
class PrunedLinear:
    """One pruned matrix.

    Attributes:
        weight: (O, I) in the dtype of the checkpoint, zero where pruned.
        mask: (O, I) bool, True = kept.
        notes: what the report should say about it.
    """

    weight: Tensor
    mask: Tensor
    notes: dict[str, float]


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


def prune_blocks(
    source: Source, assigned: set[int], masks: Agreed | None = None
) -> Iterator[tuple[int, dict[str, PrunedLinear]]]:
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
    state, model = source.embedded(), source.model
    last = max(assigned, default=-1)
    for index in range(last + 1):
        agreed = None if index in assigned else source.agreed.get(index)
        with model.block(index, agreed) as module:
            if index in assigned:
                done = [_prune_block(_Block(source, module, index, masks), state)]
            give_back()
            if index < last:
                advance(module, index, state)
        if index in assigned:
            yield index, done.pop()  # a client that stands still here holds no finished block


@torch.no_grad()  # not on the generator: the wrapper would keep what was yielded last
def _prune_block(block: _Block, state: Activations) -> dict[str, PrunedLinear]:
    done: dict[str, PrunedLinear] = {}
    statistics = collect(block.source, block.module, block.index, state)
    give_back()  # what the forward pass used; the solve allocates other sizes
    for names, statistic in statistics:
        if statistic is not None:
            check_statistic(statistic, block.source.where(block.index, names[0]))
    while statistics:
        names, statistic = statistics.pop(0)  # not kept once it was used: a Gram matrix may be larger than the weight
        done |= _prune_group(block, names, statistic)
    return {name: done[name] for name in block.linears}


def _prune_group(block: _Block, names: list[str], statistic: Statistic | None) -> dict[str, PrunedLinear]:
    """Prune linears that share an input, in place."""
    done, name = {}, names[0]
    try:
        for settings, alike, known in by_target(block.source.settings, block.index, names, statistic):
            prepared = prepare(settings, known)
            for name in alike:
                done[name] = _prune_linear(block, block.linears[name], prepared, settings.own_target)
                block.source.model.skeleton.files.release()
    except PruningError as error:
        raise PruningError(f"{block.source.where(block.index, name)}: {error}") from error
    return done


def _prune_linear(block: _Block, linear: Linear, prepared: Prepared, target: Target) -> PrunedLinear:
    model, keep = block.source.model, block.source.settings.prune.keep_zeros
    dense = model.skeleton.dense_weight(block.index, linear).to(model.device, torch.float32)
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
    """Statistics of the distinct inputs of a block's linears."""
    linears, model, settings = source.model.layout.blocks[index], source.model, source.settings
    if new_statistic(settings, 1, model.device) is None:
        return [([linear.name for linear in linears], None)]
    inputs = SharedInputs(linears, lambda linear: new_statistic(settings, linear.shape[1], model.device))
    with inputs.watched(module):
        for number, hidden in enumerate(state.hidden):
            with suppress(Stop):
                state.calls[number][index](module, hidden)
            inputs.end_of_batch()
    return inputs.groups()
