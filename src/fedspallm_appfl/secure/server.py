"""The server's side of secure sums; the protocol is described in `client`.

It relays keys and shares, adds up what arrives, and takes out the masks that do not cancel: the own masks of clients whose
message arrived, and the masks that they share with clients whose message did not. It keeps one sum for each unit of an open
message.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from fedspallm_appfl.errors import SecureSumError
from fedspallm_appfl.secure import keys as key_exchange
from fedspallm_appfl.secure import shamir, shares
from fedspallm_appfl.secure.exchange import Exchange, Survivors
from fedspallm_appfl.secure.stream import add_streams, pair_key, self_key


class Server:
    """The server in one exchange.

    Args:
        exchange: what all sides know.
        room: (message, unit, W) -> (W,) int64 zeros for a sum; None: in memory.
    """

    def __init__(self, exchange: Exchange, room: Callable[[int, str, int], Tensor] | None = None) -> None:
        self.exchange, self._room = exchange, room or (lambda message, unit, size: torch.zeros(size, dtype=torch.int64))
        self._advertised: dict[str, bytes] = {}
        self._keys: dict[str, key_exchange.PublicKeys] = {}  # not empty: the batch is complete
        self._sealed: dict[str, Mapping[str, bytes]] = {}  # sender -> receiver -> shares
        self._announced: dict[tuple[str, str], list[shares.Pair]] = {}  # sender, receiver -> SHA-256 of shares
        self._sharing = True
        self._sums: dict[int, dict[str, Tensor]] = {}
        self._arrived: dict[int, list[str]] = {}
        self._survivors: dict[int, list[str]] = {}
        self._opened: dict[tuple[int, str], dict[str, bytes]] = {}  # message, whose -> by whom -> share

    def advertised(self, client: str, message: bytes) -> None:
        """Take a client's keys.

        Raises:
            SecureSumError: they are refused, it sent others before, or the batch is complete.
        """
        if self._advertised.get(client, message) != message or (self._keys and client not in self._keys):
            raise SecureSumError(
                f"refused keys of client {client}: it has sent others, or comes after the others' were relayed"
            )
        key_exchange.check_points(client, key_exchange.read_keys(self.exchange, client, message))
        self._advertised[client] = message

    def batch(self) -> dict[str, bytes]:
        """Keys of all clients, for each of them; further clients are refused.

        Raises:
            SecureSumError: there are too few, or two have the same.
        """
        self._keys = self._keys or key_exchange.read_batch(self.exchange, self._advertised)
        return dict(self._advertised)

    def shared(self, client: str, sealed: Mapping[str, bytes]) -> None:
        """Take a client's shares for its neighbours.

        Raises:
            SecureSumError: they are refused, or come after the others' were relayed.
        """
        what = f"the shares of client {client}"
        if client not in self._keys:
            raise SecureSumError(f"refused {what}: its keys were not relayed")
        if not self._sharing and self._sealed.get(client) != sealed:
            raise SecureSumError(f"refused {what}: they come after the others' were relayed, or have changed")
        wanted = {one for one in self.exchange.members[client] if one in self._keys}
        if {*sealed} != wanted:
            raise SecureSumError(f"refused {what}: they must be for {', '.join(sorted(wanted))}")
        found = {(client, to): shares.announced(part, self.exchange.messages, what) for to, part in sealed.items()}
        self._announced |= found
        self._sealed[client] = dict(sealed)

    def shares_for(self, client: str) -> dict[str, bytes]:
        """Shares for a client, by sender; further ones are refused.

        Raises:
            SecureSumError: too few clients have shared their secrets, or this one has not.
        """
        if len(self._sealed) < self.exchange.threshold or client not in self._sealed:
            raise SecureSumError(
                f"at least {self.exchange.threshold} clients must share their secrets, client {client} among them, got "
                f"{', '.join(self._sealed) or 'none'}"
            )
        self._sharing = False
        return {sender: sealed[client] for sender, sealed in sorted(self._sealed.items()) if client in sealed}

    def begin(self, message: int, units: Mapping[str, int]) -> None:
        """Open a message.

        Args:
            message: its number.
            units: unit -> words of its sum.

        Raises:
            ValueError: there is no such message, or it was opened before.
        """
        if message in self._sums or not 0 <= message < self.exchange.messages:
            raise ValueError(f"message {message} of {self.exchange.messages} cannot be opened, or was before")
        self._sums[message] = {unit: self._room(message, unit, size) for unit, size in units.items()}
        self._arrived[message] = []

    def add(self, client: str, message: int, units: Mapping[str, Tensor]) -> None:
        """Add a whole message of a client; if it is refused, nothing of it was added.

        Args:
            client: its sender.
            message: its number.
            units: unit -> masked words, (W,) int64.

        Raises:
            SecureSumError: it is not what the message must be, or comes too late or twice.
        """
        what = f"message {message} of client {client}"
        if client not in self._sealed or self._sharing:
            raise SecureSumError(
                f"refused {what}: others have no shares of its secrets; it takes part in the next exchange"
            )
        if message not in self._sums or message in self._survivors or client in self._arrived[message]:
            raise SecureSumError(f"refused {what}: the message is not open, or it has come before")
        sums = self._sums[message]
        if {*units} != {*sums}:
            raise SecureSumError(f"refused {what}: its units must be {', '.join(sums)}")
        for unit, words in units.items():
            if not isinstance(words, Tensor) or words.dtype != torch.int64 or words.shape != sums[unit].shape:
                raise SecureSumError(f"refused {what}: {unit} must be {len(sums[unit])} words of int64")
        for unit, words in units.items():
            sums[unit] += words
        self._arrived[message].append(client)

    def close(self, messages: Iterable[int]) -> dict[int, list[str]]:
        """Close messages; what comes later is refused.

        Returns:
            message -> clients whose message arrived.

        Raises:
            SecureSumError: these are too few.
        """
        found = {message: sorted(self._arrived[message]) for message in messages}
        for message, names in found.items():
            self.exchange.check_survivors(message, names, f"message {message} has too few survivors")
        self._survivors |= found
        return found

    def confirmed(self, client: str, survivors: Survivors, message: bytes) -> None:
        """Check that a client has signed these survivors.

        Raises:
            SecureSumError: it has not.
        """
        self.exchange.check_confirmation(client, key_exchange.batch_digest(self._advertised), survivors, message)

    def opened(self, client: str, message: bytes) -> None:
        """Take the shares that a client has opened.

        Raises:
            SecureSumError: one is not what was announced, or not of what should be opened.
        """
        what = f"opened shares of client {client}"
        if client not in self._sealed:
            raise SecureSumError(f"refused {what}: it holds none")
        found = shares.read_opening(self.exchange, client, message)
        for number, opened in found.items():
            if number not in self._survivors:
                raise SecureSumError(f"refused {what}: message {number} is not closed")
            for dealer, share in opened.items():
                kind = shares.SEED if dealer in self._survivors[number] else shares.MASK_KEY
                pairs = self._announced.get((dealer, client))
                if pairs is None or hashlib.sha256(share).digest() != pairs[number][kind]:
                    raise SecureSumError(f"refused {what}: in message {number}, that of client {dealer} is a wrong one")
        for number, opened in found.items():
            for dealer, share in opened.items():
                self._opened.setdefault((number, dealer), {})[client] = share

    def sums(self, message: int, view: str = "") -> Iterator[tuple[str, Tensor]]:
        """The sums of a closed message over its survivors, unit by unit; each is handed out once.

        Args:
            message: its number.
            view: hash of what the server has sent to clients, as in `Client.mask`.

        Yields:
            unit, (W,) int64.

        Raises:
            SecureSumError: too few clients have opened their shares.
        """
        seeds = [self._secret(message, client) for client in self._survivors[message]]
        left = list(self._left_over(message))
        for unit in list(self._sums[message]):
            place = *self.exchange.context, message, unit, view
            own = [self_key(seed, *place) for seed in seeds]
            added = [pair_key(secret, one, fallen, *place) for one, fallen, secret in left if one < fallen]
            subtracted = [pair_key(secret, one, fallen, *place) for one, fallen, secret in left if one > fallen]
            words = self._sums[message].pop(unit)
            add_streams(words, subtracted, own + added)
            yield unit, words

    def _left_over(self, message: int) -> Iterator[tuple[str, str, bytes]]:
        """Masks that do not cancel: survivor, the client that fell out, the secret of both."""
        survivors = self._survivors[message]
        for fallen in sorted({*self._sealed} - {*survivors}):
            if touched := [one for one in self.exchange.members[fallen] if one in survivors]:
                private = self._secret(message, fallen)
                if key_exchange.public_key(private) != self._keys[fallen].masks[message]:
                    raise SecureSumError(f"client {fallen} has shared another mask key than its own; leave it out")
                for one in touched:
                    yield one, fallen, key_exchange.agree(private, self._keys[one].masks[message], one)

    def _secret(self, message: int, client: str) -> bytes:
        given, needed = self._opened.get((message, client), {}), self.exchange.shares_needed
        if len(given) < needed:
            raise SecureSumError(
                f"message {message} cannot be opened: of the secrets of client {client} {needed} shares are needed, got "
                f"{len(given)}: {', '.join(sorted(given)) or 'none'}"
            )
        clients = self.exchange.roster.clients
        return shamir.combine({clients.index(one) + 1: given[one] for one in sorted(given)[:needed]})
