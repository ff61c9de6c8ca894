"""A client's sweep that sends statistics and prunes nothing: Gram matrices of the inputs of linears.

Either of the dense model in one forward pass, or in a sweep of the model as it is pruned: input by input, or some blocks at
once, where the server's matrices are awaited between two of them. See `algorithms.gram`.

Before any attention an input is a function of single tokens: its Gram matrix is a sum over the vocabulary, and a linear
system gives back how often each token occurs in the text. That is so for the very first input, and where the MLP stands
beside the attention for those of the first MLP. With `gram.first_input: public` a client sends Gram matrices of random
tokens for these.

Legend: T tokens, I in features.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from fedspallm_appfl.algorithms.algorithm import Inputs, parts_of_sweep
from fedspallm_appfl.devices import give_back
from fedspallm_appfl.models.blockwise import Activations, advance, embed
from fedspallm_appfl.models.inputs import PROBE, SharedInputs, collected, inputs_of
from fedspallm_appfl.models.layout import Linear
from fedspallm_appfl.pruning.from_sums import Sums
from fedspallm_appfl.pruning.statistics import InputGram
from fedspallm_appfl.rounds.source import Agreed, Source, check_statistics
from fedspallm_appfl.wire.packed import Unreached

Found = Iterator[tuple[str, Sums | Unreached]]  # first linear of an input, its sums
Gathered = Iterator[tuple[int, Found]]


@dataclass(frozen=True)
class _States:
    """Hidden states in front of a block.

    Attributes:
        pruned: in the model that is pruned so far.
        dense: in the dense model, where its output is the target; else None.
    """

    pruned: Activations
    dense: Activations | None = None


def gathered(source: Source, assigned: set[int], start: Inputs | None = None) -> Gathered:
    """Gram matrices of the inputs of some blocks.

    Args:
        source: the client; its `gram` settings say which model they are of.
        assigned: blocks whose inputs are wanted.
        start: the part that a sweep begins with (see `parts_of_sweep`), where the matrices of all before are agreed on.

    Yields:
        (block, its inputs, each with sums, or that no token reached it); all inputs of a block, in a sweep by input one.
        The inputs have to be taken before the next block is asked for. When a sweep goes on after the last block of a part,
        the matrices of the part are agreed on.

    Raises:
        PruningError: an input holds NaN or infinity, or was never seen.
    """
    if source.settings.gram.propagate == "dense":
        return _dense(source, assigned - source.finished)
    return _swept(source, assigned, start)


def _dense(source: Source, wanted: set[int]) -> Gathered:
    """Of the dense model."""
    if wanted:
        public, state = _public_sums(source, 0 in wanted), source.embedded()
        first = source.restored(state, min(wanted))
        states = [state]
        del state
        yield from _by_block(source, wanted, first, public, states, {}, keep=True)


def _by_block(
    source: Source,
    assigned: set[int],
    first: int,
    public: dict[str, Sums],
    states: list[Activations],
    pruned: Agreed,
    keep: bool = False,
) -> Gathered:
    """In one forward pass.

    Args:
        source: the client.
        assigned: blocks whose inputs are wanted, none before `first`.
        first: the block that the hidden states stand in front of.
        public: sums that take the place of those of the text, in the first block.
        states: the hidden states alone; they are taken, moved on, and let go of with the last block.
        pruned: what of the model is pruned.
        keep: remember hidden states for a later start now and then.
    """
    state, last = states.pop(), max(assigned, default=-1)
    for index in range(first, last + 1):
        if keep:
            source.keep(index, state)
        with source.model.block(index, pruned.get(index)) as block:
            if index in assigned:
                done = [_watched_and_advanced(source, block, index, state, go_on=index < last)]
            else:
                advance(block, index, state)
        if index == last:
            del state  # a sweep stands still after the yield
        give_back()
        if index in assigned:
            yield index, _found(source, index, done.pop(), public if index == 0 else {}, pruned)


def _found(source: Source, index: int, inputs: SharedInputs, public: dict[str, Sums], pruned: Agreed) -> Found:
    """The sums of a block's inputs, of which none is kept that was given."""
    linears = {linear.name: linear for linear in source.model.layout.blocks[index]}
    leader = {name: names[0] for names in source.groups[index] for name in names}
    seen = inputs.groups()
    check_statistics(source, index, seen)
    while seen:
        names, gram = seen.pop(0)
        for name in dict.fromkeys(leader[name] for name in names):
            yield name, public.pop(name) if name in public else _taken(source, linears[name], gram)
        del gram
    if not any(linear.part is not None for linear in linears.values()):
        return
    with source.model.block(index, pruned.get(index)) as block:
        for names, gram in inputs.of_experts(block):
            check_statistics(source, index, [(names, gram)])
            yield names[0], _taken(source, linears[names[0]], gram)
            del gram


def _taken(source: Source, linear: Linear, gram: InputGram) -> Sums | Unreached:
    """What may be sent of an input."""
    if linear.expert and gram.tokens < max(
        source.settings.min_tokens, source.settings.gram.fewest_tokens(linear.shape[1])
    ):
        return Unreached(gram.tokens)
    return Sums(gram.upper, gram.tokens)


