"""A client's side of secure sums.

Source: Bonawitz, Ivanov, Kreuter, Marcedone, McMahan, Patel, Ramage, Segal, Seth, "Practical Secure Aggregation for
Privacy-Preserving Machine Learning", CCS 2017, figure 4. One run of their protocol is one message here; keys and shares of
all messages of an exchange travel together. Deviations: a client shares its secrets with itself as well, keys of shares
depend on the whole batch of public keys, and shares are announced by their SHA-256 (`shares`). Shares of more than half of
the clients open a secret; everything else needs more than two thirds of them, as in the paper.

    advertise -> share -> receive -> mask, for each message -> confirm -> open

All secrets follow from 32 random bytes. A client that goes on after an interruption is made of its `state`; it repeats what
it has sent, and uses no mask for anything else. The state has to be stored before what it belongs to is sent.
"""

import json
import os
from collections.abc import Mapping

import torch
from cryptography.hazmat.primitives.poly1305 import Poly1305
from torch import Tensor

from fedspallm_appfl.errors import ConfigError, SecureSumError
from fedspallm_appfl.secure import keys as key_exchange
from fedspallm_appfl.secure import shamir, shares
from fedspallm_appfl.secure.encoding import join
from fedspallm_appfl.secure.exchange import Exchange, Survivors
from fedspallm_appfl.secure.identity import Identity
from fedspallm_appfl.secure.stream import KEY, add_streams, derive, pair_key, self_key


