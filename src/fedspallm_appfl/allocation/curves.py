"""What the outputs of each matrix lose when it is pruned, at a few levels.

One pass of the dense model over the windows: at each block the Gram matrices of its inputs are collected, and each matrix
is pruned with SparseGPT to each level. Of a matrix that loses E = W - W', a row loses `e_o G e_o^T / tokens`: the mean
square of what its output changes by, over all tokens, whether they reach it or not. Only these numbers stay, and the
hidden states in front of each block, for `fisher`.

Legend: O out features, I in features, B windows in a batch, T tokens in a window, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import torch
from torch import Tensor

from fedspallm_appfl.errors import ModelError, PruningError
from fedspallm_appfl.models.blockwise import Activations, embed
from fedspallm_appfl.models.inputs import SharedInputs, check_statistic, collected
from fedspallm_appfl.models.layout import Layout
from fedspallm_appfl.models.lazy_model import LazyModel
from fedspallm_appfl.pruning import sparsegpt
from fedspallm_appfl.pruning.statistics import InputGram
from fedspallm_appfl.settings.schema import Pruning
from fedspallm_appfl.tensors.target import Ratio

Key = tuple[int, str]  # block, linear


@dataclass(frozen=True)
class Lost:
    """What a matrix loses.

    Attributes:
        entries: O * I.
        rows: (levels, O) float64, mean square of the change of each output.
    """

    entries: int
    rows: Tensor


@dataclass(frozen=True)
class Pass:
    """What the forward pass leaves.

    Attributes:
        lost: what each matrix loses.
        state: the arguments of all blocks; its hidden states are those behind the last one.
        before: per block, per batch, the hidden states in front of it, (B, T, H) on the CPU.
    """

    lost: dict[Key, Lost]
    state: Activations
    before: list[list[Tensor]]


def look(model: LazyModel, windows: Tensor, levels: Sequence[Fraction], settings: Pruning, batch: int = 1) -> Pass:
    """Run the dense model over windows and prune each matrix on the way, without changing it.

    Args:
        model: the dense model.
        windows: (n, T) int64 token ids.
        levels: shares that are pruned.
        settings: damping and its retries.
        batch: windows in a batch.

    Raises:
        ModelError: experts of the model lie in one tensor.
        PruningError: inputs are not finite, or a factorization keeps failing.
    """
    if refused := unseen_experts(model.layout):
        raise ModelError(f"allocation.method: {refused}")
    state, made = embed(model, windows, batch), Pass({}, Activations([]), [])
    for index, linears in enumerate(model.layout.blocks):
        made.before.append([hidden.cpu() for hidden in state.hidden])
        new = partial(SharedInputs, linears, InputGram)
        with model.block(index) as block:
            for names, gram in collected(block, index, state, new, state.take_output, stop=False).groups():
                made.lost.update(_lost(model, index, names, gram, levels, settings, windows.numel()))
                del gram  # not kept while the next is used
    return Pass(made.lost, state, made.before)


def unseen_experts(layout: Layout) -> str | None:
    """Why targets cannot be chosen for a model, or None."""
    for index, linears in enumerate(layout.blocks):
        for linear in linears:
            if linear.part is not None:
                return (
                    f"block {index} holds its experts in one tensor, {linear.parameter}, so that gradients of single "
                    "experts are not seen; take uniform, or leave experts dense with prune.ignore"
                )
    return None


@torch.no_grad()
def _lost(
    model: LazyModel,
    index: int,
    names: list[str],
    gram: InputGram,
    levels: Sequence[Fraction],
    settings: Pruning,
    tokens: int,
) -> dict[Key, Lost]:
    """What linears that share an input lose; uses the Gram matrix up."""
    where = f"allocation, block {index}, {names[0]}"
    if gram.tokens or not model.layout.linear(index, names[0]).expert:
        check_statistic(gram, where, model.skeleton, index)
    full = gram.matrix()
    try:
        factor = sparsegpt.Factor(gram, settings.damping, settings.damping_retries)
    except PruningError as error:
        raise PruningError(f"{where}: {error}") from error
    found = {}
    for name in names:
        dense = model.skeleton.dense_matrix(index, name).to(model.device, torch.float32)
        rows = [_row_losses(dense, Ratio(level), factor, full) / tokens for level in levels]
        found[index, name] = Lost(dense.numel(), torch.stack(rows))
        model.skeleton.files.release()
    return found


def _row_losses(dense: Tensor, level: Ratio, factor: sparsegpt.Factor, gram: Tensor) -> Tensor:
    """(O,) float64, `e_o G e_o^T`."""
    error = dense - sparsegpt.prune(dense, level, factor)[0]
    return ((error @ gram) * error).sum(1, dtype=torch.float64).cpu()
