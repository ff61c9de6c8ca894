"""The sweep of a client that sends only statistics: Gram matrices of the inputs of linears.

Statistics are of the dense model in one forward pass, or of the model while it is pruned input by input. In that case the
sweep waits for the server's matrices between two inputs. See `algorithms.gram`.

Before any attention an input is a function of single tokens. Its Gram matrix is a sum over the vocabulary, and a
linear system recovers how often each token occurs in the text. This holds for the first input and, if the MLP
is parallel to the attention, for those of the first MLP. A client may send Gram matrices of random tokens instead
(`public_first`).

Legend: T tokens, I in features.
"""

import copy
from collections.abc import Iterator
from contextlib import suppress

import torch
from torch import Tensor, nn

from fedspallm_appfl.algorithms.exchange import Groups
from fedspallm_appfl.algorithms.gram import Sums
from fedspallm_appfl.heap import give_back
from fedspallm_appfl.models.blockwise import Activations, Agreed, SharedInputs, Stop, advance, check_statistic, embed
from fedspallm_appfl.models.layout import Linear
from fedspallm_appfl.models.lazy_model import LazyModel
from fedspallm_appfl.pruning.statistics import InputGram, InputNorms

PROBE = 8  # tokens of the pass that finds linears with a shared input


@torch.no_grad()
def shared_inputs(model: LazyModel) -> Groups:
    """Find linears of each block with the same input, by a pass of a few tokens through one block of each kind.

    Server and clients get the same answer without communication, because they hold the same model.

    Returns:
        For each block its inputs in the order of the forward pass, each as the names of its linears.
    """
    windows = torch.arange(PROBE).unsqueeze(0) % model.skeleton.vocabulary
    state, found, kinds = embed(model, windows, 1), [], {}
    for index, linears in enumerate(model.layout.blocks):
        kind = type(model.blocks[index]), linears
        if kind not in kinds:
            inputs = SharedInputs(linears, lambda linear: InputNorms(linear.shape[1], model.device))
            with model.block(index) as block, inputs.watched(block), suppress(Stop):
                state.calls[0][index](block, state.hidden[0])
            kinds[kind] = tuple(tuple(names) for names, _ in inputs.groups())
        found.append(kinds[kind])
    return tuple(found)


def dense_grams(
    model: LazyModel,
    windows: Tensor,
    assigned: set[int],
    groups: Groups,
    *,
    public_first: int | None = None,
    batch: int = 1,
    client: str = "local",
    activations: str = "memory",
) -> Iterator[tuple[int, dict[str, Sums]]]:
    """Gram matrices of the dense model, in one forward pass.

    Args:
        model: the dense model.
        windows: (n, T) int64 calibration tokens.
        assigned: blocks whose inputs are wanted.
        groups: as `shared_inputs` finds them.
        public_first: seed of random tokens, as many as the client's, for inputs that single tokens decide; None for the
            client's own.
        batch: windows in a batch.
        client: whom to name in errors.
        activations: where hidden states between blocks are kept.

    Yields:
        (block, first linear of each input -> its Gram matrix).

    Raises:
        PruningError: an input holds NaN or infinity, or was never seen.
    """
    public = _public_sums(
        model, windows, groups, public_first if 0 in assigned else None, False, batch, activations, client
    )
    state = embed(model, windows, batch, activations, client)
    last = max(assigned, default=-1)
    for index in range(last + 1):
        with model.block(index) as block:
            if index in assigned:
                done = [_grams_and_advance(model, block, index, state, go_on=index < last)]
            else:
                advance(block, index, state)
        give_back()
        if index in assigned:
            grams = done.pop()
            leaders = [names[0] for names in groups[index]]
            for name in leaders:
                check_statistic(grams[name], f"client {client}, block {index}, {name}")
            found = {name: Sums(grams[name].upper, grams[name].tokens) for name in leaders}
            if index == 0:
                found |= public
                public.clear()
            yield index, found
            del grams, found


@torch.no_grad()
def _grams_and_advance(
    model: LazyModel, block: nn.Module, index: int, state: Activations, go_on: bool
) -> dict[str, InputGram]:
    """Gram matrix of every linear's input; replaces the block's inputs by its outputs."""
    inputs = SharedInputs(model.layout.blocks[index], lambda linear: InputGram(linear.shape[1], model.device))
    with inputs.watched(block):
        for number, hidden in enumerate(state.hidden):
            with suppress(Stop):
                state.take_output(number, state.calls[number][index](block, hidden))
            inputs.end_of_batch(stop=not go_on)
    return {name: gram for names, gram in inputs.groups() for name in names}


