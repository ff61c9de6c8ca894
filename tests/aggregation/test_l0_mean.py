"""Means over those who kept a weight: the formula, exactness, independence of order, range."""

import itertools
from fractions import Fraction

import pytest
import torch

from fedspallm_appfl.aggregation import l0_mean as l0_aggregation
from fedspallm_appfl.aggregation.l0_mean import LARGEST_SUM, MOST_CLIENTS, L0Sums, l0_mean, plain_mean, vote_dtype
from fedspallm_appfl.tensors import bitmask
from helpers.loops import LOOPS, use

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


@pytest.mark.parametrize("loops", LOOPS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("values", [0, 3, 5])
def test_as_many_values_as_the_mask_keeps_are_folded(monkeypatch, loops, dtype, values):
    use(loops, monkeypatch)
    bits = torch.tensor([0b01101001], dtype=torch.uint8)
    sums = L0Sums.empty((2, 4), False)
    with pytest.raises(ValueError, match=f"a mask with 4 kept entries needs as many values, got {values}"):
        sums.add_packed(torch.ones(values, dtype=dtype), bits)
    assert not sums.total.any() and not sums.votes.any() and sums.clients == 0


def test_sums_reach_the_limit_exactly_and_no_further():
    edge, mask = torch.tensor([[LARGEST_SUM / 4]]), torch.tensor([[True]])
    sums = fold([(edge, mask)], [4])
    assert l0_mean(sums).item() == LARGEST_SUM / 4
    with pytest.raises(ValueError, match=r"must stay below 4.1943e\+06, it may now reach 4.1943e\+06; use equal"):
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


def fold_packed(clients, weights=None, room=MOST_CLIENTS):
    """As `fold`, but each client as it travels: (values, bits)."""
    sums = L0Sums.empty(tuple(clients[0][0].shape), weighted=weights is not None, clients=room)
    for (weight, mask), a in zip(clients, weights or [1] * len(clients), strict=True):
        sums.add_packed(weight[mask], bitmask.to_bits(mask), a)
    return sums


def sums_oracle(clients, weights):
    """Oracle: totals in units of 2^-40, votes and weights of those who kept it, entry by entry in whole numbers."""
    entries = range(clients[0][0].numel())
    rows = [(w.flatten().tolist(), m.flatten().tolist(), a) for (w, m), a in zip(clients, weights, strict=True)]
    total = [sum(a * round(Fraction(w[i]) * 2**40) for w, m, a in rows if m[i]) for i in entries]
    votes = [sum(not m[i] for _, m, _ in rows) for i in entries]
    return total, votes, [sum(a for _, m, a in rows if m[i]) for i in entries]


@pytest.mark.parametrize("tile", [16, 2**16])
@pytest.mark.parametrize("room", [4, 300])
@pytest.mark.parametrize("weights", [None, [1, 5, 128, 3]])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("loops", LOOPS)
def test_sums_are_those_of_whole_numbers(monkeypatch, loops, dtype, weights, room, tile):
    use(loops, monkeypatch)
    monkeypatch.setattr(l0_aggregation, "TILE", tile)
    for shape in ((1, 1), (1, 8), (5, 7), (4, 16)):
        clients = [client(seed, dtype, shape) for seed in range(4)]
        sums, added = fold_packed(clients, weights, room), fold(clients, weights)
        total, votes, kept = sums_oracle(clients, weights or [1] * 4)
        assert sums.votes.dtype is (torch.uint8 if room == 4 else torch.int16)
        assert sums.total.flatten().tolist() == added.total.flatten().tolist() == total
        assert sums.votes.flatten().tolist() == added.votes.flatten().tolist() == votes
        if weights:
            assert sums.kept.flatten().tolist() == added.kept.flatten().tolist() == kept
        assert (sums.kept is None) == (weights is None)
        assert (sums.clients, sums.weight, sums.bound) == (added.clients, added.weight, added.bound)
        assert (sums.clients, sums.weight) == (4, sum(weights or [1] * 4))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loops", LOOPS)
def test_every_ragged_size_and_share_of_kept_entries_is_folded(monkeypatch, loops, dtype, share):
    use(loops, monkeypatch)
    for entries in range(1, 34):
        clients = []
        for seed in (entries, entries + 100):
            generator = torch.Generator().manual_seed(seed)
            mask = torch.rand(1, entries, generator=generator) < share
            clients.append((torch.randn(1, entries, generator=generator).to(dtype), mask))
        sums = fold_packed(clients, [2, 3], 2)
        parts = [part.flatten().tolist() for part in (sums.total, sums.votes, sums.kept)]
        assert parts == list(sums_oracle(clients, [2, 3]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loops", LOOPS)
def test_every_number_of_a_16_bit_format_that_may_be_summed_is_its_own_fixed_point_number(monkeypatch, loops, dtype):
    use(loops, monkeypatch)
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    values = every[every.float().abs() <= LARGEST_SUM].view(1, -1)
    assert values.shape[1] > 30_000
    sums = fold_packed([(values, torch.ones_like(values, dtype=torch.bool))])
    assert sums.total.flatten().tolist() == [round(value * 2**40) for value in values.flatten().tolist()]


@pytest.mark.parametrize("weights", [None, [3, 1, 2]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_matrices_are_summed_the_same_with_and_without_compiled_loops(monkeypatch, dtype, weights):
    results = []
    for loops in LOOPS:
        with monkeypatch.context() as patch:
            use(loops, patch)
            sums = fold_packed([client(seed, dtype, (257, 263)) for seed in range(3)], weights, 3)  # more than one tile
            results.append((sums, l0_mean(sums), plain_mean(sums)))
    assert same_sums(results[0][0], results[1][0])
    assert results[0][0].bound == results[1][0].bound
    assert all(same_bits(one, other) for one, other in zip(results[0][1:], results[1][1:], strict=True))


@pytest.mark.parametrize("loops", LOOPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_of_packed_clients_never_changes_a_bit(monkeypatch, dtype, loops):
    use(loops, monkeypatch)
    clients, weights = [client(seed, dtype) for seed in range(4)], [1, 5, 128, 3]
    first = fold_packed(clients, weights, 4)
    for order in itertools.permutations(range(4)):
        other = fold_packed([clients[k] for k in order], [weights[k] for k in order], 4)
        assert same_sums(other, first)
        assert same_bits(l0_mean(other), l0_mean(first))


def test_votes_take_a_byte_up_to_255_clients_and_two_beyond():
    assert [vote_dtype(n) for n in (0, 1, 255)] == [torch.uint8] * 3
    assert [vote_dtype(n) for n in (256, 300, 32767)] == [torch.int16] * 3
    with pytest.raises(ValueError, match="at most 32767 clients can be folded, got 32768"):
        vote_dtype(32768)
    assert L0Sums.empty((1, 1), False, 255).votes.dtype is torch.uint8
    assert L0Sums.empty((1, 1), False, 256).votes.dtype is torch.int16


HALF_KEPT = torch.tensor([[1.0, 2.0, -3.0, 0.5]]), torch.tensor([[True, False, True, False]])


@pytest.mark.parametrize("loops", LOOPS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_client_that_there_is_no_room_for_is_refused_before_anything_is_folded(monkeypatch, dtype, loops):
    use(loops, monkeypatch)
    one = HALF_KEPT[0].to(dtype), HALF_KEPT[1]
    full = fold_packed([one] * 255, room=200)
    assert full.votes.tolist() == [[0, 255, 0, 255]]
    with pytest.raises(ValueError, match=r"at most 255 clients and a total weight of 2147483647 .* got 256 and 256"):
        full.add_packed(one[0][one[1]], bitmask.to_bits(one[1]))
    assert same_sums(full, fold_packed([one] * 255, room=200))
    assert full.bound == 255 * 3.0
    assert l0_mean(full).tolist() == [[1.0, 0.0, -3.0, 0.0]]


def test_a_total_weight_that_there_is_no_room_for_is_refused():
    sums = fold_packed([HALF_KEPT], [1])
    sums.add_packed(torch.zeros(2), bitmask.to_bits(HALF_KEPT[1]), 2**31 - 2)
    with pytest.raises(ValueError, match="a total weight of 2147483647 can be folded, got 3 and 2147483648"):
        sums.add_packed(torch.zeros(2), bitmask.to_bits(HALF_KEPT[1]), 1)
    assert (sums.clients, sums.weight) == (2, 2**31 - 1)
    assert sums.kept.tolist() == [[2**31 - 1, 0, 2**31 - 1, 0]]


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize(("first", "second"), [(200, 100), (255, 1), (1, 255), (100, 155)])
def test_merging_widens_the_votes_when_more_than_255_clients_meet(first, second, weights):
    one, other = ([HALF_KEPT] * count for count in (first, second))
    merged = fold_packed(one, weights and [1] * first or None, first)
    merged.merge(fold_packed(other, weights and [1] * second or None, second))
    together = first + second
    assert merged.votes.dtype is (torch.uint8 if together <= 255 else torch.int16)
    assert merged.votes.tolist() == [[0, together, 0, together]]
    assert l0_mean(merged).tolist() == [[1.0, 0.0, -3.0, 0.0]]
    assert same_sums(merged, fold_packed([*one, *other], weights and [1] * together or None, together))
    merged.merge(fold_packed([HALF_KEPT], weights and [1] or None, 300))
    assert merged.votes.tolist() == [[0, together + 1, 0, together + 1]]


def test_a_refused_merge_leaves_the_sums_as_they_were():
    sums = fold_packed([HALF_KEPT] * 200, room=200)
    huge = fold_packed([(torch.full((1, 4), LARGEST_SUM / 100), HALF_KEPT[1])] * 100, room=100)
    with pytest.raises(ValueError, match="must stay below"):
        sums.merge(huge)
    with pytest.raises(ValueError, match="sums with client weights and sums without cannot be merged"):
        sums.merge(fold_packed([HALF_KEPT], [2]))
    assert same_sums(sums, fold_packed([HALF_KEPT] * 200))


def test_rounds_of_no_client_add_nothing():
    sums = fold_packed([HALF_KEPT])
    sums.merge(L0Sums.empty((1, 4), weighted=False))
    assert same_sums(sums, fold_packed([HALF_KEPT]))