def _watched_and_advanced(
    source: Source, block: nn.Module, index: int, state: Activations, go_on: bool
) -> SharedInputs:
    """What went into the linears; if it goes on, the block's outputs take the place of its inputs."""
    new = partial(SharedInputs, source.model.layout.blocks[index], InputGram, kept=source.kept)
    if go_on:
        return collected(block, index, state, new, state.take_output, stop=False)
    return collected(block, index, state, new)


def _swept(source: Source, assigned: set[int], start: Inputs | None) -> Gathered:
    """Part by part of the model that is being pruned."""
    gram = source.settings.gram
    parts = parts_of_sweep(source.groups, gram.stride)
    parts = parts[parts.index(start) if start else 0 :]
    public = _public_sums(source, 0 in assigned and any(index == 0 for index, _ in parts[0]))
    states, at = _States(source.embedded(), source.embedded() if gram.drift else None), 0
    for part in parts:
        first, mine = part[0][0], {index for index, _ in part} & assigned
        if not mine:
            continue
        for index in range(at, first):
            _go_on(source, index, states)
        at = first
        if gram.by_input:
            yield _one_input(source, *part[0], states, public)
        else:
            ahead = [states.pruned if mine == {first} else states.pruned.copy()]  # of one block no output is made
            yield from _by_block(source, mine, first, public, ahead, source.agreed)


def _one_input(source: Source, index: int, name: str, states: _States, public: dict[str, Sums]) -> tuple[int, Found]:
    """Of the block as it is pruned so far."""
    linear = source.model.layout.linear(index, name)
    found = [public.pop(name) if index == 0 and name in public else _sums(source, index, linear, states)]
    give_back()
    return index, iter([(name, found.pop())])


def _public_sums(source: Source, wanted: bool) -> dict[str, Sums]:
    """Sums of random tokens, the same for all clients, for the inputs that single tokens decide.

    As many tokens as the client's. No earlier matrix changes these, so they are made first, and the hidden states need not
    be kept beside the client's.
    """
    if not wanted or source.settings.gram.first_input == "private":
        return {}
    generator = torch.Generator().manual_seed(source.settings.seed)
    drawn = torch.randint(source.model.vocabulary, source.windows.shape, generator=generator)
    state = source.embedded(drawn)
    states = _States(state, state if source.settings.gram.drift else None)
    linears = {linear.name: linear for linear in source.model.layout.blocks[0]}
    made = {name: _sums(source, 0, linears[name], states, fresh=True) for name in _decided_by_single_tokens(source)}
    return {name: sums for name, sums in made.items() if isinstance(sums, Sums)}


@torch.no_grad()
def _decided_by_single_tokens(source: Source) -> list[str]:
    """First linears of the inputs of the first block that no earlier token changes."""
    model = source.model
    windows = torch.arange(2 * PROBE).view(2, PROBE) % model.vocabulary
    windows[:, -1] = 0  # the same last token after others
    state, found = embed(model, windows, 2), []
    for names in source.groups[0]:
        linear = next(linear for linear in model.layout.blocks[0] if linear.name == names[0])
        with model.block(0) as block:
            inputs = inputs_of(block, linear, state, 0, 0, state.hidden[0])
        if len(inputs) == windows.numel():  # an expert sees some tokens only, and comes after the attention
            first, second = inputs.view(2, PROBE, -1)[:, -1]
            if torch.allclose(first, second, rtol=1e-3, atol=1e-4 * float(inputs.abs().max())):
                found.append(names[0])
    return found


def _go_on(source: Source, index: int, states: _States) -> None:
    with source.model.block(index, source.agreed.get(index)) as block:
        advance(block, index, states.pruned)
    if states.dense is not None:
        with source.model.block(index) as block:
            advance(block, index, states.dense)


@torch.no_grad()
def _sums(source: Source, index: int, linear: Linear, states: _States, fresh: bool = False) -> Sums | Unreached:
    """Sums of one input; `fresh` of a model in which nothing is pruned."""
    model, features = source.model, linear.shape[1]
    gram = InputGram(features, model.device)
    drift = None if states.dense is None else torch.zeros(features, features, device=model.device)
    twin = _copy_of(source, index) if states.dense is not None else None
    with model.block(index, None if fresh else source.agreed.get(index)) as block:
        for number, hidden in enumerate(states.pruned.hidden):
            inputs = inputs_of(block, linear, states.pruned, number, index, hidden)
            gram.add(inputs)
            if drift is not None and states.dense is not None and twin is not None:
                before = inputs_of(twin, linear, states.dense, number, index, states.dense.hidden[number])
                drift.addmm_((before - inputs).T, inputs)
    taken = _taken(source, linear, gram)
    if isinstance(taken, Unreached):
        return taken
    check_statistics(source, index, [([linear.name], gram)])
    return replace(taken, drift=drift)


def _copy_of(source: Source, index: int) -> nn.Module:
    """The dense block, to be run beside the pruned one."""
    with source.model.block(index) as block:
        return copy.deepcopy(block)
