"""How many entries of a matrix are zero, and which n:m patterns it follows.

Legend: O out features, I in features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedspallm_appfl.tensors.target import NM

PATTERNS = (NM(2, 4), NM(4, 8))  # those that hardware and papers use


@dataclass(frozen=True)
class Zeros:
    """Of one matrix.

    Attributes:
        entries: O * I.
        zeros: entries that are zero.
        patterns: those of `PATTERNS` that every group of every row follows.
    """

    entries: int
    zeros: int
    patterns: tuple[NM, ...]

    @property
    def share(self) -> float:
        """Zeros / entries."""
        return self.zeros / self.entries


def count_zeros(matrix: Tensor) -> Zeros:
    """Count the zeros of a matrix (O, I)."""
    kept = matrix != 0
    zeros = kept.numel() - int(kept.count_nonzero())
    return Zeros(kept.numel(), zeros, tuple(one for one in PATTERNS if _follows(kept, zeros, one)))


def _follows(kept: Tensor, zeros: int, pattern: NM) -> bool:
    """Whether at most n of every m consecutive entries of a row are kept."""
    if kept.shape[1] % pattern.group or zeros < pattern.zeros(kept.numel()):
        return False
    return int(kept.reshape(-1, pattern.group).sum(1, dtype=torch.uint8).max()) <= pattern.kept
