"""The message format: pruned matrices as a bit mask and the kept values, in a plain dict of tensors, strings and integers.

One update, up or down, is

    {"format": "fedspallm-update/2", "round": 0, "exchange": 0,
     "blocks": {"3": {"self_attn.q_proj": {"shape": [O, I], "mask": uint8, "values": float}}}}

An update from the server may have several pieces, which are numbered: `"piece": 0, "pieces": 2`.

* `mask` holds one bit per entry in row-major order, least significant bit first, 1 = kept: ceil(O * I / 8) bytes;
* `values` holds the kept entries in the same order, in the dtype of the checkpoint. The mask is sent, never rebuilt
  from `values != 0`: a kept weight may be exactly zero. A client whose pruner does not change kept weights sends no
  values: the server takes them from its own copy of the dense model. Under a mask agreed on before, values come
  without one;
* for statistics of an input see `grams`, for compression `compression`.

It needs no pickle: `torch.load(weights_only=True)` reads it, and every communicator carries it unchanged. The
receiver checks it with `check_update` before it uses a value.

Legend: O out features, I in features.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fedspallm_appfl.aggregation.l0_mean import largest_magnitude
from fedspallm_appfl.tensors import bitmask
from fedspallm_appfl.tensors.sparsity import NM, Target
from fedspallm_appfl.wire.compression import Packed, deflated, inflated, is_plain, require

FORMAT = "fedspallm-update/2"

Blocks = dict[int, dict[str, Packed]]
Shapes = Mapping[str, tuple[int, int]]
Check = Callable[[Any, str], Packed]  # the received unit, and the place to name in errors -> the unit, uncompressed


def pack(weight: Tensor, mask: Tensor, dtype: torch.dtype) -> Packed:
    """Pack one matrix.

    Args:
        weight: (O, I) float; entries where `mask` is False are dropped.
        mask: (O, I) bool, True = kept.
        dtype: dtype of the values that are sent.

    Returns:
        The packed matrix, on the CPU.
    """
    bits = bitmask.to_bits(mask)
    values = bitmask.gather(weight.to(dtype).contiguous(), bits)
    return {"shape": list(weight.shape), "mask": bits.cpu(), "values": values.cpu()}


def pack_mask(mask: Tensor) -> Packed:
    """Pack the mask (O, I) of a matrix whose kept weights are those of the dense model."""
    return {"shape": list(mask.shape), "mask": bitmask.to_bits(mask).cpu()}


def with_values(packed: Packed, dense: Tensor) -> Packed:
    """A packed mask with its values, taken from the dense matrix (O, I)."""
    return {**packed, "values": bitmask.gather(dense.contiguous(), packed["mask"])}


def unpack_mask(packed: Packed) -> Tensor:
    """The mask of a packed matrix, (O, I) bool, True = kept."""
    return bitmask.from_bits(packed["mask"], tuple(packed["shape"]))


def unpack(packed: Packed) -> tuple[Tensor, Tensor]:
    """Unpack one matrix.

    Returns:
        (weight (O, I) in the dtype of the values, zero where pruned; mask (O, I) bool, True = kept).
    """
    return unpack_weight(packed), unpack_mask(packed)


def unpack_weight(packed: Packed, device: torch.device | str = "cpu", out: Tensor | None = None) -> Tensor:
    """The weight of a packed matrix.

    Args:
        packed: the matrix.
        device: where to unpack it.
        out: (O, I) contiguous, on the device and in the dtype of the values, where to write; None makes a new tensor.

    Returns:
        (O, I) in the dtype of the values, zero where pruned.
    """
    rows, columns = packed["shape"]
    return bitmask.scatter(packed["values"].to(device), packed["mask"].to(device), (rows, columns), out)


def pack_values(weight: Tensor, bits: Tensor, dtype: torch.dtype) -> Packed:
    """Pack the kept entries of a matrix (O, I) whose mask, (ceil(O * I / 8),) uint8, both sides have."""
    values = bitmask.gather(weight.to(dtype).contiguous(), bits.to(weight.device))
    return {"shape": list(weight.shape), "values": values.cpu()}


def nbytes(packed: Packed) -> int:
    """Bytes of the tensors of one packed object in its current form, compressed or not."""
    return sum(part.numel() * part.element_size() for part in packed.values() if isinstance(part, Tensor))


def packed_size(shape: tuple[int, int], zeros: int, dtype: torch.dtype) -> int:
    """Bytes that a matrix will take once packed, from first principles."""
    entries = shape[0] * shape[1]
    return -(-entries // 8) + (entries - zeros) * dtype.itemsize


def packed_sizes(shapes: Shapes, target: Target, dtype: torch.dtype, parts: str = "weights") -> dict[str, int]:
    """Bytes of each matrix of a block once packed: its mask and `values` (`weights`), or one of the two."""
    entries = {name: rows * columns for name, (rows, columns) in shapes.items()}
    masks = {name: packed_size(shapes[name], count, dtype) for name, count in entries.items()}
    whole = {name: packed_size(shapes[name], target.zeros(count), dtype) for name, count in entries.items()}
    values = {name: whole[name] - masks[name] for name in shapes}
    return {"weights": whole, "masks": masks, "values": values}[parts]


def compress(update: Mapping[str, Any]) -> dict[str, Any]:
    """The same update, with every part that gets smaller as a zstandard frame."""
    blocks = {
        block: {name: deflated(packed) for name, packed in linears.items()}
        for block, linears in update["blocks"].items()
    }
    return {**update, "blocks": blocks}


def decompress(update: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Undo `compress` for matrices; `dtype` is that of the values. `check_update` does it for uploads.

    Raises:
        UpdateError: a part is not a frame of the right size.
    """
    blocks = {
        block: {name: _plain(packed, f"block {block}, {name}", dtype) for name, packed in linears.items()}
        for block, linears in update["blocks"].items()
    }
    return {**update, "blocks": blocks}


