"""Masks: streams of 64-bit words from a secret, each used once.

A key is HKDF-SHA256 (RFC 5869) of a secret, with everything that the key is for in its `info`. A stream is ChaCha20
(RFC 8439) under this key from block 0, with a nonce of zeros: a key makes one stream.
"""

from collections.abc import Sequence

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from torch import Tensor

from fedspallm_appfl.secure.encoding import join

KEY = 32  # bytes of a key or a secret
PROTOCOL = "fedspallm secure sums 1"
PIECE = 1 << 13  # words; a piece of the sum and of the stream stay in the cache


def derive(secret: bytes, purpose: str, *what: bytes | str | int) -> bytes:
    """A key from a secret.

    Args:
        secret: uniformly random, or agreed on.
        purpose: what keys of this kind are for.
        *what: run, round, exchange and whatever else makes this key another one.

    Returns:
        32 bytes.
    """
    return HKDF(algorithm=SHA256(), length=KEY, salt=None, info=join(PROTOCOL, purpose, *what)).derive(secret)


def self_key(seed: bytes, *place: str | int) -> bytes:
    """Key of a client's own mask; `place` is run, round, exchange, message, unit, view."""
    return derive(seed, "self mask", *place)


def pair_key(secret: bytes, one: str, other: str, *place: str | int) -> bytes:
    """Key of the mask of two clients, which the one first by name adds and the other subtracts; `place` as above."""
    return derive(secret, "pair mask", *place, *sorted((one, other)))


def keystream(key: bytes, size: int) -> bytes:
    """The first bytes of a stream."""
    return _start(key).update(bytes(size))


def add_streams(words: Tensor, plus: Sequence[bytes], minus: Sequence[bytes] = ()) -> None:
    """Add streams to words and subtract others, in place and modulo 2^64.

    Args:
        words: (W,) int64, on the CPU and contiguous.
        plus: keys of the streams that are added.
        minus: keys of those that are subtracted.
    """
    sums = words.numpy()
    adding, subtracting = [_start(key) for key in plus], [_start(key) for key in minus]
    nothing, buffer = bytes(8 * PIECE), bytearray(8 * PIECE)
    stream = np.frombuffer(buffer, "<i8")
    for start in range(0, len(sums), PIECE):
        piece = sums[start : start + PIECE]
        zeros = nothing if len(piece) == PIECE else nothing[: 8 * len(piece)]
        for cipher in adding:
            cipher.update_into(zeros, buffer)
            piece += stream[: len(piece)]
        for cipher in subtracting:
            cipher.update_into(zeros, buffer)
            piece -= stream[: len(piece)]


def _start(key: bytes) -> CipherContext:
    return Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
