"""What all sides of an exchange know, and how messages of its clients are signed and read.

A message is `join(statement, signature)`, its statement `join(protocol, purpose, run, round, exchange, sender, hash of the
roster, hash of the settings, body)`.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from fedspallm_appfl.errors import ConfigError, SecureSumError, quoted
from fedspallm_appfl.secure import neighbours
from fedspallm_appfl.secure.encoding import join, split
from fedspallm_appfl.secure.identity import Identity, Roster
from fedspallm_appfl.secure.stream import PROTOCOL

CONFIRMATION = "confirmation of survivors"
Survivors = Mapping[int, Sequence[str]]  # message -> clients whose message arrived


@dataclass(frozen=True)
class Exchange:
    """One exchange of one round; each of its messages is summed over the clients from whom it came.

    Attributes:
        run: id of the run, never used again: messages of another run with this id could be replayed.
        round: number of the round.
        number: of the exchange in its round.
        messages: how many each client sends.
        roster: the clients.
        degree: neighbours of each client; None: everybody where clients sign, or else as `neighbours.degree` says.
        terms: hash of the settings that all clients must have alike; empty: of the server, which need not know them.

    Raises:
        ConfigError: clients that sign have fewer neighbours than everybody.
    """

    run: str
    round: int
    number: int
    messages: int
    roster: Roster
    degree: int | None = None
    terms: str = ""

    def __post_init__(self) -> None:
        everybody = len(self.roster.clients) - 1
        if self.roster.keys and self.degree not in (None, everybody):
            raise ConfigError(
                f"clients that sign have everybody else as neighbours, that is {everybody}, got {self.degree}: a server "
                "that lies could say of all neighbours of a client that they fell out; leave the degree out"
            )

    @property
    def context(self) -> tuple[str, int, int]:
        """What is in the `info` of every key."""
        return self.run, self.round, self.number

    @property
    def threshold(self) -> int:
        """Fewest clients that a sum is of. More than two thirds: two such sets have more than a third in common."""
        return 2 * len(self.roster.clients) // 3 + 1

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of all of it."""
        parts = *self.context, self.messages, self.roster.digest, self._degree, self.terms
        return hashlib.sha256(join(PROTOCOL, *parts)).digest()

    @property
    def _degree(self) -> int:
        if self.degree is not None:
            return self.degree
        clients = len(self.roster.clients)
        return clients - 1 if self.roster.keys else neighbours.degree(clients)

    @cached_property
    def members(self) -> dict[str, tuple[str, ...]]:
        """Of each client its neighbours and itself: those who hold shares of its secrets."""
        seed = hashlib.sha256(join("neighbours", *self.context, self.roster.digest)).digest()
        return neighbours.neighbourhoods(self.roster.clients, seed, self._degree)

    @property
    def shares_needed(self) -> int:
        """Shares that open a secret."""
        return neighbours.threshold(self._degree + 1)

    @property
    def masks_needed(self) -> int:
        """Members with whom a client makes masks, itself among them, at least.

        Where everybody is a neighbour, these have an honest client in common with any group that a sum is of.
        """
        return self.threshold if self._degree == len(self.roster.clients) - 1 else self.shares_needed

    def sign(self, purpose: str, sender: str, body: bytes, identity: Identity | None) -> bytes:
        """A message; without an identity its signature is empty."""
        statement = join(*self._head(purpose, sender).values(), body)
        return join(statement, identity.sign(statement) if identity else b"")

    def read(self, purpose: str, sender: str, message: bytes) -> bytes:
        """The body of a message.

        Raises:
            SecureSumError: it was signed for something else, by somebody else or by nobody.
        """
        what = f"the {purpose} of client {sender}"
        head = self._head(purpose, sender)
        parts = split(message, what)
        statement = split(parts[0], what) if len(parts) == 2 else []
        if len(statement) != len(head) + 1:
            raise SecureSumError(f"refused {what}: it does not have the form of a signed message")
        for (name, wanted), found in zip(head.items(), statement, strict=False):
            if found != wanted and (name != "settings" or self.terms):
                got = quoted(found.decode(errors="replace"))
                raise SecureSumError(
                    f"refused {what}: its {name} must be {wanted.decode()}, got {got}; it was made for another place, or "
                    "the sites have different rosters, or were told different settings"
                )
        if self.roster.keys and not parts[1]:
            raise SecureSumError(f"refused {what}: it is not signed; give client {sender} its identity")
        if self.roster.keys and not self.roster.verify(sender, parts[0], parts[1]):
            raise SecureSumError(
                f"refused {what}: its signature does not fit the key of client {sender} in the roster; it was changed on "
                "its way, or the client has another identity"
            )
        return statement[-1]

    def check_survivors(self, message: int, names: Sequence[str], what: str) -> None:
        """Whether some clients can be the survivors of a message.

        Raises:
            SecureSumError: begins with `what`: there is no such message, a name is wrong, or there are too few.
        """
        if not 0 <= message < self.messages:
            raise SecureSumError(f"{what}: there are messages 0 to {self.messages - 1}")
        if len({*names}) < len(names) or not {*names} <= {*self.roster.clients}:
            raise SecureSumError(f"{what}: each must be a client of the roster, once, got {', '.join(names)}")
        if len(names) < self.threshold:
            raise SecureSumError(
                f"{what}: of {len(self.roster.clients)} clients at least {self.threshold} must be left, got "
                f"{', '.join(names) or 'none'}; a sum of fewer is not opened"
            )

    def confirmation(self, sender: str, batch: bytes, survivors: Survivors, identity: Identity | None) -> bytes:
        """What a client signs of survivors, and of the batch of keys, without which one could be used with other keys."""
        return self.sign(CONFIRMATION, sender, _listed(batch, survivors), identity)

    def check_confirmation(self, sender: str, batch: bytes, survivors: Survivors, message: bytes) -> None:
        """Whether a client has signed these survivors.

        Args:
            sender: the client.
            batch: SHA-256 of the batch of keys.
            survivors: message -> clients.
            message: what it sent.

        Raises:
            SecureSumError: it has signed others, or not at all.
        """
        if sender not in self.members:
            raise SecureSumError(f"refused the {CONFIRMATION} of client {sender}: it is not in the roster")
        if self.read(CONFIRMATION, sender, message) != _listed(batch, survivors):
            raise SecureSumError(
                f"refused the {CONFIRMATION} of client {sender}: it is of other survivors or other keys; the server has "
                "told clients different ones, or has sent an earlier one"
            )

    def _head(self, purpose: str, sender: str) -> dict[str, bytes]:
        values = PROTOCOL, purpose, *self.context, sender, self.roster.digest.hex(), self.terms
        names = "protocol", "purpose", "run", "round", "exchange", "sender", "roster", "settings"
        return {name: str(value).encode() for name, value in zip(names, values, strict=True)}


def _listed(batch: bytes, survivors: Survivors) -> bytes:
    """Survivors as they are signed: one SHA-256, however many they are."""
    parts = [part for message in sorted(survivors) for part in (message, join(*sorted(survivors[message])))]
    return hashlib.sha256(join(batch, *parts)).digest()
