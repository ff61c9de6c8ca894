"""Shamir's secret sharing: any t of n shares give the secret, fewer give nothing.

Source: Shamir, "How to share a secret", CACM 1979. The secret is the value at 0 of a polynomial of degree t - 1 over the
integers modulo the smallest prime above 2^256; a share is its value at a point from 1 on.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache

from fedspallm_appfl.secure.stream import KEY, keystream

PRIME = 2**256 + 297
SHARE = 33  # bytes
_DRAWN = 48  # bytes of a coefficient: modulo the prime it is uniform up to 2^-127


def split(secret: bytes, threshold: int, points: Sequence[int], key: bytes) -> list[bytes]:
    """Share a secret.

    Args:
        secret: 32 bytes.
        threshold: t, shares that give the secret.
        points: one for each share, different and at least 1.
        key: 32 random bytes that the coefficients are drawn from; used for one secret.

    Returns:
        33 bytes for each point.

    Raises:
        ValueError: these numbers make no shares from which the secret can be found.
    """
    if not 1 <= threshold <= len(points) or len({*points}) < len(points) or min(points) < 1 or len(secret) != KEY:
        raise ValueError(
            f"{threshold} of {len(points)} shares of {KEY} bytes need different points from 1 on, got {list(points)} "
            f"and {len(secret)} bytes"
        )
    drawn = keystream(key, _DRAWN * (threshold - 1))
    highest_first = [int.from_bytes(drawn[i : i + _DRAWN], "little") % PRIME for i in range(0, len(drawn), _DRAWN)]
    coefficients = [*highest_first, int.from_bytes(secret, "little")]
    return [_value(coefficients, point).to_bytes(SHARE, "little") for point in points]


def combine(shares: Mapping[int, bytes]) -> bytes:
    """The secret.

    Args:
        shares: point -> share, as many as the threshold.

    Returns:
        32 bytes; meaningless ones where a share is wrong or one is missing.
    """
    weights = _weights(tuple(shares))
    terms = (weight * int.from_bytes(share, "little") for weight, share in zip(weights, shares.values(), strict=True))
    return (sum(terms) % PRIME % 2**256).to_bytes(KEY, "little")


def _value(coefficients: Sequence[int], point: int) -> int:
    value = 0
    for coefficient in coefficients:
        value = (value * point + coefficient) % PRIME
    return value


@lru_cache(maxsize=1024)
def _weights(points: tuple[int, ...]) -> tuple[int, ...]:
    """Lagrange's weights at 0: secrets that are shared among the same clients have the same."""
    weights = []
    for own in points:
        above, below = 1, 1
        for other in points:
            if other != own:
                above, below = above * other % PRIME, below * (other - own) % PRIME
        weights.append(above * pow(below, -1, PRIME) % PRIME)
    return tuple(weights)
