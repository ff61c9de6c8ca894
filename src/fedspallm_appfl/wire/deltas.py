"""Changes of the kept entries of a matrix, as they travel: levels of few bits, and a scale for each group of entries.

* `levels` are int8, or two of four bits in a byte (the first one in the lower half, stored with 8 added), or float16 shares
  of the scale;
* `scale` is bfloat16, one for every `GROUP` entries. A change is a level times its scale, which float32 holds exactly.

The mask does not travel: both sides have it. Entries are those that it keeps, or those of a factor (see
`recovery.low_rank`).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedspallm_appfl.wire.compression import Parts

GROUP = 128  # entries that share a scale
NIBBLE = 8  # added to a level of four bits


@dataclass(frozen=True)
class Kind:
    """One precision.

    Attributes:
        dtype: of the levels as they travel.
        levels: the largest level; a scale is the largest change divided by it.
        integers: levels are integers.
        halves: two of them share a byte.
    """

    dtype: torch.dtype
    levels: int
    integers: bool = True
    halves: bool = False


KINDS = {
    "int4": Kind(torch.uint8, 7, halves=True),
    "int8": Kind(torch.int8, 127),
    "fp16": Kind(torch.float16, 1, integers=False),
}


@dataclass(frozen=True, eq=False)
class PackedDelta:
    """The change of one matrix by one client.

    Attributes:
        levels: as `parts_of_delta` says, on the CPU.
        scale: (groups,) bfloat16.
    """

    levels: Tensor
    scale: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return self.levels.nbytes + self.scale.nbytes

    def to_dict(self) -> dict[str, Any]:
        """As it travels."""
        return {"levels": self.levels, "scale": self.scale}

    def changes(self, count: int) -> Tensor:
        """(count,) float32."""
        levels = unpacked_nibbles(self.levels, count) if self.levels.dtype == torch.uint8 else self.levels
        padded = torch.nn.functional.pad(levels.float(), (0, -count % GROUP)).view(-1, GROUP)
        return (padded * self.scale.float().unsqueeze(1)).view(-1)[:count]


def packed_nibbles(levels: Tensor) -> Tensor:
    """Levels (n,) int8 from -8 to 7, two in a byte: (ceil(n / 2),) uint8."""
    pairs = torch.nn.functional.pad(levels + NIBBLE, (0, len(levels) % 2)).view(-1, 2).to(torch.uint8)
    return pairs[:, 0] | pairs[:, 1] << 4


def unpacked_nibbles(packed: Tensor, count: int) -> Tensor:
    """The first `count` levels, int8."""
    return torch.stack((packed & 15, packed >> 4), 1).view(-1)[:count].to(torch.int8) - NIBBLE


def changed_entries(kept: int, out: int, rank: int) -> int:
    """Entries that travel for a matrix with so many kept weights and out features: those, or those of its factor."""
    return out * rank if rank else kept


def parts_of_delta(count: int, precision: str) -> Parts:
    """The tensors of a packed change of so many entries: name -> (entries, dtype)."""
    kind = KINDS[precision]
    levels = -(-count // 2) if kind.halves else count
    return {"levels": (levels, kind.dtype), "scale": (-(-count // GROUP), torch.bfloat16)}


def delta_size(count: int, precision: str) -> int:
    """Bytes that a change of so many entries takes, uncompressed."""
    return sum(entries * dtype.itemsize for entries, dtype in parts_of_delta(count, precision).values())
