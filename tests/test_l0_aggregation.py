"""Means over those who kept a weight: the formula, exactness, independence of order, range."""

import itertools
from fractions import Fraction

import pytest
import torch

from fedspallm_appfl.l0_aggregation import LARGEST_SUM, L0Sums, l0_mean, plain_mean

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def client(seed, dtype=torch.float32, shape=(5, 7)):
    """A client's (weight, mask): about half is kept, some kept weights are exactly zero."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < 0.5
    weight = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.8)
    return (weight * mask).to(dtype), mask


def fold(clients, weights=None):
    sums = L0Sums.empty(tuple(clients[0][0].shape), weighted=weights is not None)
    for (weight, mask), a in zip(clients, weights or [1] * len(clients), strict=True):
        sums.add(weight, mask, a)
    return sums


def mean_oracle(clients, weights, over_all):
    """Oracle: the formula of the module's docstring, entry by entry in rational numbers, then rounded to float32."""

    def entry(i, j):
        voters = [(a, w[i, j].item()) for (w, m), a in zip(clients, weights, strict=True) if m[i, j]]
        divisor = sum(weights) if over_all else sum(a for a, _ in voters)
        return float(sum(a * Fraction(w) for a, w in voters) / divisor) if voters else 0.0

    rows, columns = clients[0][0].shape
    return torch.tensor([[entry(i, j) for j in range(columns)] for i in range(rows)], dtype=torch.float64).float()


def same_bits(one, other):
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


def same_sums(one, other):
    tensors = all(torch.equal(getattr(one, part), getattr(other, part)) for part in ("total", "votes"))
    kept = torch.equal(one.kept, other.kept) if one.kept is not None else other.kept is None
    return tensors and kept and (one.clients, one.weight) == (other.clients, other.weight)


def test_a_mean_by_hand():
    clients = [
        (torch.tensor([[2.0, 0.0, 1.0, 0.0]]), torch.tensor([[True, False, True, False]])),
        (torch.tensor([[4.0, 3.0, 0.0, 0.0]]), torch.tensor([[True, True, False, False]])),
    ]
    sums = fold(clients)
    assert sums.votes.tolist() == [[0, 1, 1, 2]]
    assert l0_mean(sums).tolist() == [[3.0, 3.0, 1.0, 0.0]]
    assert plain_mean(sums).tolist() == [[3.0, 1.5, 0.5, 0.0]]


def test_a_kept_weight_may_be_zero():
    kept = torch.ones(1, 1, dtype=torch.bool)
    assert l0_mean(fold([(torch.zeros(1, 1), kept), (torch.full((1, 1), 4.0), kept)])).item() == 2.0


@pytest.mark.parametrize("weights", [None, [1, 5, 128, 3]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_means_are_those_of_the_formula(dtype, weights):
    clients = [client(seed, dtype) for seed in range(4)]
    sums = fold(clients, weights)
    for mean, over_all in ((l0_mean, False), (plain_mean, True)):
        expected = mean_oracle(clients, weights or [1] * 4, over_all)
        if dtype is torch.float16:
            assert same_bits(mean(sums) + 0.0, expected + 0.0)
        torch.testing.assert_close(mean(sums), expected, rtol=2**-23, atol=2**-40)


@pytest.mark.parametrize("weights", [None, [1, 5, 128, 3]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_of_clients_never_changes_a_bit(dtype, weights):
    clients = [client(seed, dtype) for seed in range(4)]
    first = fold(clients, weights)
    for order in itertools.permutations(range(4)):
        other = fold([clients[k] for k in order], weights and [weights[k] for k in order])
        assert same_sums(other, first)
        assert same_bits(l0_mean(other), l0_mean(first))
        assert same_bits(plain_mean(other), plain_mean(first))


def test_equal_sample_sizes_are_equal_weights():
    clients = [client(seed) for seed in range(3)]
    assert same_bits(l0_mean(fold(clients, [64, 64, 64])), l0_mean(fold(clients)))


def test_large_float16_values_do_not_overflow():
    large = torch.full((2, 2), 65504.0, dtype=torch.float16)
    mean = l0_mean(fold([(large, torch.ones(2, 2, dtype=torch.bool))] * 8))
    assert mean.unique().tolist() == [65504.0]


@pytest.mark.parametrize("weights", [None, [2, 7, 1, 30]])
def test_merging_rounds_is_folding_all_clients_at_once(weights):
    clients = [client(seed) for seed in range(4)]
    first, second = fold(clients[:2], weights and weights[:2]), fold(clients[2:], weights and weights[2:])
    first.merge(second)
    assert same_sums(first, fold(clients, weights))
    assert first.bound == fold(clients, weights).bound


@pytest.mark.parametrize("value", [2.0**-16, 1.0 + 2.0**-23, -3.0 + 2.0**-22, 5.9604644775390625e-08, -(2.0**-40)])
def test_the_resolution_holds_float16_and_float32_of_usual_size_exactly(value):
    mean = l0_mean(fold([(torch.tensor([[value]]), torch.tensor([[True]]))]))
    assert mean.item() == value


def test_less_than_half_the_resolution_is_lost():
    one = torch.tensor([[True, True]])
    assert l0_mean(fold([(torch.tensor([[2.0**-42, 1.5 * 2.0**-40]]), one)])).tolist() == [[0.0, 2.0**-39]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused(value):
    with pytest.raises(ValueError, match="needs finite weights, got NaN or infinity"):
        fold([(torch.tensor([[0.0, value]]), torch.tensor([[True, True]]))])


def test_sums_reach_the_limit_exactly_and_no_further():
    edge, mask = torch.tensor([[LARGEST_SUM / 4]]), torch.tensor([[True]])
    sums = fold([(edge, mask)], [4])
    assert l0_mean(sums).item() == LARGEST_SUM / 4
    with pytest.raises(ValueError, match=r"must stay below 4.1943e\+06, it may now reach 4.1943e\+06; weigh"):
        sums.add(torch.tensor([[0.5]]), mask)


def test_merging_beyond_the_range_is_refused():
    edge, mask = torch.tensor([[LARGEST_SUM]]), torch.tensor([[True]])
    sums = fold([(edge, mask)])
    with pytest.raises(ValueError, match="must stay below"):
        sums.merge(fold([(edge, mask)]))


@pytest.mark.parametrize(
    ("value", "client_weight", "message"),
    [(1e30, 1, "must stay below"), (1.0, 2, "made for client weights of 1, got 2"), (float("nan"), 1, "finite")],
)
def test_a_refused_client_leaves_the_sums_as_they_were(value, client_weight, message):
    first, mask = (torch.tensor([[1.0, 2.0]]), torch.tensor([[True, True]])), torch.tensor([[True, False]])
    sums = fold([first])
    with pytest.raises(ValueError, match=message):
        sums.add(torch.tensor([[value, 0.0]]), mask, client_weight)
    assert same_sums(sums, fold([first]))
    assert sums.bound == 2.0
