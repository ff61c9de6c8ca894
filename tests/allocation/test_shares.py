"""Targets from loss curves, on curves whose solution is known."""

import math
from fractions import Fraction
from itertools import product

import pytest

from fedspallm_appfl.allocation.choice import LEAST, MOST, bounds, targets
from fedspallm_appfl.allocation.shares import Curve, counts
from fedspallm_appfl.tensors.target import Ratio, parse_target, share_of
from fedspallm_appfl.tensors.targets import Targets, parse_sparsity

LEVELS = (0.4, 0.5, 0.6, 0.7, 0.8)


def curve(entries, scale, rate=8.0):
    return Curve(entries, LEVELS, [scale * math.exp(rate * level) for level in LEVELS])


def test_exponential_losses_part_by_the_logarithm_of_their_scales():
    """scale e^(8 s) of equal matrices: marginal losses are equal where 8 (s_1 - s_2) = log(scale_2 / scale_1)."""
    first, second = counts([curve(10_000, 1.0), curve(10_000, 2.0)], [(0.4, 0.8)] * 2, 12_000)
    assert first + second == 12_000
    assert first - second == pytest.approx(10_000 * math.log(2) / 8, abs=2)


def test_a_large_matrix_loses_less_by_a_zero():
    """With n entries the marginal loss is scale e^(8 s) / n: ten times the entries count like a tenth of the scale."""
    large, small = counts([curve(100_000, 1.0), curve(10_000, 0.1)], [(0.4, 0.8)] * 2, 66_000)
    assert (large / 100_000, small / 10_000) == pytest.approx((0.6, 0.6), abs=1e-3)


def test_no_other_whole_numbers_lose_less():
    """The slow way: every pair of counts with the same total."""
    curves = [Curve(60, LEVELS, [9 * s**4 for s in LEVELS]), Curve(40, LEVELS, [s**3 for s in LEVELS])]
    found = counts(curves, [(0.4, 0.8)] * 2, 60)

    def loss(pair):
        return 9 * (pair[0] / 60) ** 4 + (pair[1] / 40) ** 3

    allowed = [pair for pair in product(range(24, 49), range(16, 33)) if sum(pair) == 60]
    assert loss(found) <= min(map(loss, allowed)) * 1.001


def test_bounds_hold_and_what_does_not_fit_goes_elsewhere():
    found = counts([curve(1000, 1e-9), curve(1000, 1.0), curve(1000, 1.0)], [(0.5, 0.7)] * 3, 1800)
    assert found[0] == 700
    assert found[1:] == [550, 550]


@pytest.mark.parametrize("total", [1501, 1502, 2099])
def test_the_total_is_exact_where_curves_are_equal_or_bend_down(total):
    """Equal curves leave ties; losses that grow ever slower have no inner minimum."""
    bent = Curve(1000, LEVELS, [1 - math.exp(-9 * s) for s in LEVELS])
    for curves in ([curve(1000, 1.0)] * 3, [bent] * 3):
        found = counts(curves, [(0.5, 0.7)] * 3, total)
        assert sum(found) == total
        assert all(500 <= count <= 700 for count in found)


def test_a_total_outside_the_bounds_is_refused():
    with pytest.raises(ValueError, match="2101 zeros are not between 1500 and 2100"):
        counts([curve(1000, 1.0)] * 3, [(0.5, 0.7)] * 3, 2101)


def test_shares_are_short_and_ask_for_exactly_the_count():
    for entries in (7, 1024, 44_032, 11_008 * 4_096):
        for zeros in (0, 1, entries // 3, entries - 1):
            share = share_of(zeros, entries)
            assert share.zeros(entries) == zeros
            assert parse_target(str(share)) == share
    assert str(share_of(717, 1024)) == "0.701"


def test_targets_stay_within_the_width_and_have_the_zeros_of_the_whole():
    curves = {(0, "q"): curve(999, 1.0), (0, "k"): curve(501, 3.0), (1, "q"): curve(999, 5.0)}
    base = Ratio(Fraction(6, 10))
    made = targets(curves, base, 0.1)
    zeros = {key: made.of(*key).zeros(one.entries) for key, one in curves.items()}
    assert sum(zeros.values()) == sum(base.zeros(one.entries) for one in curves.values())
    assert all(0.499 <= made.of(*key).share <= 0.701 for key in curves)
    assert zeros[0, "q"] > zeros[1, "q"]
    assert targets(curves, base, 0.0) is base
    assert parse_sparsity(made.plain()) == made


def test_widths_end_below_one_and_above_zero():
    assert bounds(Ratio(Fraction(9, 10)), 0.25) == (Fraction(65, 100), MOST)
    assert bounds(Ratio(Fraction(99, 100)), 0.25)[1] == Fraction(99, 100)
    assert bounds(Ratio(Fraction(2, 10)), 0.25)[0] == LEAST * Fraction(2, 10)


def test_a_name_that_ends_like_another_keeps_its_own_target():
    """A pattern means every name that ends with it; blocks.0.q would otherwise decide for blocks.0.cross.q too."""
    curves = {(0, "cross.q"): curve(1000, 1.0), (0, "q"): curve(1000, 4.0)}
    made = targets(curves, Ratio(Fraction(6, 10)), 0.1)
    assert isinstance(made, Targets)
    assert made.of(0, "cross.q").share > 0.6 > made.of(0, "q").share
