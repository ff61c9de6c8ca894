"""Public keys of an exchange: one of each client to seal shares with, and one a message to make masks with (X25519).

A mask key belongs to one message: the keys of a client that falls out are opened, and its earlier messages stay hidden.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from fedspallm_appfl.errors import SecureSumError
from fedspallm_appfl.secure.encoding import join, split
from fedspallm_appfl.secure.exchange import Exchange
from fedspallm_appfl.secure.stream import KEY

PURPOSE = "public keys"


@dataclass(frozen=True)
class PublicKeys:
    """Public keys of one client, 32 bytes each.

    Attributes:
        sealing: for shares.
        masks: one a message.
    """

    sealing: bytes
    masks: tuple[bytes, ...]


def read_keys(exchange: Exchange, client: str, message: bytes) -> PublicKeys:
    """Keys that a client advertised.

    Raises:
        SecureSumError: the client is not in the roster, its message is not its own, or is of other messages.
    """
    if client not in exchange.members:
        raise SecureSumError(f"refused keys of client {client}: it is not in the roster")
    sealing, *masks = split(exchange.read(PURPOSE, client, message), f"the keys of client {client}") or [b""]
    if len(masks) != exchange.messages or any(len(key) != KEY for key in (sealing, *masks)):
        raise SecureSumError(
            f"refused the keys of client {client}: {exchange.messages} messages need {exchange.messages + 1} keys of "
            f"{KEY} bytes, got {len(masks) + 1}"
        )
    return PublicKeys(sealing, tuple(masks))


def read_batch(exchange: Exchange, batch: Mapping[str, bytes]) -> dict[str, PublicKeys]:
    """Keys of all clients that advertised.

    Raises:
        SecureSumError: one is refused, two are the same, or there are too few clients.
    """
    keys = {client: read_keys(exchange, client, message) for client, message in sorted(batch.items())}
    if len(keys) < exchange.threshold:
        raise SecureSumError(
            f"refused keys of {len(keys)} clients: of {len(exchange.members)} at least {exchange.threshold} must take "
            f"part; these have: {', '.join(keys)}"
        )
    times = Counter(key for one in keys.values() for key in (one.sealing, *one.masks))
    if twice := [client for client, one in keys.items() if any(times[key] > 1 for key in (one.sealing, *one.masks))]:
        raise SecureSumError(f"refused the keys of client {' and '.join(twice)}: a key is used once")
    return keys


def batch_digest(batch: Mapping[str, bytes]) -> bytes:
    """SHA-256 of a batch: who saw another one derives other keys."""
    return hashlib.sha256(join(*(part for pair in sorted(batch.items()) for part in pair))).digest()


def public_key(private: bytes) -> bytes:
    """The public key of 32 private bytes."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def check_points(client: str, keys: PublicKeys) -> None:
    """Whether all keys make secrets: whose private key it is makes no difference.

    Raises:
        SecureSumError: one does not.
    """
    for key in (keys.sealing, *keys.masks):
        agree(bytes(KEY), key, client)


def agree(private: bytes, public: bytes, whose: str) -> bytes:
    """The secret of two keys, 32 bytes.

    Raises:
        SecureSumError: the public key is a point that makes no secret.
    """
    try:
        return X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise SecureSumError(f"refused a key of client {whose}: it makes no secret ({error})") from error
