"""A pruned matrix as a bit mask and the kept values.

* `mask` holds one bit an entry in row-major order, least significant bit first, 1 = kept: ceil(O * I / 8) bytes;
* `values` holds the kept entries in the same order, in the dtype of the checkpoint. The mask is data of its own, never
  rebuilt from `values != 0`: a kept weight may be exactly zero. A client whose pruner leaves kept weights as they are sends
  no values: the server takes them from its own copy of the dense model. Under a mask that was agreed on before, values
  come without one.

A matrix of an expert also says how many tokens reached it, and one that too few reached says only that.

Legend: O out features, I in features.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fedspallm_appfl.aggregation.l0_mean import largest_magnitude
from fedspallm_appfl.tensors import bitmask
from fedspallm_appfl.tensors.targets import Sparsity

Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True, eq=False)
class Packed:
    """One packed matrix.

    Attributes:
        shape: (O, I).
        mask: (ceil(O * I / 8),) uint8 on the CPU; None for values under a mask that both sides have.
        values: (kept,) in the dtype of the checkpoint, on the CPU; None where the mask alone says all.
        tokens: those that reached an expert; None for a matrix that all tokens reach.
    """

    shape: tuple[int, int]
    mask: Tensor | None = None
    values: Tensor | None = None
    tokens: int | None = None

    @property
    def bits(self) -> Tensor:
        """The mask as bits, of a matrix that has one."""
        assert self.mask is not None, "values alone have no mask"
        return self.mask

    @property
    def entries(self) -> int:
        """O * I."""
        return self.shape[0] * self.shape[1]

    @property
    def kept(self) -> int:
        """Entries that the mask keeps."""
        return bitmask.count(self.bits)

    @cached_property
    def largest(self) -> float:
        """Largest |value|, of a matrix that has values; NaN or infinity if there is one."""
        assert self.values is not None, "a mask alone has no values"
        return largest_magnitude(self.values)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(part.nbytes for part in (self.mask, self.values) if part is not None)

    def sha256(self) -> str:
        """A hash of all of it, in hexadecimal digits."""
        digest = hashlib.sha256(repr((self.shape, self.tokens)).encode())
        for part in (self.mask, self.values):
            digest.update(b"-" if part is None else f"{part.dtype} {part.nbytes} ".encode())
            if part is not None:
                digest.update(part.contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def unpack_mask(self) -> Tensor:
        """(O, I) bool, True = kept."""
        return bitmask.from_bits(self.bits, self.shape)

    def unpack_weight(self, device: torch.device | str = "cpu", out: Tensor | None = None) -> Tensor:
        """The weight.

        Args:
            device: where to unpack it.
            out: (O, I) contiguous, on the device and in the dtype of the values, where to write; None makes a new tensor.

        Returns:
            (O, I) in the dtype of the values, zero where pruned.
        """
        assert self.values is not None, "a mask alone has no weight"
        return bitmask.scatter(self.values.to(device), self.bits.to(device), self.shape, out)

    def with_values(self, dense: Tensor) -> "Packed":
        """A packed mask with its values, taken from the dense matrix (O, I)."""
        return replace(self, values=bitmask.gather(dense.contiguous(), self.bits))

    def to_dict(self) -> dict[str, Any]:
        """As it travels."""
        parts = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: part for name, part in parts.items() if part is not None} | {"shape": list(self.shape)}


@dataclass(frozen=True)
class Unreached:
    """What a client sends of an expert that too few of its tokens reached, in the place of a matrix or of statistics.

    Attributes:
        tokens: how many did.
    """

    tokens: int
    nbytes = 0

    def to_dict(self) -> dict[str, Any]:
        """As it travels."""
        return {"unreached": self.tokens}


def pack(weight: Tensor, mask: Tensor, dtype: torch.dtype) -> Packed:
    """Pack one matrix.

    Args:
        weight: (O, I) float; entries where `mask` is False are dropped whatever they are.
        mask: (O, I) bool, True = kept.
        dtype: dtype of the values that travel.
    """
    bits = bitmask.to_bits(mask)
    values = bitmask.gather(weight.to(dtype).contiguous(), bits)
    return Packed(_shape(weight), bits.cpu(), values.cpu())


def pack_mask(mask: Tensor) -> Packed:
    """Pack the mask (O, I) of a matrix whose kept weights are those of the dense model."""
    return Packed(_shape(mask), bitmask.to_bits(mask).cpu())


def pack_values(weight: Tensor, bits: Tensor, dtype: torch.dtype) -> Packed:
    """Pack the kept entries of a matrix (O, I) whose mask, (ceil(O * I / 8),) uint8, both sides have."""
    values = bitmask.gather(weight.to(dtype).contiguous(), bits.to(weight.device))
    return Packed(_shape(weight), values=values.cpu())


def _shape(matrix: Tensor) -> tuple[int, int]:
    rows, columns = matrix.shape
    return rows, columns


def packed_size(shape: tuple[int, int], zeros: int, dtype: torch.dtype) -> int:
    """Bytes that a matrix will take once packed, from first principles."""
    entries = shape[0] * shape[1]
    return -(-entries // 8) + (entries - zeros) * dtype.itemsize


def kept_entries(shapes: Shapes, sparsity: Sparsity, block: int) -> dict[str, int]:
    """Entries of each matrix of a block that its target keeps."""
    entries = {name: rows * columns for name, (rows, columns) in shapes.items()}
    return {name: count - sparsity.of(block, name).zeros(count) for name, count in entries.items()}


def packed_sizes(
    shapes: Shapes, sparsity: Sparsity, dtype: torch.dtype, parts: str = "weights", block: int = 0
) -> dict[str, int]:
    """Bytes of each matrix of a block once packed: its mask and `values` (`weights`), or one of the two."""
    entries = {name: rows * columns for name, (rows, columns) in shapes.items()}
    masks = {name: packed_size(shapes[name], count, dtype) for name, count in entries.items()}
    zeros = {name: sparsity.of(block, name).zeros(count) for name, count in entries.items()}
    whole = {name: packed_size(shapes[name], count, dtype) for name, count in zeros.items()}
    values = {name: whole[name] - masks[name] for name in shapes}
    return {"weights": whole, "masks": masks, "values": values}[parts]
