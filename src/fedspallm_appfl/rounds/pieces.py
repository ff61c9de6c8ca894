"""What goes down to clients, in pieces that fit into a message: after an exchange, when a run goes on, and at the end."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fedspallm_appfl.algorithms.algorithm import Exchange
from fedspallm_appfl.rounds.folds.context import DOWN
from fedspallm_appfl.rounds.journal import Latest
from fedspallm_appfl.wire.durable import in_words
from fedspallm_appfl.wire.messages import Unit, plan
from fedspallm_appfl.wire.packed import Packed
from fedspallm_appfl.wire.store import PackedStore
from fedspallm_appfl.wire.update import compress, make_update, update_nbytes

BEFORE = -1  # the round that payloads name which bring a client where it stood
Bytes = Mapping[int, Mapping[str, int]]  # block -> linear -> bytes


@dataclass(frozen=True)
class Piece:
    """A part of an update that travels in one message.

    Attributes:
        round_index: the round that made it.
        number: which piece of the update, from 0.
        total: pieces of the update.
        units: its (block, linear) pairs.
        nbytes: bytes of its tensors.
        exchange: the exchange of the round that made it.
        store: where its matrices are; empty for what the exchange sends down.
    """

    round_index: int
    number: int
    total: int
    units: list[Unit]
    nbytes: int
    exchange: int = 0
    store: str = ""


class Pieces:
    """Cuts updates into pieces, and makes each ready for the wire when it is asked for."""

    def __init__(self, folder: Path, exchanges: Sequence[Exchange], compresses: bool) -> None:
        """Send what lies in the server's state.

        Args:
            folder: the server's state.
            exchanges: of the last round.
            compresses: with zstd.
        """
        self._folder, self._exchanges, self._compresses = folder, exchanges, compresses

    def of_exchange(self, round_index: int, exchange: int, units: set[Unit], limit: int) -> list[Piece]:
        """What an exchange has made.

        A piece is compressed once and kept on disk, as it goes down to every client.

        Raises:
            ConfigError: one matrix exceeds the limit.
        """
        pieces = _cut(_bytes_of(self._made_in(exchange), units), limit, round_index, exchange)
        return [self._compressed(piece) for piece in pieces] if self._compresses else pieces

    def before(self, exchange: int, held: set[Unit], limit: int) -> list[Piece]:
        """What clients were sent before an exchange and need in it or later.

        Args:
            exchange: the one that is on.
            held: matrices of the global model that they have as they are.
            limit: bytes of a piece.

        Raises:
            ConfigError: one matrix exceeds the limit.
        """
        wanted = {"weights": held}
        if exchange > 0 and self._exchanges[exchange - 1].down == "masks":
            wanted["masks"] = _units_of(PackedStore(self._folder / DOWN["masks"]))
        downs = {one.down: number for number, one in enumerate(self._exchanges)}  # what goes down -> an exchange of it
        pieces = []
        for down, units in wanted.items():
            if units:
                there = _bytes_of(PackedStore(self._folder / DOWN[down]), units)
                pieces += _cut(there, limit, BEFORE, downs[down], DOWN[down])
        return [replace(piece, number=number, total=len(pieces)) for number, piece in enumerate(pieces)]

    def of_store(self, store: str, without: set[Unit], round_index: int, limit: int) -> list[Piece]:
        """All of a store but what clients have.

        Raises:
            ConfigError: one matrix exceeds the limit.
        """
        packed = Latest(self._folder, store)
        return _cut(_bytes_of(packed, _units_of(packed) - without), limit, round_index, 0, store)

    def load(self, piece: Piece) -> dict[str, Any]:
        """A piece, ready for the wire."""
        if self._compresses and piece.store:
            return compress(self._made(piece))
        if self._compresses:
            update: dict[str, Any] = torch.load(self._file_of(piece), weights_only=True)
            return update
        return self._made(piece)

    def _compressed(self, piece: Piece) -> Piece:
        update = compress(self._made(piece))
        file = self._file_of(piece)
        with in_words(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("wb") as opened:  # torch has errors of its own for a full disk
                torch.save(update, opened)
        return replace(piece, nbytes=update_nbytes(update))

    def _file_of(self, piece: Piece) -> Path:
        return self._folder / "down" / f"{piece.number}.pt"

    def _made(self, piece: Piece) -> dict[str, Any]:
        # A store is sent without what the exchange that is on has made of it.
        store = PackedStore(self._folder / piece.store) if piece.store else self._made_in(piece.exchange)
        stored = {block: store.get(block) or {} for block in {block for block, _ in piece.units}}
        blocks: dict[int, dict[str, Packed]] = {}
        for block, name in piece.units:
            blocks.setdefault(block, {})[name] = stored[block][name]
        update = make_update(piece.round_index, blocks, piece.exchange)
        return update | {"piece": piece.number, "pieces": piece.total}

    def _made_in(self, exchange: int) -> PackedStore:
        return Latest(self._folder, DOWN[self._exchanges[exchange].down])


def _units_of(store: PackedStore) -> set[Unit]:
    return {(block, name) for block in store.blocks() for name in store.names(block)}


def _bytes_of(store: PackedStore, units: set[Unit]) -> Bytes:
    """Bytes of some matrices of a store."""
    return {
        block: {name: packed.nbytes for name, packed in (store.get(block) or {}).items() if (block, name) in units}
        for block in sorted({block for block, _ in units})
    }


def _cut(sizes: Bytes, limit: int, round_index: int, exchange: int, store: str = "") -> list[Piece]:
    """Matrices in pieces of at most `limit` bytes."""
    parts = plan(sizes, max(1, len(sizes)), limit)
    return [
        Piece(round_index, number, len(parts), units, sum(sizes[block][name] for block, name in units), exchange, store)
        for number, units in enumerate(parts)
    ]