def swept_grams(
    model: LazyModel,
    windows: Tensor,
    assigned: set[int],
    groups: Groups,
    agreed: Agreed,
    *,
    start: tuple[int, str] | None = None,
    dense_target: bool = False,
    public_first: int | None = None,
    batch: int = 1,
    client: str = "local",
    activations: str = "memory",
) -> Iterator[tuple[int, dict[str, Sums]]]:
    """Gram matrices of the model while it is being pruned, input by input.

    Args:
        model: the dense model.
        windows: (n, T) int64 calibration tokens.
        assigned: blocks whose inputs are wanted.
        groups: as `shared_inputs` finds them.
        public_first: seed of random tokens, as many as the client's, for inputs that single tokens decide; None for the
            client's own.
        agreed: the matrices pruned so far; after a yield it must hold those of the yielded input.
        start: (block, first linear) of the first input; the matrices of all earlier inputs are agreed on.
        dense_target: also keep the dense model's hidden states, and yield the drift from them.
        batch: windows in a batch.
        client: whom to name in errors.
        activations: where hidden states between blocks are kept.

    Yields:
        (block, {first linear of one input: its sums}).

    Raises:
        PruningError: an input holds NaN or infinity, or was never seen.
    """
    last = max(assigned, default=-1)
    order = [(index, names[0]) for index, inputs in enumerate(groups) for names in inputs]
    done = set(order[: order.index(start)]) if start else set()
    seed = public_first if 0 in assigned and (start is None or start[0] == 0) else None
    public = _public_sums(model, windows, groups, seed, dense_target, batch, activations, client)
    state = embed(model, windows, batch, activations, client)
    dense = embed(model, windows, batch, activations, client) if dense_target else None
    for index in range(last + 1):
        linears = {linear.name: linear for linear in model.layout.blocks[index]}
        for names in groups[index] if index in assigned else ():
            if (index, names[0]) in done:
                continue
            if index == 0 and names[0] in public:
                found = [public.pop(names[0])]
            else:
                found = [_sums(model, index, linears[names[0]], state, dense, agreed, client)]
            give_back()
            yield index, {names[0]: found.pop()}
        if index < last:
            _go_on(model, index, state, dense, agreed)


def _public_sums(
    model: LazyModel,
    windows: Tensor,
    groups: Groups,
    seed: int | None,
    drift: bool,
    batch: int,
    activations: str,
    client: str,
) -> dict[str, Sums]:
    """Sums of random tokens, the same for all clients, for inputs that depend on single tokens.

    No earlier matrix changes these. They are made first, so their hidden states need not be kept next to the client's.
    """
    if seed is None:
        return {}
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(model.skeleton.vocabulary, windows.shape, generator=generator)
    state = embed(model, drawn, batch, activations, client)
    linears = {linear.name: linear for linear in model.layout.blocks[0]}
    names = _decided_by_single_tokens(model, groups)
    return {name: _sums(model, 0, linears[name], state, state if drift else None, {}, client) for name in names}


@torch.no_grad()
def _decided_by_single_tokens(model: LazyModel, groups: Groups) -> list[str]:
    """First linears of the inputs of the first block that do not depend on earlier tokens."""
    windows = torch.arange(2 * PROBE).view(2, PROBE) % model.skeleton.vocabulary
    windows[:, -1] = 0  # the same last token after different tokens
    state, found = embed(model, windows, 2), []
    for names in groups[0]:
        linear = next(linear for linear in model.layout.blocks[0] if linear.name == names[0])
        with model.block(0) as block:
            inputs = _input(block, linear, state, 0, 0, state.hidden[0])
        if len(inputs) == windows.numel():  # an expert sees only some tokens and comes after the attention
            first, second = inputs.view(2, PROBE, -1)[:, -1]
            if torch.allclose(first, second, rtol=1e-3, atol=1e-4 * float(inputs.abs().max())):
                found.append(names[0])
    return found


def _go_on(model: LazyModel, index: int, state: Activations, dense: Activations | None, agreed: Agreed) -> None:
    with model.block(index, agreed.get(index)) as block:
        advance(block, index, state)
    if dense is not None:
        with model.block(index) as block:
            advance(block, index, dense)


@torch.no_grad()
def _sums(
    model: LazyModel,
    index: int,
    linear: Linear,
    state: Activations,
    dense: Activations | None,
    agreed: Agreed,
    client: str,
) -> Sums:
    gram, features = InputGram(linear.shape[1], model.device), linear.shape[1]
    drift = None if dense is None else torch.zeros(features, features, device=model.device)
    twin = None
    if dense is not None:
        with model.block(index) as block:
            twin = copy.deepcopy(block)
    with model.block(index, agreed.get(index)) as block:
        for number, hidden in enumerate(state.hidden):
            inputs = _input(block, linear, state, number, index, hidden)
            gram.add(inputs)
            if drift is not None and dense is not None and twin is not None:
                before = _input(twin, linear, dense, number, index, dense.hidden[number])
                drift.addmm_((before - inputs).T, inputs)
    check_statistic(gram, f"client {client}, block {index}, {linear.name}")
    return Sums(gram.upper, gram.tokens, drift)


def _input(block: nn.Module, linear: Linear, state: Activations, number: int, index: int, hidden: Tensor) -> Tensor:
    """The input of a linear for one batch at its first call, (tokens, I) float32; the pass ends there."""
    seen: list[Tensor] = []

    def take(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].reshape(-1, args[0].shape[-1]).float())
        raise Stop

    hook = block.get_submodule(linear.name).register_forward_pre_hook(take)
    with suppress(Stop):
        state.calls[number][index](block, hidden)
    hook.remove()
    return seen[0] if seen else hidden.new_zeros(0, linear.shape[1], dtype=torch.float32)
