"""Masks as bits, and the values under them.

A mask of shape (O, I) packs into ceil(O * I / 8) bytes: row-major, least significant bit first, 1 = kept. Its values are
the kept entries of a matrix in the same order. On the CPU the compiled loops do the work if available; otherwise numpy and
torch do the same. On a GPU the data stays there.

Legend: O out features, I in features.
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from fedspallm_appfl.tensors import native

_LOOPS = (2, 4)  # element sizes in bytes with a compiled loop


def to_bits(mask: Tensor) -> Tensor:
    """Pack a mask.

    Args:
        mask: any shape, bool, True = kept.

    Returns:
        (ceil(n / 8),) uint8 on the same device; bits beyond the last entry are 0.
    """
    flat = mask.reshape(-1)
    if flat.device.type == "cpu":
        return torch.from_numpy(np.packbits(flat.numpy(), bitorder="little"))
    padded = torch.nn.functional.pad(flat.to(torch.uint8), (0, -len(flat) % 8)).view(-1, 8)
    return (padded << _places(flat.device)).sum(1, dtype=torch.uint8)


def from_bits(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The mask of some bits, bool of the given shape, on the same device."""
    entries = int(np.prod(shape))
    if bits.device.type == "cpu":
        unpacked = torch.from_numpy(np.unpackbits(bits.numpy(), count=entries, bitorder="little"))
    else:
        unpacked = (bits.unsqueeze(1) >> _places(bits.device) & 1).flatten()[:entries]
    return unpacked.view(torch.bool).view(shape)


def count(bits: Tensor) -> int:
    """Kept entries."""
    if native.serves(bits):
        return int(native.call("count_bits", bits, len(bits)))
    return int(from_bits(bits, (8 * len(bits),)).sum())


def require_as_many(values: Tensor, bits: Tensor) -> None:
    """Refuse, with a ValueError, other than as many values as a mask keeps."""
    if len(values) != (kept := count(bits)):
        raise ValueError(f"a mask with {kept} kept entries needs as many values, got {len(values)}")


@dataclass(frozen=True)
class Part:
    """A part of a mask.

    Attributes:
        entries: which entries it is of.
        bits: of the part.
        kept: which values belong to it.
    """

    entries: slice
    bits: Tensor
    kept: slice

    @property
    def size(self) -> int:
        """Entries of the part."""
        return int(self.entries.stop - self.entries.start)

    @property
    def values(self) -> int:
        """Kept entries of the part."""
        return int(self.kept.stop - self.kept.start)


def split(bits: Tensor, entries: int) -> list[Part]:
    """A mask in parts for the compiled loops, one for each thread."""
    places = native.ranges(entries, 64)
    of = [bits[place.start // 8 : -(-place.stop // 8)] for place in places]
    ends = list(accumulate(map(count, of), initial=0))
    kept = [slice(start, stop) for start, stop in pairwise(ends)]
    return [Part(*one) for one in zip(places, of, kept, strict=True)]


def gather(dense: Tensor, bits: Tensor) -> Tensor:
    """The kept entries of a matrix.

    Args:
        dense: any shape, float.
        bits: its mask.

    Returns:
        (kept,) in the dtype of `dense`.
    """
    if dense.element_size() in _LOOPS and native.serves(dense, bits):
        flat, parts = dense.view(-1), split(bits, dense.numel())
        values = torch.empty(parts[-1].kept.stop, dtype=dense.dtype)
        calls = [(flat[one.entries], one.bits, one.size, one.values, values[one.kept]) for one in parts]
        native.call_in_parts(f"gather_{dense.element_size()}", calls)
        return values
    return dense[from_bits(bits, tuple(dense.shape))]


def scatter(values: Tensor, bits: Tensor, shape: tuple[int, ...], out: Tensor | None = None) -> Tensor:
    """The matrix of some kept entries, zero elsewhere.

    Args:
        values: (kept,) float.
        bits: the mask.
        shape: (O, I).
        out: (O, I) contiguous, of the same dtype and device, where to write; None makes a new tensor.

    Returns:
        (O, I) in the dtype of the values.

    Raises:
        ValueError: there are more or fewer values than the mask keeps.
    """
    require_as_many(values, bits)
    dense = torch.empty(shape, dtype=values.dtype, device=values.device) if out is None else out
    if values.element_size() in _LOOPS and native.serves(values, bits, dense):
        flat, parts = dense.view(-1), split(bits, dense.numel())
        calls = [(values[one.kept], one.bits, one.size, one.values, flat[one.entries]) for one in parts]
        native.call_in_parts(f"scatter_{values.element_size()}", calls)
        return dense
    return dense.zero_().masked_scatter_(from_bits(bits, shape), values)


def _places(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)
