"""The server's part in the secure sums of a round (see `secure.server`)."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedspallm_appfl.algorithms.algorithm import CONFIRM, KEYS, OPENING, SHARES, Exchange
from fedspallm_appfl.errors import FederationError, SecureSumError
from fedspallm_appfl.rounds.hidden.client import KEY, VIEW
from fedspallm_appfl.rounds.hidden.places import UNIT, Place, heard, listed, session, summed_in, to_json
from fedspallm_appfl.secure.identity import Roster
from fedspallm_appfl.secure.server import Server
from fedspallm_appfl.wire.durable import in_words

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
        roster: Roster,
        numbers: Mapping[Place, int],
        folder: Path,
    ) -> None:
        self._folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        self._run, self._exchanges, self._numbers = os.urandom(RUN).hex(), exchanges, numbers
        self._server = Server(session(self._run, round_index, len(numbers), roster), self._room)
        self._open: set[int] = set()
        self._survivors: dict[int, list[str]] = {}  # of the exchange that is being opened
        self._confirmations: dict[str, bytes] = {}  # of these

    def _room(self, message: int, unit: str, size: int) -> Tensor:
        file = self._file(message)
        with in_words(file):
            self._folder.mkdir(parents=True, exist_ok=True)
            with file.open("wb") as made:
                os.posix_fallocate(made.fileno(), 0, size * torch.int64.itemsize)  # else a full disk is a signal later
        return torch.from_file(str(file), shared=True, size=size, dtype=torch.int64)

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
        if up == CONFIRM:
            self._server.confirmed(client, self._survivors, parts[KEY])
            self._confirmations[client] = parts[KEY]
            return
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

    def require_view(self, client: str, text: str, view: str) -> None:
        """Refuse words of a client that was sent something else than this server knows of.

        Raises:
            SecureSumError: it was.
        """
        what = f"the words of client {client}"
        if heard(text, what).get(VIEW) != bytes.fromhex(view):
            raise SecureSumError(
                f"refused {what}: they depend on what came down, and it was sent something else than the others; it takes "
                "part in the next round"
            )

    def tell(self, exchange: int, client: str) -> dict[str, Any]:
        """What a client has to know before an exchange, in plain types.

        Raises:
            FederationError: too few clients take part.
        """
        with _for_all():
            return self._told(exchange, client)

    def _told(self, exchange: int, client: str) -> dict[str, Any]:
        up = self._exchanges[exchange].up
        if up == KEYS:
            return {"run": self._run}
        if up == SHARES:
            return {"batch": to_json(self._server.batch())}
        if up in (CONFIRM, OPENING):
            survivors = self._closed(summed_in(self._exchanges, exchange))
            confirmed = {} if up == CONFIRM else {"confirmations": to_json(self._confirmed())}
            return {"survivors": listed(survivors), **confirmed}
        if self._exchanges[exchange - 1].up == SHARES:
            return {"shares": to_json(self._server.shares_for(client))}
        return {}

    def _confirmed(self) -> dict[str, bytes]:
        """What survivors have signed of each other; nothing where they have no identities."""
        least, given = self._server.exchange.threshold, self._confirmations
        few = self._server.exchange.roster.keys and [
            names for names in self._survivors.values() if len({*given} & {*names}) < least
        ]
        if few:
            raise SecureSumError(
                f"sums cannot be opened: at least {least} clients whose part is in them must confirm it, got "
                f"{', '.join(sorted(given)) or 'none'}"
            )
        return given

    def _closed(self, exchange: int) -> dict[int, list[str]]:
        """Who is in the sums of an exchange; further words are refused."""
        mine = [number for place, number in self._numbers.items() if place[0] == exchange and number in self._open]
        if not self._survivors.keys() >= {*mine}:
            self._survivors = self._server.close(mine)
        return {number: self._survivors[number] for number in mine}

    def opened(self, exchange: int, view: str) -> Iterator[tuple[int, str, Tensor, int]]:
        """The sums of an exchange: (block, unit, words, number of clients); each is let go of.

        Args:
            exchange: its number.
            view: hash of what was sent before it.

        Raises:
            FederationError: too few clients have opened their shares.
        """
        of = {number: place for place, number in self._numbers.items() if place[0] == exchange}
        for number, names in self._closed(exchange).items():
            with _for_all():
                [(_, words)] = self._server.sums(number, view)
            self._file(number).unlink(missing_ok=True)  # what is mapped stays until it is let go of
            yield of[number][1], of[number][2], words, len(names)
            del words
        self._survivors, self._confirmations = {}, {}


@contextmanager
def _for_all() -> Iterator[None]:
    """End the run where the protocol cannot go on, whoever's message came last: it is not to blame.

    Raises:
        FederationError: it cannot.
    """
    try:
        yield
    except SecureSumError as error:
        raise FederationError(str(error)) from error
