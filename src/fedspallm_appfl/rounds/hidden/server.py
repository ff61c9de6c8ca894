"""The server's part in the secure sums of a round (see `secure.server`)."""

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedspallm_appfl.algorithms.algorithm import KEYS, OPENING, SHARES, Exchange
from fedspallm_appfl.errors import SecureSumError
from fedspallm_appfl.rounds.hidden.client import KEY
from fedspallm_appfl.rounds.hidden.places import UNIT, Place, heard, listed, session, to_json
from fedspallm_appfl.secure.server import Server

RUN = 16  # random bytes of an id


class Sums:
    """All secure sums of one round.

    Args:
        round_index: the round.
        exchanges: of the round.
        roster: all clients.
        numbers: the number of each hidden unit.
        folder: for the sums, which are in files that are mapped: all of them stay until they are opened.
    """

    def __init__(
        self,
        round_index: int,
        exchanges: tuple[Exchange, ...],
        roster: list[str],
        numbers: Mapping[Place, int],
        folder: Path,
    ) -> None:
        self._folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        self._run, self._exchanges, self._numbers = os.urandom(RUN).hex(), exchanges, numbers
        self._server = Server(session(self._run, round_index, len(numbers), roster), self._room)
        self._open: set[int] = set()
        self._survivors: dict[int, list[str]] = {}  # of the exchange that is being opened

    def _room(self, message: int, unit: str, size: int) -> Tensor:
        self._folder.mkdir(parents=True, exist_ok=True)
        return torch.from_file(str(self._file(message)), shared=True, size=size, dtype=torch.int64)

    def _file(self, message: int) -> Path:
        return self._folder / f"{message:06d}"

    def hear(self, up: str, client: str, text: str) -> None:
        """Take what a client says in an exchange of keys.

        Raises:
            SecureSumError: it breaks the protocol.
        """
        parts = heard(text, f"the {up} of client {client}")
        if up == SHARES:
            self._server.shared(client, parts)
            return
        if set(parts) != {KEY}:
            raise SecureSumError(f"refused the {up} of client {client}: it has one part, got {len(parts)}")
        (self._server.advertised if up == KEYS else self._server.opened)(client, parts[KEY])

    def add(self, client: str, exchange: int, units: Mapping[tuple[int, str], Tensor]) -> None:
        """Add masked words of a client: (block, unit) -> (W,) int64, checked for their number.

        Raises:
            SecureSumError: they were not to come, and none was added.
        """
        for (block, unit), words in units.items():
            number = self._numbers[exchange, block, unit]
            if number not in self._open:
                self._server.begin(number, {UNIT: len(words)})
                self._open.add(number)
            self._server.add(client, number, {UNIT: words})

    def tell(self, exchange: int, client: str) -> dict[str, Any]:
        """What a client has to know before an exchange, in plain types.

        Raises:
            SecureSumError: too few clients take part.
        """
        up = self._exchanges[exchange].up
        if up == KEYS:
            return {"run": self._run}
        if up == SHARES:
            return {"batch": to_json(self._server.batch())}
        if up == OPENING:
            return {"survivors": listed(self._closed(exchange - 1))}
        if self._exchanges[exchange - 1].up == SHARES:
            return {"shares": to_json(self._server.shares_for(client))}
        return {}

    def _closed(self, exchange: int) -> dict[int, list[str]]:
        """Who is in the sums of an exchange; further words are refused."""
        mine = [number for place, number in self._numbers.items() if place[0] == exchange and number in self._open]
        if not self._survivors.keys() >= {*mine}:
            self._survivors = self._server.close(mine)
        return {number: self._survivors[number] for number in mine}

    def opened(self, exchange: int) -> Iterator[tuple[int, str, Tensor, int]]:
        """The sums of an exchange: (block, unit, words, number of clients); each is let go of.

        Raises:
            SecureSumError: too few clients have opened their shares.
        """
        of = {number: place for place, number in self._numbers.items() if place[0] == exchange}
        for number, names in self._closed(exchange).items():
            [(_, words)] = self._server.sums(number)
            self._file(number).unlink(missing_ok=True)  # what is mapped stays until it is let go of
            yield of[number][1], of[number][2], words, len(names)
            del words
        self._survivors = {}