class Client:
    """One client in one exchange.

    Args:
        exchange: what all sides know.
        name: of the client.
        identity: its secret key, where the roster has public ones.
        root: 32 random bytes that all secrets follow from; None: new ones.

    Raises:
        ConfigError: the roster has no such client, or another key of it.
    """

    def __init__(
        self, exchange: Exchange, name: str, identity: Identity | None = None, root: bytes | None = None
    ) -> None:
        if name not in exchange.members:
            raise ConfigError(f"client {name} is not in the roster, which has {', '.join(exchange.roster.clients)}")
        if exchange.roster.keys and (identity is None or identity.public != exchange.roster.keys[name]):
            raise ConfigError(
                f"the roster has another key of client {name} than its identity; give sites the new roster"
            )
        self.exchange, self.name, self._identity = exchange, name, identity
        self._root = os.urandom(KEY) if root is None else root
        self._batch: dict[str, bytes] = {}
        self._digest = b""  # of the batch
        self._keys: dict[str, key_exchange.PublicKeys] = {}
        self._sealed: dict[str, bytes] = {}  # sender -> what came
        self._shares: dict[str, list[shares.Pair]] = {}
        self._masked: dict[int, dict[str, str]] = {}  # message -> unit -> fingerprint of its words
        self._survivors: dict[int, list[str]] = {}
        self._agreed: dict[tuple[int, str], bytes] = {}

    def advertise(self) -> bytes:
        """Its public keys, for the server."""
        private = [self._sealing_key, *map(self._mask_key, range(self.exchange.messages))]
        body = join(*map(key_exchange.public_key, private))
        return self.exchange.sign(key_exchange.PURPOSE, self.name, body, self._identity)

    def share(self, batch: Mapping[str, bytes]) -> dict[str, bytes]:
        """Share its secrets.

        Args:
            batch: client -> what it advertised.

        Returns:
            Neighbour -> shares that only this neighbour can read; one is for the client itself.

        Raises:
            SecureSumError: the batch is refused, or another one came before.
        """
        keys = key_exchange.read_batch(self.exchange, batch)
        if batch.get(self.name) != self.advertise():
            raise SecureSumError(
                f"client {self.name} refused a batch of keys: its own keys are not in it as it sent them"
            )
        if self._batch and batch != self._batch:
            raise SecureSumError(f"client {self.name} refused a second batch of keys: its secrets are shared once")
        self._batch, self._keys = dict(batch), keys
        self._digest = key_exchange.batch_digest(batch)
        receivers = self._neighbours(keys, "advertised keys")
        points = [self.exchange.roster.clients.index(one) + 1 for one in receivers]
        split = [
            [
                shamir.split(
                    secret, self.exchange.shares_needed, points, self._derive(f"coefficients of a {kind}", message)
                )
                for kind, secret in (("seed", self._seed(message)), ("mask key", self._mask_key(message)))
            ]
            for message in range(self.exchange.messages)
        ]
        return {
            receiver: shares.seal(self._sealing(self.name, receiver), [(seeds[i], keys[i]) for seeds, keys in split])
            for i, receiver in enumerate(receivers)
        }

    def receive(self, sealed: Mapping[str, bytes]) -> None:
        """Keep the shares of its neighbours; it makes masks with these and no others.

        Args:
            sealed: neighbour -> what it shared with this client.

        Raises:
            SecureSumError: a share is refused, too few came, or others came before.
        """
        if self._sealed and dict(sealed) != self._sealed:
            raise SecureSumError(f"client {self.name} refused other shares than before: it makes masks with one group")
        if strangers := {*sealed} - {*self._neighbours(self._keys, "advertised keys")}:
            raise SecureSumError(
                f"client {self.name} refused shares of {', '.join(sorted(strangers))}: no neighbour of it"
            )
        senders = self._neighbours(sealed, "shared their secrets")
        found = {
            sender: shares.unseal(
                self._sealing(sender, self.name),
                sealed[sender],
                self.exchange.messages,
                f"the shares of client {sender} for client {self.name}",
            )
            for sender in senders
        }
        if self.name not in found:
            raise SecureSumError(f"client {self.name} refused shares of its neighbours: its own are not among them")
        self._sealed, self._shares = dict(sealed), found

    def mask(self, message: int, unit: str, words: Tensor, view: str = "") -> Tensor:
        """Hide words of a message.

        Args:
            message: its number in the exchange.
            unit: which of the sums of the message.
            words: (W,) int64, on the CPU.
            view: hash of what the words depend on and the server has sent; masks cancel between clients that saw the same.

        Returns:
            (W,) int64, of which only a sum over clients says anything.

        Raises:
            SecureSumError: shares have not come, or other words of this unit were hidden before: their difference would
                be seen.
        """
        if not self._shares or not 0 <= message < self.exchange.messages:
            raise SecureSumError(
                f"client {self.name} cannot mask message {message} of {self.exchange.messages}: it needs shares first"
            )
        once = Poly1305(self._derive("fingerprint", message, unit))
        once.update(view.encode() + b" ")
        once.update(words.view(torch.uint8).numpy().data)
        known, found = self._masked.setdefault(message, {}), once.finalize().hex()
        if known.setdefault(unit, found) != found:
            raise SecureSumError(
                f"client {self.name} refused to mask {unit} of message {message} again: its words have changed; repeat "
                "the ones that were sent"
            )
        place = *self.exchange.context, message, unit, view
        pairs = {
            other: pair_key(self._agree(message, other), self.name, other, *place)
            for other in self._shares
            if other != self.name
        }
        masked = words.clone()
        add_streams(
            masked,
            [self_key(self._seed(message), *place), *(key for other, key in pairs.items() if self.name < other)],
            [key for other, key in pairs.items() if self.name > other],
        )
        return masked

    def confirm(self, survivors: Survivors) -> bytes:
        """Sign whose messages arrived; it will open these messages for no other clients.

        Raises:
            SecureSumError: as `open`.
        """
        self._settle(survivors)
        return self.exchange.confirmation(self.name, self._digest, survivors, self._identity)

    def open(self, survivors: Survivors, confirmations: Mapping[str, bytes] | None = None) -> bytes:
        """Shares with which the server takes the masks out of sums; only of messages whose survivor this client is.

        Args:
            survivors: message -> clients whose message arrived. Of these a share of the seed is given, of the others one
                of the mask key.
            confirmations: client -> what `confirm` made of the same survivors; needed where the roster has keys.

        Raises:
            SecureSumError: there are too few survivors, or others than before, or too few clients have confirmed them.
        """
        self._settle(survivors)
        if self.exchange.roster.keys:
            given = confirmations or {}
            for client, message in given.items():
                self.exchange.check_confirmation(client, self._digest, survivors, message)
            for number, names in survivors.items():
                if len(confirmed := sorted({*given} & {*names})) < self.exchange.threshold:
                    raise SecureSumError(
                        f"client {self.name} does not open message {number}: at least {self.exchange.threshold} of its "
                        f"survivors must have confirmed the same ones, got {', '.join(confirmed) or 'none'}"
                    )
        own = {number: names for number, names in survivors.items() if self.name in names}
        return shares.opening(self.exchange, self.name, self._shares, own, self._identity)

    def state(self) -> bytes:
        """All that the client needs to go on, secrets among it."""
        hexed = [{name: part.hex() for name, part in one.items()} for one in (self._batch, self._sealed)]
        parts = self.exchange.digest.hex(), self.name, self._root.hex(), *hexed, self._masked, self._survivors
        return json.dumps(parts).encode()

    @classmethod
    def restore(cls, exchange: Exchange, name: str, identity: Identity | None, state: bytes) -> "Client":
        """The client of a state; only of one's own, it is not checked as what comes from outside.

        Raises:
            ConfigError: the state is of another exchange or another client.
        """
        digest, of, root, batch, sealed, masked, survivors = json.loads(state)
        if (digest, of) != (exchange.digest.hex(), name):
            raise ConfigError(
                f"the state of client {of} is of another client or exchange than {name} in {exchange.context}"
            )
        client = cls(exchange, name, identity, bytes.fromhex(root))
        if batch:
            client.share({one: bytes.fromhex(part) for one, part in batch.items()})
        if sealed:
            client.receive({one: bytes.fromhex(part) for one, part in sealed.items()})
        client._masked = {int(message): units for message, units in masked.items()}
        client._survivors = {int(message): names for message, names in survivors.items()}
        return client

    def _settle(self, survivors: Survivors) -> None:
        """Note the survivors, if they are what they can be."""
        for message, names in survivors.items():
            what = f"client {self.name} refused the survivors of message {message}"
            self.exchange.check_survivors(message, names, what)
            if self._survivors.get(message, names := sorted(names)) != names:
                raise SecureSumError(f"{what}: it has confirmed others, {', '.join(self._survivors[message])}")
            if strange := [one for one in names if one in self.exchange.members[self.name] and one not in self._shares]:
                raise SecureSumError(f"{what}: it has no shares of {', '.join(strange)}")
            if self.name in names and message not in self._masked:
                raise SecureSumError(f"{what}: it is among them, and has sent no such message")
        self._survivors |= {message: sorted(names) for message, names in survivors.items()}

    def _neighbours(self, of: Mapping[str, object], have: str) -> list[str]:
        """Those of its neighbours and itself that are among some clients."""
        found = [one for one in self.exchange.members[self.name] if one in of]
        if len(found) < self.exchange.masks_needed:
            raise SecureSumError(
                f"client {self.name} needs {self.exchange.masks_needed} of its neighbours and itself, got {len(found)} "
                f"that {have}: {', '.join(found)}"
            )
        return found

    def _derive(self, purpose: str, *what: str | int) -> bytes:
        """A secret of its own that belongs to the batch: with another batch it would be another one."""
        return derive(self._root, purpose, *self.exchange.context, self._digest, *what)

    def _seed(self, message: int) -> bytes:
        return self._derive("seed", message)

    @property
    def _sealing_key(self) -> bytes:
        return derive(self._root, "sealing key", *self.exchange.context)

    def _mask_key(self, message: int) -> bytes:
        return derive(self._root, "mask key", *self.exchange.context, message)

    def _sealing(self, sender: str, receiver: str) -> bytes:
        """The key under which one client's shares for another travel."""
        other = receiver if sender == self.name else sender
        secret = key_exchange.agree(self._sealing_key, self._keys[other].sealing, other)
        return derive(secret, "shares", *self.exchange.context, self._digest, sender, receiver)

    def _agree(self, message: int, other: str) -> bytes:
        """The secret of a message and a neighbour; units of a message share it."""
        if (message, other) not in self._agreed:
            mine, theirs = self._mask_key(message), self._keys[other].masks[message]
            self._agreed[message, other] = key_exchange.agree(mine, theirs, other)
        return self._agreed[message, other]
