"""What travels: pruned matrices as a bit mask and the kept values, in a plain dict of tensors, strings and integers.

One update, up or down, is

    {"format": "fedspallm-update/1", "round": 0,
     "blocks": {"3": {"self_attn.q_proj": {"shape": [O, I], "mask": uint8, "values": float}}}}

An update that goes down may come in several pieces and then says which it is: `"piece": 0, "pieces": 2`.

* `mask` holds one bit an entry in row-major order, least significant bit first, 1 = kept: ceil(O * I / 8) bytes;
* `values` holds the kept entries in the same order, in the dtype of the checkpoint. The mask is shipped, never rebuilt
  from `values != 0`: a kept weight may be exactly zero.

Nothing in it needs pickle: `torch.load(weights_only=True)` takes it, and every communicator carries it unchanged. Whoever
receives one checks it with `check_update` against what was asked for before looking at a value.

Legend: O out features, I in features.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedspallm_appfl.errors import UpdateError
from fedspallm_appfl.sparsity import NM, Target

FORMAT = "fedspallm-update/1"

Packed = dict[str, Any]
Blocks = dict[int, dict[str, Packed]]
Shapes = Mapping[str, tuple[int, int]]


def pack(weight: Tensor, mask: Tensor, dtype: torch.dtype) -> Packed:
    """Pack one matrix.

    Args:
        weight: (O, I) float; entries where `mask` is False are dropped whatever they are.
        mask: (O, I) bool, True = kept.
        dtype: dtype of the values that travel.

    Returns:
        The packed matrix, on the CPU.
    """
    bits = np.packbits(mask.cpu().numpy().reshape(-1), bitorder="little")
    values = weight[mask].to(dtype).cpu()
    return {"shape": list(weight.shape), "mask": torch.from_numpy(bits), "values": values}


def unpack_mask(packed: Packed) -> Tensor:
    """The mask of a packed matrix, (O, I) bool, True = kept."""
    rows, columns = packed["shape"]
    bits = np.unpackbits(packed["mask"].numpy(), count=rows * columns, bitorder="little")
    return torch.from_numpy(bits).view(torch.bool).view(rows, columns)


def unpack(packed: Packed) -> tuple[Tensor, Tensor]:
    """Unpack one matrix.

    Returns:
        (weight (O, I) in the dtype of the values, zero where pruned; mask (O, I) bool, True = kept).
    """
    mask = unpack_mask(packed)
    weight = torch.zeros(mask.shape, dtype=packed["values"].dtype)
    return weight.masked_scatter_(mask, packed["values"]), mask


def nbytes(packed: Packed) -> int:
    """Bytes of the tensors of one packed matrix."""
    return sum(packed[part].numel() * packed[part].element_size() for part in ("mask", "values"))


def packed_size(shape: tuple[int, int], zeros: int, dtype: torch.dtype) -> int:
    """Bytes that a matrix will take once packed, from first principles."""
    entries = shape[0] * shape[1]
    return -(-entries // 8) + (entries - zeros) * dtype.itemsize


def make_update(round_index: int, blocks: Blocks) -> dict[str, Any]:
    """Wrap packed matrices of some blocks for the wire."""
    return {"format": FORMAT, "round": round_index, "blocks": {str(block): dict(m) for block, m in blocks.items()}}


def matrices(update: Mapping[str, Any]) -> Iterator[tuple[int, str, Packed]]:
    """All (block, linear, packed matrix) of an update that was checked."""
    for block, linears in update["blocks"].items():
        for name, packed in linears.items():
            yield int(block), name, packed


def update_nbytes(update: Mapping[str, Any]) -> int:
    """Bytes of all tensors of an update; the dict around them adds less than a kilobyte a matrix."""
    return sum(nbytes(packed) for _, _, packed in matrices(update)) if update else 0


def check_update(
    update: Any,
    sender: str,
    round_index: int,
    blocks: set[int],
    shapes: Mapping[int, Shapes],
    dtype: torch.dtype,
    target: Target,
) -> None:
    """Refuse an update that is not what was asked for.

    Args:
        update: what arrived.
        sender: whom to name in the error.
        round_index: the round that is on.
        blocks: the blocks that the sender may send.
        shapes: for each block the (O, I) of each of its linears.
        dtype: dtype that the values must have.
        target: sparsity that every mask must have.

    Raises:
        UpdateError: the first thing that is wrong, with sender, block and linear.
    """
    _require(isinstance(update, Mapping) and update.get("format") == FORMAT, sender, f"the format must be {FORMAT}")
    _require(set(update) == {"format", "round", "blocks"}, sender, f"the keys are {sorted(map(str, update))}")
    _require(update["round"] == round_index, sender, f"it is for round {update['round']}, this is round {round_index}")
    _require(isinstance(update["blocks"], Mapping), sender, "`blocks` is not a dict")
    for key, linears in update["blocks"].items():
        known = key in {str(block) for block in blocks}
        _require(known, sender, f"block {key!r} was not assigned; assigned were {sorted(blocks)}, as text")
        _require(isinstance(linears, Mapping), sender, f"block {key} is not a dict")
        for name, packed in linears.items():
            where = f"{sender}, block {key}, {name}"
            expected = sorted(shapes[int(key)])
            _require(name in shapes[int(key)], where, f"there is no such linear; there are {expected}")
            _check_matrix(packed, where, shapes[int(key)][name], dtype, target)


def _check_matrix(packed: Any, where: str, shape: tuple[int, int], dtype: torch.dtype, target: Target) -> None:
    complete = isinstance(packed, Mapping) and set(packed) == {"shape", "mask", "values"}
    _require(complete, where, "a matrix has the keys shape, mask, values")
    mask, values = packed["mask"], packed["values"]
    right_shape = type(packed["shape"]) is list and all(type(n) is int for n in packed["shape"])
    right_shape = right_shape and packed["shape"] == list(shape)
    _require(right_shape, where, f"the shape is {packed['shape']}, expected {list(shape)}")
    _require(isinstance(mask, Tensor) and isinstance(values, Tensor), where, "mask and values must be tensors")
    entries = shape[0] * shape[1]
    right_mask = mask.dtype == torch.uint8 and tuple(mask.shape) == (-(-entries // 8),)
    _require(right_mask, where, f"the mask must be uint8 of {-(-entries // 8)} bytes, got {_describe(mask)}")
    right_values = values.dtype == dtype and values.ndim == 1
    _require(right_values, where, f"the values must be one row of {dtype}, got {_describe(values)}")
    bits = np.unpackbits(mask.numpy(), bitorder="little")
    _require(not bits[entries:].any(), where, "bits beyond the last entry of the mask are set")
    kept, expected = int(bits.sum()), entries - target.zeros(entries)
    _require(kept == expected, where, f"the mask keeps {kept} entries, sparsity {target} keeps {expected}")
    if isinstance(target, NM):
        groups = bits[:entries].reshape(-1, target.group).sum(1)
        _require(bool((groups == target.kept).all()), where, f"the mask does not keep {target} in every group")
    _require(kept == len(values), where, f"the mask keeps {kept} entries but there are {len(values)} values")
    _require(bool(values.isfinite().all()), where, "the values hold NaN or infinity")


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"


def _require(condition: bool, where: str, what: str) -> None:
    if not condition:
        raise UpdateError(f"refused an update from {where}: {what}")
