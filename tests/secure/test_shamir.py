"""Shamir's secret sharing by hand and against exact fractions."""

import itertools
import random
from fractions import Fraction

import pytest

from fedspallm_appfl.secure import shamir
from fedspallm_appfl.secure.stream import keystream

SECRET = bytes(range(32))
KEY = b"k" * 32


def test_a_line_by_hand():
    """With two of three the shares lie on a line through the secret: twice the second is the first plus the third."""
    first, second, third = (int.from_bytes(s, "little") for s in shamir.split(SECRET, 2, [1, 2, 3], KEY))
    slope = int.from_bytes(keystream(KEY, 48), "little") % shamir.PRIME
    secret = int.from_bytes(SECRET, "little")
    assert first == (secret + slope) % shamir.PRIME
    assert (2 * second - first - third) % shamir.PRIME == 0
    assert (2 * first - second) % shamir.PRIME == secret


def test_the_field_is_one():
    """Fermat's test to several bases, and no smaller number above 2^256 passes it."""
    assert all(pow(base, shamir.PRIME - 1, shamir.PRIME) == 1 for base in (2, 3, 5, 7, 11, 13))
    assert all(pow(3, n - 1, n) != 1 for n in range(2**256 + 1, shamir.PRIME, 2))


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32, SECRET])
@pytest.mark.parametrize("threshold", [1, 2, 3, 5])
def test_any_so_many_shares_give_the_secret(threshold, secret):
    points = [1, 2, 5, 9, 70]
    shares = dict(zip(points, shamir.split(secret, threshold, points, KEY), strict=True))
    assert all(len(share) == shamir.SHARE for share in shares.values())
    for chosen in itertools.combinations(points, threshold):
        assert shamir.combine({point: shares[point] for point in reversed(chosen)}) == secret
    for chosen in itertools.combinations(points, threshold - 1) if threshold > 1 else ():
        assert shamir.combine({point: shares[point] for point in chosen}) != secret


def test_the_weights_are_lagranges():
    """Against exact fractions, read modulo the prime."""
    points = random.Random(0).sample(range(1, 100), 7)
    for own, weight in zip(points, shamir._weights(tuple(points)), strict=True):
        exact = Fraction(1)
        for other in points:
            exact *= Fraction(other, other - own) if other != own else 1
        assert (weight * exact.denominator - exact.numerator) % shamir.PRIME == 0


@pytest.mark.parametrize(
    ("secret", "threshold", "points"),
    [(SECRET, 0, [1, 2]), (SECRET, 3, [1, 2]), (SECRET, 2, [1, 1]), (SECRET, 2, [0, 1]), (SECRET[:31], 2, [1, 2])],
)
def test_what_makes_no_shares_is_refused(secret, threshold, points):
    with pytest.raises(ValueError, match="need different points from 1 on"):
        shamir.split(secret, threshold, points, KEY)