def _plain(packed: Packed, where: str, dtype: torch.dtype) -> Packed:
    mask = _plain_mask(packed, where)
    made = {"shape": packed["shape"], "mask": mask}
    return {**made, "values": _plain_values(packed, where, bitmask.count(mask), dtype)} if "values" in packed else made


def _plain_mask(packed: Packed, where: str) -> Tensor:
    """The uncompressed mask; only the shape has been checked."""
    entries = packed["shape"][0] * packed["shape"][1]
    return inflated(packed, "mask", where, -(-entries // 8), torch.uint8)


def _plain_values(packed: Packed, where: str, kept: int, dtype: torch.dtype) -> Tensor:
    """The uncompressed values."""
    return inflated(packed, "values", where, kept, dtype)


def make_update(round_index: int, blocks: Blocks, exchange: int = 0) -> dict[str, Any]:
    """Wrap packed matrices of some blocks in an update."""
    packed = {str(block): dict(linears) for block, linears in blocks.items()}
    return {"format": FORMAT, "round": round_index, "exchange": exchange, "blocks": packed}


def matrices(update: Mapping[str, Any]) -> Iterator[tuple[int, str, Packed]]:
    """All (block, linear, packed matrix) of a checked update."""
    for block, linears in update["blocks"].items():
        for name, packed in linears.items():
            yield int(block), name, packed


def update_nbytes(update: Mapping[str, Any]) -> int:
    """Bytes of all tensors of an update; the dict adds less than a kilobyte per matrix."""
    return sum(block_nbytes(update).values())


def block_nbytes(update: Mapping[str, Any]) -> dict[int, int]:
    """Bytes of the tensors of each block of an update."""
    linears = update["blocks"].items() if update else ()
    return {int(block): sum(map(nbytes, packed.values())) for block, packed in linears}


def check_update(
    update: Any, sender: str, round_index: int, exchange: int, expected: Mapping[int, Mapping[str, Check]]
) -> dict[str, Any]:
    """Refuse an update of an unexpected form.

    Args:
        update: the received update.
        sender: whom to name in the error.
        round_index: the current round.
        exchange: the current exchange of the round.
        expected: for each block that the sender may send, how each unit of it is checked.

    Returns:
        The uncompressed update.

    Raises:
        UpdateError: names the first problem, with sender, block and linear.
    """
    named = isinstance(update, Mapping) and type(update.get("format")) is str and update["format"] == FORMAT
    require(named, sender, f"the format must be {FORMAT}")
    keys = {"format", "round", "exchange", "blocks"}
    require(set(update) == keys, sender, f"the keys are {sorted(map(str, update))}")
    for key, now in (("round", round_index), ("exchange", exchange)):
        right = type(update[key]) is int and update[key] == now
        require(right, sender, f"it is for {key} {update[key]}, this is {key} {now}")
    require(isinstance(update["blocks"], Mapping), sender, "`blocks` is not a dict")
    assigned = {str(block): checks for block, checks in expected.items()}
    checked: dict[str, dict[str, Packed]] = {}
    for key, units in update["blocks"].items():
        known = type(key) is str and key in assigned
        require(known, sender, f"block {key!r} was not assigned; assigned were {sorted(expected)}, as text")
        require(isinstance(units, Mapping), sender, f"block {key} is not a dict")
        for name, packed in units.items():
            where = f"{sender}, block {key}, {name}"
            require(name in assigned[key], where, f"there is no such linear; there are {sorted(assigned[key])}")
            checked.setdefault(key, {})[name] = assigned[key][name](packed, where)
    return {**update, "blocks": checked}


def check_matrix(
    packed: Any, where: str, shape: tuple[int, int], dtype: torch.dtype, target: Target, mask_only: bool = False
) -> Packed:
    """Refuse a packed matrix without this shape, dtype and sparsity; returns it uncompressed.

    Args:
        packed: the received matrix.
        where: place to name in errors.
        shape: (O, I).
        dtype: dtype that the values must have.
        target: sparsity that the mask must have.
        mask_only: it has no values.

    Raises:
        UpdateError: the first thing that is wrong.
    """
    _check_parts(packed, where, shape, ["mask"] if mask_only else ["mask", "values"])
    mask = _plain_mask(packed, where)
    _check_mask(mask, where, shape, target)
    if mask_only:
        return {"shape": packed["shape"], "mask": mask}
    return {"shape": packed["shape"], "mask": mask, "values": _checked_values(packed, where, mask, dtype)}


def check_values(packed: Any, where: str, agreed: Packed, dtype: torch.dtype) -> Packed:
    """Refuse values that do not match an agreed mask; returns them uncompressed and with that mask.

    Raises:
        UpdateError: the first thing that is wrong.
    """
    _check_parts(packed, where, agreed["shape"], ["values"])
    return {**agreed, "values": _checked_values(packed, where, agreed["mask"], dtype)}


def _check_parts(packed: Any, where: str, shape: Any, parts: list[str]) -> None:
    complete = isinstance(packed, Mapping) and set(packed) - {"zstd"} == {"shape", *parts}
    require(complete, where, f"a matrix has the keys shape, {', '.join(parts)}, and `zstd` if compressed")
    right_shape = type(packed["shape"]) is list and all(type(n) is int for n in packed["shape"])
    right_shape = right_shape and packed["shape"] == list(shape)
    require(right_shape, where, f"the shape is {packed['shape']}, expected {list(shape)}")
    plain = all(is_plain(packed[part]) for part in parts)
    require(plain, where, f"{' and '.join(parts)} must be {'tensors' if len(parts) > 1 else 'a tensor'} in memory")


def _check_mask(mask: Tensor, where: str, shape: tuple[int, int], target: Target) -> None:
    entries = shape[0] * shape[1]
    beyond = int(mask[-1]) >> (entries % 8) if entries % 8 else 0
    require(beyond == 0, where, "bits beyond the last entry of the mask are set")
    kept, expected = bitmask.count(mask), entries - target.zeros(entries)
    require(kept == expected, where, f"the mask keeps {kept} entries, sparsity {target} keeps {expected}")
    if isinstance(target, NM):
        groups = bitmask.from_bits(mask, (entries // target.group, target.group)).sum(1)
        require(bool((groups == target.kept).all()), where, f"the mask does not keep {target} in every group")


def _checked_values(packed: Packed, where: str, mask: Tensor, dtype: torch.dtype) -> Tensor:
    values = _plain_values(packed, where, bitmask.count(mask), dtype)
    require(largest_magnitude(values) < float("inf"), where, "the values hold NaN or infinity")
    return values
