"""A client's part in the secure sums of a round (see `secure.client` for the protocol)."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from fedspallm_appfl.algorithms.algorithm import KEYS, OPENING, SHARES
from fedspallm_appfl.errors import SecureSumError
from fedspallm_appfl.rounds.hidden.places import UNIT, Place, from_json, said, session, unlisted
from fedspallm_appfl.secure.client import Client

KEY = "key"  # under which a client says what is for the server alone


class Hiding:
    """One client in one round.

    Args:
        name: of the client.
        roster: all clients.
        numbers: the number of each hidden unit.
    """

    def __init__(self, name: str, roster: list[str], numbers: Mapping[Place, int]) -> None:
        self._name, self._roster, self._numbers = name, roster, numbers
        self._client: Client | None = None
        self._exchange = 0
        self._says: dict[str, Callable[[Mapping[str, Any]], str]] = {
            KEYS: self._advertise,
            SHARES: self._share,
            OPENING: self._open,
        }

    def begin(self, round_index: int, exchange: int, up: str, told: Mapping[str, Any]) -> str:
        """Begin an exchange.

        Args:
            round_index: the round.
            exchange: its number.
            up: what goes up in it.
            told: what the server says of secure sums before it.

        Returns:
            What the client has to say in it; empty where it sends words.

        Raises:
            SecureSumError: the server breaks the protocol.
        """
        self._round, self._exchange = round_index, exchange
        if "shares" in told:
            self._mine.receive(from_json(told["shares"], f"the shares that the server relays to client {self._name}"))
        return self._says[up](told) if up in self._says else ""

    def mask(self, block: int, unit: str, words: Tensor) -> Tensor:
        """Hide the words of a unit.

        Raises:
            SecureSumError: others were hidden before.
        """
        return self._mine.mask(self._numbers[self._exchange, block, unit], UNIT, words)

    @property
    def _mine(self) -> Client:
        if self._client is None:
            raise SecureSumError(f"client {self._name} has no keys for secure sums: the server has not asked for them")
        return self._client

    def _advertise(self, told: Mapping[str, Any]) -> str:
        of = session(told["run"], self._round, len(self._numbers), self._roster)
        self._client = Client(of, self._name)
        return said({KEY: self._client.advertise()})

    def _share(self, told: Mapping[str, Any]) -> str:
        return said(
            self._mine.share(from_json(told["batch"], f"the keys that the server relays to client {self._name}"))
        )

    def _open(self, told: Mapping[str, Any]) -> str:
        return said({KEY: self._mine.open(unlisted(told["survivors"]))})
