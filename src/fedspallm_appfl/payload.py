"""What travels: pruned matrices as a bit mask and the kept values, in a plain dict of tensors, strings and integers.

One update, up or down, is

    {"format": "fedspallm-update/1", "round": 0,
     "blocks": {"3": {"self_attn.q_proj": {"shape": [O, I], "mask": uint8, "values": float}}}}

An update that goes down may come in several pieces and then says which it is: `"piece": 0, "pieces": 2`.

* `mask` holds one bit an entry in row-major order, least significant bit first, 1 = kept: ceil(O * I / 8) bytes;
* `values` holds the kept entries in the same order, in the dtype of the checkpoint. The mask is shipped, never rebuilt
  from `values != 0`: a kept weight may be exactly zero. A client whose pruner leaves kept weights as they are sends no
  values: the server takes them from its own copy of the dense model;
* with compression a matrix has `"zstd": ["mask", "values"]`, the parts that are zstandard frames (uint8); the bytes of
  values are shuffled first, all first bytes, then all second ones, as the exponents repeat and the mantissas do not. A
  part that would not get smaller stays as it is.

Nothing in it needs pickle: `torch.load(weights_only=True)` takes it, and every communicator carries it unchanged. Whoever
receives one checks it with `check_update` against what was asked for before looking at a value.

Legend: O out features, I in features.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import zstandard
from torch import Tensor

from fedspallm_appfl import bitmask
from fedspallm_appfl.errors import UpdateError
from fedspallm_appfl.l0_aggregation import largest_magnitude
from fedspallm_appfl.sparsity import NM, Target

FORMAT = "fedspallm-update/1"
COMPRESSIONS = ("auto", "none", "zstd")
ZSTD_LEVEL = 1  # higher levels find nothing more in masks and mantissas

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


def nbytes(packed: Packed) -> int:
    """Bytes of the tensors of one packed matrix, as it is: compressed or not."""
    return sum(packed[part].numel() * packed[part].element_size() for part in ("mask", "values") if part in packed)


def packed_size(shape: tuple[int, int], zeros: int, dtype: torch.dtype) -> int:
    """Bytes that a matrix will take once packed, from first principles."""
    entries = shape[0] * shape[1]
    return -(-entries // 8) + (entries - zeros) * dtype.itemsize


def packed_sizes(shapes: Shapes, target: Target, dtype: torch.dtype, mask_only: bool = False) -> dict[str, int]:
    """Bytes of each matrix of a block once packed, with its values unless `mask_only`."""
    entries = {name: rows * columns for name, (rows, columns) in shapes.items()}
    return {
        name: packed_size(shapes[name], count if mask_only else target.zeros(count), dtype)
        for name, count in entries.items()
    }


def compress(update: Mapping[str, Any]) -> dict[str, Any]:
    """The same update with every part as a zstandard frame that is smaller so."""
    blocks = {
        block: {name: _compressed(packed) for name, packed in linears.items()}
        for block, linears in update["blocks"].items()
    }
    return {**update, "blocks": blocks}


def decompress(update: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Undo `compress`; `dtype` is that of the values. `check_update` does it for uploads.

    Raises:
        UpdateError: a part is not a frame of the right size.
    """
    blocks = {
        block: {name: _plain(packed, f"block {block}, {name}", dtype) for name, packed in linears.items()}
        for block, linears in update["blocks"].items()
    }
    return {**update, "blocks": blocks}


def _compressed(packed: Packed) -> Packed:
    made, frames = dict(packed), []
    for part in ("mask", "values"):
        if part in packed:
            frame = zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(_shuffled(packed[part]))
            if len(frame) < packed[part].numel() * packed[part].element_size():
                made[part] = torch.frombuffer(bytearray(frame), dtype=torch.uint8)
                frames.append(part)
    return {**made, "zstd": frames}


