"""What a client has been sent that its words depend on, as one hash; the server has the same of what it has sent.

The hash is part of the keys of masks: words of clients that were sent different things do not add up to anything.
"""

import hashlib
from collections.abc import Mapping

from fedspallm_appfl.algorithms.algorithm import SQUARES

WEIGHTS = "weights"
KINDS = (WEIGHTS, "masks", SQUARES)  # of what comes down, and what a client keeps apart
Seen = Mapping[tuple[int, str], tuple[int, str]]  # block and unit -> the round in which it came last, its hash


def kind_of(down: str | None) -> str:
    """Where a client keeps what comes down in an exchange."""
    return down if down in KINDS else WEIGHTS


def view_of(round_index: int, seen: Mapping[str, Seen]) -> str:
    """SHA-256, in hexadecimal digits, of all pruned weights, and of masks and squares of the round.

    Args:
        round_index: the round that is on.
        seen: kind (see `kind_of`) -> what came of it.
    """
    digest = hashlib.sha256()
    for kind in sorted(seen):
        for (block, unit), (when, found) in sorted(seen[kind].items()):
            if kind == WEIGHTS or when == round_index:
                digest.update(f"{kind} {block} {unit} {found}\n".encode())
    return digest.hexdigest()
