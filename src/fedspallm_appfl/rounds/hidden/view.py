"""What a client has been sent that its words depend on, as one hash; the server has the same of what it has sent.

The hash is part of the keys of masks: words of clients that were sent different things do not add up to anything.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fedspallm_appfl.algorithms.algorithm import SQUARES, Exchange
from fedspallm_appfl.wire.store import seen
from fedspallm_appfl.wire.update import read_matrices

WEIGHTS = "weights"
KINDS = (WEIGHTS, "masks", SQUARES)  # of what comes down, and what a client keeps apart
Seen = Mapping[tuple[int, str], tuple[int, str]]  # block and unit -> the round in which it came last, its hash


def kind_of(down: str | None) -> str:
    """Where a client keeps what comes down in an exchange."""
    return down if down in KINDS else WEIGHTS


def view_of(round_index: int, sent: Mapping[str, Seen]) -> str:
    """SHA-256, in hexadecimal digits, of all pruned weights, and of masks and squares of the round.

    Args:
        round_index: the round that is on.
        sent: kind (see `kind_of`) -> what came of it.
    """
    digest = hashlib.sha256()
    for kind in sorted(sent):
        for (block, unit), (when, found) in sorted(sent[kind].items()):
            if kind == WEIGHTS or when == round_index:
                digest.update(f"{kind} {block} {unit} {found}\n".encode())
    return digest.hexdigest()


class Sent:
    """What the server has sent to all clients, and the hash of it before each exchange."""

    def __init__(self, exchanges: Sequence[Exchange], dtype: torch.dtype) -> None:
        """Nothing has been sent.

        Args:
            exchanges: of the last round.
            dtype: of weights.
        """
        self._exchanges, self._dtype = exchanges, dtype
        self._seen: dict[str, dict[tuple[int, str], tuple[int, str]]] = {kind: {} for kind in KINDS}
        self._views: dict[tuple[int, int], str] = {}

    def note(self, update: Mapping[str, Any]) -> None:
        """A piece of an update goes down."""
        kind = kind_of(self._exchanges[update["exchange"]].down)
        matrices = read_matrices(update, torch.float32 if kind == SQUARES else self._dtype)
        self._seen[kind] |= seen(update, matrices)

    def view(self, round_index: int, exchange: int) -> str:
        """Hash of what was sent before an exchange; it is first asked for while that is on."""
        if (round_index, exchange) not in self._views:
            self._views[round_index, exchange] = view_of(round_index, self._seen)
        return self._views[round_index, exchange]
