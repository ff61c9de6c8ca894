"""Changes of kept weights as integers of few bits: rounded up or down at random, so that the mean is right.

Groups of `wire.deltas.GROUP` entries share a scale, that of the largest of them. An entry between two levels becomes the
upper one as often as it is near to it; over clients and rounds the errors average out, and nothing is systematically lost.
"""

import torch
from torch import Tensor

from fedspallm_appfl.wire.deltas import GROUP, KINDS, PackedDelta, packed_nibbles

ROUNDS_UP = 1 + 2**-7  # how much larger a change may be once it is rounded: by a step of its scale, bfloat16


def rounded(change: Tensor, precision: str, random: torch.Generator) -> PackedDelta:
    """Pack a change.

    Args:
        change: (kept,) float32 on the CPU.
        precision: one of `wire.deltas.KINDS`.
        random: for rounding; `fp16` is rounded to the nearest.
    """
    kind = KINDS[precision]
    groups = torch.nn.functional.pad(change, (0, -len(change) % GROUP)).view(-1, GROUP)
    scale = _no_less(groups.abs().amax(1) / kind.levels)
    share = groups / torch.where(scale > 0, scale.float(), 1.0).unsqueeze(1)
    if not kind.integers:
        return PackedDelta(share.view(-1)[: len(change)].to(kind.dtype), scale)
    levels = (share + torch.rand(share.shape, generator=random)).floor_().clamp_(-kind.levels, kind.levels)
    whole = levels.view(-1)[: len(change)].to(torch.int8)
    return PackedDelta(packed_nibbles(whole) if kind.halves else whole, scale)


def _no_less(scale: Tensor) -> Tensor:
    """In bfloat16, rounded up, so that the largest entry has a level."""
    near = scale.bfloat16()
    return torch.where(near.float() < scale, near.view(torch.int16) + 1, near.view(torch.int16)).view(torch.bfloat16)
