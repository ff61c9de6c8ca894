"""Shares on their way from one client to another, and opened to the server.

For each message a client has two secrets: the seed of its own mask, and its private mask key. To each neighbour goes a
share of each, encrypted, and the SHA-256 of each share in the clear: with it the server recognizes a wrong share, and the
neighbour compares it when the share arrives.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import TypeVar

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from fedspallm_appfl.errors import SecureSumError
from fedspallm_appfl.secure.encoding import join, split
from fedspallm_appfl.secure.exchange import Exchange, Survivors
from fedspallm_appfl.secure.identity import Identity
from fedspallm_appfl.secure.shamir import SHARE

Name = TypeVar("Name", int, str)
OPENING = "opened shares"

Pair = tuple[bytes, bytes]  # of a message: share of the seed, share of the mask key
SEED, MASK_KEY = 0, 1
DIGEST = 32  # bytes
_NONCE = bytes(12)  # a key seals one message


def seal(key: bytes, shares: Sequence[Pair]) -> bytes:
    """What travels.

    Args:
        key: of this sender, this receiver and this batch.
        shares: a pair a message.
    """
    flat = [share for pair in shares for share in pair]
    digests = b"".join(hashlib.sha256(share).digest() for share in flat)
    return join(digests, ChaCha20Poly1305(key).encrypt(_NONCE, b"".join(flat), digests))


def announced(sealed: bytes, messages: int, what: str) -> list[Pair]:
    """SHA-256 of the shares.

    Args:
        sealed: what travels.
        messages: of the exchange.
        what: the message and its sender, for errors.

    Raises:
        SecureSumError: it does not have this form.
    """
    digests, _ = _parts(sealed, messages, what)
    return _pairs(digests, DIGEST)


def unseal(key: bytes, sealed: bytes, messages: int, what: str) -> list[Pair]:
    """The shares; arguments as above.

    Raises:
        SecureSumError: it was not sealed with this key, or the shares are not those that were announced.
    """
    digests, encrypted = _parts(sealed, messages, what)
    try:
        flat = ChaCha20Poly1305(key).decrypt(_NONCE, encrypted, digests)
    except InvalidTag as error:
        raise SecureSumError(
            f"refused {what}: they cannot be decrypted; they were changed on their way, or sender and receiver were told "
            "of different keys"
        ) from error
    shares = _pairs(flat, SHARE)
    if [hashlib.sha256(share).digest() for pair in shares for share in pair] != [
        digest for pair in _pairs(digests, DIGEST) for digest in pair
    ]:
        raise SecureSumError(f"refused {what}: they are not those that it announced")
    return shares


def opening(
    exchange: Exchange, name: str, held: Mapping[str, Sequence[Pair]], survivors: Survivors, identity: Identity | None
) -> bytes:
    """What a client opens to the server.

    Args:
        exchange: what all sides know.
        name: of the client.
        held: client -> the pairs that it has of this client.
        survivors: message -> clients whose message arrived: of these it opens the seed's share, of others the mask key's.
        identity: of the client.
    """
    parts: list[bytes | int] = []
    for message in sorted(survivors):
        kinds = {dealer: SEED if dealer in survivors[message] else MASK_KEY for dealer in sorted(held)}
        opened = [part for dealer, kind in kinds.items() for part in (dealer, held[dealer][message][kind])]
        parts += [message, join(*opened)]
    return exchange.sign(OPENING, name, join(*parts), identity)


def read_opening(exchange: Exchange, client: str, message: bytes) -> dict[int, dict[str, bytes]]:
    """Shares that a client has opened: message -> whose -> share.

    Raises:
        SecureSumError: it is not this client's, or names messages or clients of which it can hold no shares.
    """
    what = f"the {OPENING} of client {client}"
    messages = {str(number).encode(): number for number in range(exchange.messages)}
    dealers = {dealer.encode(): dealer for dealer in exchange.members[client]}
    opened = {}
    for number, listed in _by_name(split(exchange.read(OPENING, client, message), what), messages, what).items():
        opened[number] = _by_name(split(listed, what), dealers, what)
    return opened


def _by_name(parts: Sequence[bytes], names: Mapping[bytes, Name], what: str) -> dict[Name, bytes]:
    """Parts that alternate with their names, each of which must be a known one."""
    found = dict(zip(parts[::2], parts[1::2], strict=False))
    if 2 * len(found) != len(parts) or not found.keys() <= names.keys():
        raise SecureSumError(f"refused {what}: it names messages or clients twice, or some that it has no shares of")
    return {names[name]: part for name, part in found.items()}


def _parts(sealed: bytes, messages: int, what: str) -> list[bytes]:
    parts = split(sealed, what)
    if len(parts) != 2 or len(parts[0]) != 2 * DIGEST * messages:
        raise SecureSumError(f"refused {what}: they must be {2 * messages} shares and their SHA-256")
    return parts


def _pairs(flat: bytes, size: int) -> list[Pair]:
    return [(flat[i : i + size], flat[i + size : i + 2 * size]) for i in range(0, len(flat), 2 * size)]
