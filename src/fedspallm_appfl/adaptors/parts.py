"""Messages whose tensors go elsewhere: what the server hears of them, put together."""

from dataclasses import dataclass, field
from typing import Any

from fedspallm_appfl.rounds.folds.intake import Receipt


@dataclass(frozen=True)
class Note:
    """What a fold rank tells the server of a message.

    Attributes:
        rank: whose message it was.
        receipts: client -> what was added up.
        events: what was seen meanwhile.
    """

    rank: int
    receipts: dict[str, Receipt]
    events: list[dict[str, Any]]


@dataclass
class Parts:
    """Messages of which fold ranks have parts.

    Attributes:
        waiting: rank -> the ranks that have parts of its message, and what the server itself got of it.
        notes: rank -> what fold ranks have told of it.
    """

    waiting: dict[int, tuple[list[int], Any]] = field(default_factory=dict)
    notes: dict[int, list[Note]] = field(default_factory=dict)

    def whole(self, rank: int) -> tuple[Any, dict[str, Receipt]] | None:
        """What the server got of a rank's message, and the receipts of its clients, once everything is there."""
        ranks, message = self.waiting.get(rank, ([], None))
        notes = self.notes.get(rank, [])
        if message is None or len(notes) < len(ranks):
            return None
        del self.waiting[rank]
        self.notes.pop(rank, None)
        receipts: dict[str, Receipt] = {}
        for note in notes:
            for client, one in note.receipts.items():
                receipts.setdefault(client, Receipt()).add(one)
        return message, receipts
