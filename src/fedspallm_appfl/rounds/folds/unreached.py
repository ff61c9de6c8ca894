"""Experts of which no client knows enough.

Legend: O out features, I in features.
"""

import torch
from torch import Tensor

from fedspallm_appfl.pruning import magnitude
from fedspallm_appfl.rounds.folds.context import Context
from fedspallm_appfl.tensors.target import Target
from fedspallm_appfl.wire.packed import Packed, pack
from fedspallm_appfl.wire.store import PackedStore

TOKENS_A_UNIT = 64  # of a client's weight in the mean of an expert's matrix: sums have a range


def expert_weight(tokens: int) -> int:
    """The weight of a client in the mean of an expert's matrix, by the tokens that reached it there."""
    return -(-tokens // TOKENS_A_UNIT)


def without_clients(context: Context, store: str, block: int, name: str) -> Packed:
    """An expert's matrix that no client sent: as an earlier round left it, else pruned by magnitude or dense.

    Args:
        context: what folds share.
        store: whose matrix.
        block: its block.
        name: its linear.
    """
    before = PackedStore(context.folder / store).get(block, name) or {}
    if name in before:
        return before[name]
    weight, settings = context.dense_float(block, name), context.settings
    return unseen(weight, context.target(block, name), settings.unreached == "dense", context.dtype)


def unseen(weight: Tensor, target: Target, dense: bool, dtype: torch.dtype) -> Packed:
    """An expert's matrix of whose inputs nobody knows enough.

    Args:
        weight: (O, I) float32, of the dense model.
        target: ratio or n:m.
        dense: it stays as it is; else its smallest weights go.
        dtype: dtype of the checkpoint.
    """
    if dense:
        return pack(weight, torch.ones_like(weight, dtype=torch.bool), dtype)
    return pack(*magnitude.prune(weight, target), dtype)
