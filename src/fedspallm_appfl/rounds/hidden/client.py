"""A client's part in the secure sums of a round (see `secure.client` for the protocol)."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fedspallm_appfl.algorithms.algorithm import CONFIRM, KEYS, OPENING, SHARES
from fedspallm_appfl.errors import SecureSumError
from fedspallm_appfl.rounds.hidden.kept import Kept
from fedspallm_appfl.rounds.hidden.places import UNIT, Place, from_json, said, session, unlisted
from fedspallm_appfl.secure.client import Client
from fedspallm_appfl.secure.exchange import Exchange as Session
from fedspallm_appfl.secure.identity import Identity, Roster

VIEW = "view"  # under which it says what it was sent
KEY = "key"  # under which a client says what is for the server alone


class Hiding:
    """One client in one round.

    Args:
        name: of the client.
        roster: all clients; None where there are no secure sums.
        terms: hash of what all clients must have alike.
        numbers: the number of each hidden unit.
        folder: where its keys outlive the process, if they have to.
        identity: its secret key, where the roster has public ones.
    """

    def __init__(
        self,
        name: str,
        roster: Roster | None,
        terms: str,
        numbers: Mapping[Place, int],
        folder: Path | None = None,
        identity: Identity | None = None,
    ) -> None:
        self._name, self._roster, self._terms, self._numbers = name, roster, terms, numbers
        self._kept, self._identity = Kept(folder, name) if folder else None, identity
        self._client: Client | None = None
        self._run, self._round, self._exchange, self._view = "", 0, 0, ""
        self._says: dict[str, Callable[[Mapping[str, Any]], str]] = {
            KEYS: self._advertise,
            SHARES: self._share,
            CONFIRM: self._confirm,
            OPENING: self._open,
        }

    def begin(self, round_index: int, exchange: int, up: str, told: Mapping[str, Any], view: str) -> str:
        """Begin an exchange.

        Args:
            round_index: the round.
            exchange: its number.
            up: what goes up in it.
            told: what the server says of secure sums before it.
            view: hash of what the server has sent down, which words of this exchange depend on.

        Returns:
            What the client has to say in it; where it sends words that is the view.

        Raises:
            SecureSumError: the server breaks the protocol.
        """
        if self._client is None and up != KEYS:
            self._restore()
        self._round, self._exchange, self._view = round_index, exchange, view
        if "shares" in told:
            self._mine.receive(from_json(told["shares"], f"the shares that the server relays to client {self._name}"))
        if up in self._says:
            return self._says[up](told)
        _ = self._mine  # before anything is made that only keys can hide
        return said({VIEW: bytes.fromhex(view)})

    def mask(self, block: int, unit: str, words: Tensor) -> Tensor:
        """Hide the words of a unit.

        Raises:
            SecureSumError: others were hidden before.
        """
        return self._mine.mask(self._numbers[self._exchange, block, unit], UNIT, words, self._view)

    def keep(self, ended: bool) -> None:
        """Write down what cannot be made again, before anything that belongs to it leaves; forget it when a round ends.

        Raises:
            ConfigError: somebody else could read it.
            SecureSumError: another task has gone on with this client.
        """
        if self._kept is None or self._client is None:
            return
        if ended:
            self._kept.forget()
        else:
            kept = {"run": self._run, "round": self._round, "state": self._client.state().decode()}
            self._kept.write(json.dumps(kept))

    def _restore(self) -> None:
        found = self._kept and self._kept.read()
        if found:
            kept = json.loads(found)
            self._run, self._round = kept["run"], kept["round"]
            self._client = Client.restore(self._session(), self._name, self._identity, kept["state"].encode())

    def _session(self) -> Session:
        assert self._roster is not None
        return session(self._run, self._round, len(self._numbers), self._roster, self._terms)

    @property
    def _mine(self) -> Client:
        if self._client is None:
            raise SecureSumError(
                f"client {self._name} has no keys for secure sums: the server has not asked for them, or the machine that "
                "held them is another one than before; it takes part in the next round"
            )
        return self._client

    def _advertise(self, told: Mapping[str, Any]) -> str:
        if self._kept:
            self._kept.read()  # of a round that was cut off
        self._run = told["run"]
        self._client = Client(self._session(), self._name, self._identity)
        return said({KEY: self._client.advertise()})

    def _share(self, told: Mapping[str, Any]) -> str:
        return said(
            self._mine.share(from_json(told["batch"], f"the keys that the server relays to client {self._name}"))
        )

    def _confirm(self, told: Mapping[str, Any]) -> str:
        return said({KEY: self._mine.confirm(unlisted(told.get("survivors"), len(self._numbers), self._name))})

    def _open(self, told: Mapping[str, Any]) -> str:
        given = from_json(
            told.get("confirmations", {}), f"the confirmations that the server relays to client {self._name}"
        )
        return said({KEY: self._mine.open(unlisted(told.get("survivors"), len(self._numbers), self._name), given)})
