"""A client's sweep that sends statistics and prunes nothing: Gram matrices of the inputs of linears.

Either of the dense model in one forward pass, or of the model as it is pruned block by block and input by input, where the
server's matrices are awaited between two inputs. See `algorithms.gram`.

Before any attention an input is a function of single tokens: its Gram matrix is a sum over the vocabulary, and a linear
system gives back how often each token occurs in the text. That is so for the very first input, and where the MLP stands
beside the attention for those of the first MLP. With `gram.first_input: public` a client sends Gram matrices of random
tokens for these.

Legend: T tokens, I in features.
"""

import copy
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import nn

from fedspallm_appfl.devices import give_back
from fedspallm_appfl.models.blockwise import Activations, Stop, advance, embed
from fedspallm_appfl.models.inputs import PROBE, SharedInputs, inputs_of
from fedspallm_appfl.models.layout import Linear
from fedspallm_appfl.pruning.from_sums import Sums
from fedspallm_appfl.pruning.statistics import InputGram
from fedspallm_appfl.rounds.source import Source, check_statistics
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


def gathered(source: Source, assigned: set[int], start: tuple[int, str] | None = None) -> Gathered:
    """Gram matrices of the inputs of some blocks.

    Args:
        source: the client; its `gram` settings say which model they are of.
        assigned: blocks whose inputs are wanted.
        start: (block, first linear) of the input that a sweep begins with, where those of all earlier ones are agreed on.

    Yields:
        (block, its inputs, each with sums, or that no token reached it); of the dense model all inputs of a block, in a
        sweep one by one. The inputs have to be taken before the next block is asked for. When a sweep goes on after a
        yield, the matrices of the input that it gave are agreed on.

    Raises:
        PruningError: an input holds NaN or infinity, or was never seen.
    """
    if source.settings.gram.propagate == "dense":
        return _dense(source, assigned)
    return _swept(source, assigned, start)


def _dense(source: Source, assigned: set[int]) -> Gathered:
    """In one forward pass of the dense model."""
    public, state = _public_sums(source, 0 in assigned), source.embedded()
    last = max(assigned, default=-1)
    for index in range(last + 1):
        with source.model.block(index) as block:
            if index in assigned:
                done = [_watched_and_advanced(source, block, index, state, go_on=index < last)]
            else:
                advance(block, index, state)
        give_back()
        if index in assigned:
            yield index, _found(source, index, done.pop(), public if index == 0 else {})


def _found(source: Source, index: int, inputs: SharedInputs, public: dict[str, Sums]) -> Found:
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
    with source.model.block(index) as block:
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


@torch.no_grad()
def _watched_and_advanced(
    source: Source, block: nn.Module, index: int, state: Activations, go_on: bool
) -> SharedInputs:
    """What went into the linears; the block's outputs take the place of its inputs."""
    model = source.model
    inputs = SharedInputs(
        model.layout.blocks[index], lambda linear: InputGram(linear.shape[1], model.device), source.kept
    )
    with inputs.watched(block):
        for number, hidden in enumerate(state.hidden):
            with suppress(Stop):
                state.take_output(number, state.calls[number][index](block, hidden))
            inputs.end_of_batch(stop=not go_on)
    return inputs


def _swept(source: Source, assigned: set[int], start: tuple[int, str] | None) -> Gathered:
    """Input by input of the model that is being pruned."""
    last = max(assigned, default=-1)
    order = [(index, names[0]) for index, inputs in enumerate(source.groups) for names in inputs]
    done = set(order[: order.index(start)]) if start else set()
    public = _public_sums(source, 0 in assigned and (start is None or start[0] == 0))
    states = _States(source.embedded(), source.embedded() if source.settings.gram.drift else None)
    for index in range(last + 1):
        linears = {linear.name: linear for linear in source.model.layout.blocks[index]}
        for names in source.groups[index] if index in assigned else ():
            if (index, names[0]) in done:
                continue
            if index == 0 and names[0] in public:
                found: list[Sums | Unreached] = [public.pop(names[0])]
            else:
                found = [_sums(source, index, linears[names[0]], states)]
            give_back()
            yield index, iter([(names[0], found.pop())])
        if index < last:
            _go_on(source, index, states)


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