def _plain(packed: Packed, where: str, dtype: torch.dtype) -> Packed:
    mask = _plain_mask(packed, where)
    made = {"shape": packed["shape"], "mask": mask}
    return {**made, "values": _plain_values(packed, where, mask, dtype)} if "values" in packed else made


def _plain_mask(packed: Packed, where: str) -> Tensor:
    """The mask as it was before compression; nothing but the shape has been checked."""
    if "mask" not in _frames(packed, where):
        return packed["mask"]
    entries = packed["shape"][0] * packed["shape"][1]
    return _inflated(packed["mask"], where, "mask", -(-entries // 8), torch.uint8)


def _plain_values(packed: Packed, where: str, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The values as they were before compression; the mask has been checked."""
    if "values" not in _frames(packed, where):
        return packed["values"]
    return _inflated(packed["values"], where, "values", bitmask.count(mask), dtype)


def _frames(packed: Packed, where: str) -> list[str]:
    frames = packed.get("zstd", [])
    right = type(frames) is list and all(type(p) is str and p in ("mask", "values") and p in packed for p in frames)
    _require(right, where, f"`zstd` lists which of mask and values are compressed, got {frames!r}")
    return frames


def _inflated(frame: Tensor, where: str, part: str, count: int, dtype: torch.dtype) -> Tensor:
    size = count * dtype.itemsize
    _require(frame.dtype == torch.uint8 and frame.ndim == 1, where, f"{part}: not a frame but {_describe(frame)}")
    try:
        data = frame.contiguous().numpy().data
        promised = zstandard.get_frame_parameters(data).content_size  # so much would be allocated
        _require(promised == size, where, f"{part}: the frame holds {promised} bytes, expected {size}")
        plain = zstandard.ZstdDecompressor(max_window_size=2**27).decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise UpdateError(f"refused an update from {where}: {part} cannot be decompressed: {error}") from error
    unshuffled = np.frombuffer(plain, np.uint8).reshape(dtype.itemsize, count).T.copy()
    return torch.from_numpy(unshuffled).flatten().view(dtype)


def _shuffled(tensor: Tensor) -> memoryview:
    """All first bytes of the elements, then all second ones, and so on."""
    size = tensor.element_size()
    return np.ascontiguousarray(tensor.contiguous().view(torch.uint8).numpy().reshape(-1, size).T).data


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
    return sum(block_nbytes(update).values())


def block_nbytes(update: Mapping[str, Any]) -> dict[int, int]:
    """Bytes of the tensors of each block of an update."""
    linears = update["blocks"].items() if update else ()
    return {int(block): sum(map(nbytes, packed.values())) for block, packed in linears}


def check_update(
    update: Any,
    sender: str,
    round_index: int,
    blocks: set[int],
    shapes: Mapping[int, Shapes],
    dtype: torch.dtype,
    target: Target,
    mask_only: bool = False,
) -> dict[str, Any]:
    """Refuse an update that is not what was asked for.

    Args:
        update: what arrived.
        sender: whom to name in the error.
        round_index: the round that is on.
        blocks: the blocks that the sender may send.
        shapes: for each block the (O, I) of each of its linears.
        dtype: dtype that the values must have.
        target: sparsity that every mask must have.
        mask_only: the sender's pruner leaves kept weights as they are, so that it sends no values.

    Returns:
        The update with nothing compressed in it.

    Raises:
        UpdateError: the first thing that is wrong, with sender, block and linear.
    """
    named = isinstance(update, Mapping) and type(update.get("format")) is str and update["format"] == FORMAT
    _require(named, sender, f"the format must be {FORMAT}")
    _require(set(update) == {"format", "round", "blocks"}, sender, f"the keys are {sorted(map(str, update))}")
    right_round = type(update["round"]) is int and update["round"] == round_index
    _require(right_round, sender, f"it is for round {update['round']}, this is round {round_index}")
    _require(isinstance(update["blocks"], Mapping), sender, "`blocks` is not a dict")
    checked: dict[str, dict[str, Packed]] = {}
    for key, linears in update["blocks"].items():
        known = key in {str(block) for block in blocks}
        _require(known, sender, f"block {key!r} was not assigned; assigned were {sorted(blocks)}, as text")
        _require(isinstance(linears, Mapping), sender, f"block {key} is not a dict")
        for name, packed in linears.items():
            where = f"{sender}, block {key}, {name}"
            expected = sorted(shapes[int(key)])
            _require(name in shapes[int(key)], where, f"there is no such linear; there are {expected}")
            matrix = _checked(packed, where, shapes[int(key)][name], dtype, target, mask_only)
            checked.setdefault(key, {})[name] = matrix
    return {**update, "blocks": checked}


def _checked(
    packed: Any, where: str, shape: tuple[int, int], dtype: torch.dtype, target: Target, mask_only: bool
) -> Packed:
    parts = ["shape", "mask"] if mask_only else ["shape", "mask", "values"]
    complete = isinstance(packed, Mapping) and set(packed) - {"zstd"} == set(parts)
    _require(complete, where, f"a matrix has the keys {', '.join(parts)}, and `zstd` if compressed")
    right_shape = type(packed["shape"]) is list and all(type(n) is int for n in packed["shape"])
    right_shape = right_shape and packed["shape"] == list(shape)
    _require(right_shape, where, f"the shape is {packed['shape']}, expected {list(shape)}")
    plain = all(_is_plain(packed[part]) for part in parts[1:])
    _require(plain, where, f"{' and '.join(parts[1:])} must be {'a tensor' if mask_only else 'tensors'} in memory")
    mask = _plain_mask(packed, where).contiguous()
    _check_mask(mask, where, shape, target)
    if mask_only:
        return {"shape": packed["shape"], "mask": mask}
    values = _plain_values(packed, where, mask, dtype).detach().resolve_neg().contiguous()
    _check_values(values, where, shape[0] * shape[1] - target.zeros(shape[0] * shape[1]), dtype)
    return {"shape": packed["shape"], "mask": mask, "values": values}


def _is_plain(part: Any) -> bool:
    """Whether something is a tensor that numpy could read too: neither sparse nor nested, on the CPU."""
    return (
        isinstance(part, Tensor)
        and part.layout == torch.strided
        and not part.is_nested
        and not part.is_quantized
        and part.device.type == "cpu"
    )


def _check_mask(mask: Tensor, where: str, shape: tuple[int, int], target: Target) -> None:
    entries = shape[0] * shape[1]
    right_mask = mask.dtype == torch.uint8 and tuple(mask.shape) == (-(-entries // 8),)
    _require(right_mask, where, f"the mask must be uint8 of {-(-entries // 8)} bytes, got {_describe(mask)}")
    beyond = int(mask[-1]) >> (entries % 8) if entries % 8 else 0
    _require(beyond == 0, where, "bits beyond the last entry of the mask are set")
    kept, expected = bitmask.count(mask.contiguous()), entries - target.zeros(entries)
    _require(kept == expected, where, f"the mask keeps {kept} entries, sparsity {target} keeps {expected}")
    if isinstance(target, NM):
        groups = bitmask.from_bits(mask, (entries // target.group, target.group)).sum(1)
        _require(bool((groups == target.kept).all()), where, f"the mask does not keep {target} in every group")


def _check_values(values: Tensor, where: str, kept: int, dtype: torch.dtype) -> None:
    right_values = values.dtype == dtype and values.ndim == 1
    _require(right_values, where, f"the values must be one row of {dtype}, got {_describe(values)}")
    _require(kept == len(values), where, f"the mask keeps {kept} entries but there are {len(values)} values")
    _require(largest_magnitude(values) < float("inf"), where, "the values hold NaN or infinity")


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"


def _require(condition: bool, where: str, what: str) -> None:
    if not condition:
        raise UpdateError(f"refused an update from {where}: {what}")
