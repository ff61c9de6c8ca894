"""Sums that no order changes: against rational numbers, on magnitudes that ordinary addition cannot hold together."""

import random
from fractions import Fraction

import pytest
import torch

from fedspallm_appfl.devices import threads
from fedspallm_appfl.tensors.exact_sum import PART, ExactSum, sum_of_squares
from helpers.loops import LOOPS, use


def wild(count, exponents, seed):
    """float32 numbers of either sign with exponents of 2 anywhere in a range."""
    dice = random.Random(seed)
    numbers = [dice.choice((-1, 1)) * dice.uniform(1, 2) * 2.0 ** dice.uniform(*exponents) for _ in range(count)]
    return torch.tensor(numbers, dtype=torch.float32)


def added(terms):
    total = ExactSum(*terms[0].shape)
    for term in terms:
        total.add(term)
    return total.value()


def rounded(numbers):
    """Oracle: the sum as a fraction, rounded to float64 (Python does that correctly) and then to float32."""
    exact = sum(map(Fraction, numbers), Fraction(0))
    return torch.tensor(float(exact), dtype=torch.float64).float()


@pytest.mark.parametrize("loops", LOOPS)
@pytest.mark.parametrize("exponents", [(-30, 38), (-100, -35), (40, 100), (-3, 3)])
@pytest.mark.parametrize("count", [1, 2, 3, 8, 64])
def test_the_sum_is_the_rounded_rational_one(monkeypatch, count, exponents, loops):
    use(loops, monkeypatch)
    terms = torch.stack([wild(count, exponents, seed) for seed in range(40)], 1)
    terms = torch.cat([terms, -terms[: count // 2]])  # so that much is cancelled
    expected = torch.stack([rounded(column.tolist()) for column in terms.T])
    assert added(list(terms)).tolist() == expected.tolist()


@pytest.mark.parametrize("exponents", [(-30, 38), (-100, -35), (40, 100)])
def test_every_order_gives_the_same_bits_where_ordinary_sums_differ(exponents):
    terms = [wild(50, exponents, seed) for seed in range(8)]
    terms += [-term for term in terms[:4]]  # so that much is cancelled
    sums, ordinary = set(), set()
    for seed in range(30):
        order = random.Random(seed).sample(terms, len(terms))
        sums.add(tuple(added(order).view(torch.int32).tolist()))
        ordinary.add(tuple(torch.stack(order).sum(0).tolist()))
    assert len(sums) == 1
    assert len(ordinary) > 1


def test_what_the_largest_hid_comes_back_when_it_is_taken_away():
    large, small = 2.0**69, 1 + 2.0**-23
    terms = [torch.tensor([term]) for term in (large, small, -large)]
    for order in (terms, terms[::-1], [terms[1], terms[0], terms[2]]):
        assert added(order).tolist() == [small]


def test_parts_add_up_like_the_whole_and_leave_the_rest_alone():
    terms = [wild(100, (-20, 20), seed) for seed in range(5)]
    whole, parts = ExactSum(100), ExactSum(100)
    for term in terms:
        whole.add(term)
        for part in (slice(37, 100), slice(0, 37)):
            parts.add(term[part], part)
    assert torch.equal(whole.value(), parts.value())
    assert torch.equal(parts.value(slice(10, 50)), whole.value()[10:50])
    parts.add(torch.ones(3), slice(5, 8))
    changed = (parts.value() != whole.value()).nonzero().flatten().tolist()
    assert set(changed) <= {5, 6, 7}


@pytest.mark.parametrize("size", [1, 3, 8, 17, 2**18 + 5])
def test_compiled_sums_have_the_same_bits_in_both_parts_and_what_lies_around_stays(monkeypatch, size):
    random = torch.Generator().manual_seed(size)
    terms = [torch.randn(size, generator=random) * scale for scale in (1e30, 1.0, 1e-42)]  # the last are below normal
    found = []
    for loops, count in [("torch", 1), ("compiled", 1), ("compiled", 3)]:
        with monkeypatch.context() as patch, threads(count):
            use(loops, patch)
            total = ExactSum(size + 2)
            for term in terms:
                total.add(term, slice(1, -1))
            found.append(torch.stack([total.high, total.low]).view(torch.int64))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert not found[1][:, [0, -1]].any()


def test_as_many_numbers_are_added_as_there_are_sums():
    with pytest.raises(RuntimeError):
        ExactSum(5).add(torch.ones(4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_any_float_may_be_added_and_float32_comes_out(dtype):
    total = ExactSum(2, 3)
    for _ in range(3):
        total.add(torch.full((2, 3), 0.1, dtype=dtype))
    assert total.value().dtype is torch.float32
    assert total.value().tolist() == (torch.full((2, 3), 0.1, dtype=dtype).double() * 3).float().tolist()


def test_nothing_added_is_zero_and_nothing_can_be_added_to_nothing():
    assert ExactSum(4).value().tolist() == [0.0] * 4
    empty = ExactSum(0)
    empty.add(torch.empty(0))
    assert empty.value().tolist() == []


def test_squares_have_the_same_bits_for_any_number_of_threads():
    change, found = torch.randn(5 * PART + 3, generator=torch.Generator().manual_seed(0)).double(), []
    before = change.clone()
    for count in (1, 2, 3, 8):
        with threads(count):
            found.append(sum_of_squares(change))
    assert torch.equal(change, before)
    assert len(set(found)) == 1 and found[0] == pytest.approx(float(change.double().square().sum()), rel=1e-12)
