"""Which client prunes which blocks: probabilities, coverage, purity."""

import itertools
import math
import random
import statistics

import pytest

from fedspallm_appfl.aggregation.layer_sampling import blocks_per_round, draw, expected_uncovered, from_text, to_text

SHARES = {"a": 1.0, "b": 0.5, "c": 0.25, "d": 0.1}
BLOCKS = 12
DRAWS = 2000
ROSTERS = [
    ({"a": 1.0}, 5),
    ({"a": 0.5, "b": 0.5}, 12),
    ({"a": 0.3, "b": 0.3, "c": 0.3, "d": 0.3}, 7),
    ({"a": 1.0, "b": 1.0, "c": 0.1}, 10),
    ({f"client {k}": 0.05 * (k + 1) for k in range(12)}, 31),
    ({"a": 0.01}, 1),
]


def within_noise(hits, probability, draws=DRAWS):
    """Whether a binomial count is less than five standard deviations from its mean (exact where p is 0 or 1)."""
    return abs(hits - draws * probability) <= 5 * math.sqrt(draws * probability * (1 - probability))


def clients_of_blocks(assigned, blocks):
    return [sum(block in mine for mine in assigned.values()) for block in range(blocks)]


@pytest.mark.parametrize(
    ("share", "blocks", "expected"),
    [
        (1.0, 32, 32),
        (0.5, 3, 2),
        (0.5, 5, 3),
        (0.01, 32, 1),
        (0.3, 10, 3),
        (0.25, 10, 3),
        (0.24, 10, 2),
        (0.29, 50, 15),
    ],
)
def test_a_share_is_rounded_half_up_and_is_at_least_one_block(share, blocks, expected):
    assert blocks_per_round(share, blocks) == expected


@pytest.mark.parametrize("strategy", ["uniform", "balanced"])
def test_every_block_is_included_with_probability_n_over_l(strategy):
    draws = [draw(strategy, 0, t, DRAWS, SHARES, BLOCKS) for t in range(DRAWS)]
    for client, share in SHARES.items():
        count = blocks_per_round(share, BLOCKS)
        assert all(len(assigned[client]) == count for assigned in draws)
        for block in range(BLOCKS):
            assert within_noise(sum(block in assigned[client] for assigned in draws), count / BLOCKS)


def test_uniform_draws_of_two_clients_are_independent():
    draws = [draw("uniform", seed, 0, 1, SHARES, BLOCKS) for seed in range(DRAWS)]
    both = sum(0 in assigned["b"] and 0 in assigned["c"] for assigned in draws)
    assert within_noise(both, 0.5 * 0.25)


def test_a_uniform_draw_does_not_depend_on_who_else_takes_part():
    alone = draw("uniform", 7, 3, 1, {"b": 0.5}, BLOCKS)
    assert alone["b"] == draw("uniform", 7, 3, 1, SHARES, BLOCKS)["b"]


@pytest.mark.parametrize(("shares", "blocks"), ROSTERS)
def test_balanced_gives_every_block_floor_or_ceil_of_the_mean_number_of_clients(shares, blocks):
    total = sum(blocks_per_round(share, blocks) for share in shares.values())
    for seed in range(50):
        counts = clients_of_blocks(draw("balanced", seed, 0, 1, shares, blocks), blocks)
        assert set(counts) <= {total // blocks, -(-total // blocks)}
        assert sum(counts) == total
        assert 0 not in counts or total < blocks


@pytest.mark.parametrize("rounds", [1, 3, 5, 40])
@pytest.mark.parametrize(("shares", "blocks"), ROSTERS)
def test_sweep_goes_through_the_blocks_once_in_order(shares, blocks, rounds):
    seen = []
    for t in range(rounds):
        assigned = draw("sweep", 0, t, rounds, shares, blocks)
        run = range(t * blocks // rounds, (t + 1) * blocks // rounds)
        expected = sum(min(blocks_per_round(share, len(run)), len(run)) for share in shares.values())
        assert sum(map(len, assigned.values())) == expected
        assert set().union(*assigned.values()) <= set(run)
        seen += sorted(set().union(*assigned.values()))
        if expected >= len(run):
            assert set(run) <= set(seen)
    assert seen == sorted(set(seen))


def test_sweep_starts_over_after_the_last_round():
    for t in range(3):
        again, first = (draw("sweep", 0, u, 3, {"a": 1.0}, 9)["a"] for u in (t + 3, t))
        assert again == first == [3 * t, 3 * t + 1, 3 * t + 2]


@pytest.mark.parametrize("strategy", ["uniform", "balanced", "sweep"])
def test_a_draw_is_a_pure_function_of_its_arguments(strategy):
    random.seed(1)
    state = random.getstate()
    first = draw(strategy, 5, 2, 3, SHARES, BLOCKS)
    assert random.getstate() == state
    random.seed(2)
    assert draw(strategy, 5, 2, 3, dict(SHARES), BLOCKS) == first
    assert all(mine == sorted(set(mine)) for mine in first.values())


@pytest.mark.parametrize("strategy", ["uniform", "balanced"])
def test_seed_and_round_both_change_the_draw(strategy):
    draws = [draw(strategy, seed, t, 2, {"b": 0.5, "c": 0.5}, 32) for seed in (0, 1, 11) for t in (0, 1, 10)]
    assert all(one != other for one, other in itertools.combinations(draws, 2))


def test_a_draw_is_the_same_on_every_machine_and_in_every_version():
    assert draw("balanced", 0, 0, 1, {"a": 0.5, "b": 0.25}, 8) == {"a": [0, 1, 2, 5], "b": [3, 7]}
    assert draw("uniform", 0, 0, 1, {"a": 0.5, "b": 0.25}, 8) == {"a": [2, 4, 5, 6], "b": [2, 5]}


def test_an_unknown_strategy_is_refused_with_those_that_are_known():
    with pytest.raises(ValueError, match="one of balanced, uniform, sweep, got 'random'"):
        draw("random", 0, 0, 1, SHARES, BLOCKS)


@pytest.mark.parametrize(("shares", "blocks"), [(SHARES, 12), ({"b": 0.3, "c": 0.2}, 10), ({"c": 0.1}, 40)])
def test_expected_uncovered_is_what_uniform_leaves_out_on_average(shares, blocks):
    missed = [clients_of_blocks(draw("uniform", seed, 0, 1, shares, blocks), blocks).count(0) for seed in range(DRAWS)]
    error = statistics.stdev(missed) / math.sqrt(DRAWS)
    assert abs(statistics.mean(missed) - expected_uncovered(shares, blocks)) <= 5 * error + 1e-9


def test_expected_uncovered_by_hand():
    assert expected_uncovered({"a": 0.5, "b": 0.5}, 2) == 0.5
    assert expected_uncovered({"a": 1.0, "b": 0.1}, 20) == 0


@pytest.mark.parametrize(
    ("blocks", "text"), [([], ""), ([4], "4"), ([0, 1, 2, 5], "0-2,5"), ([9, 10, 12, 13], "9-10,12-13")]
)
def test_blocks_as_text(blocks, text):
    assert to_text(blocks) == text
    assert from_text(text) == blocks


def test_text_round_trips_for_every_subset_of_eight_blocks():
    for size in range(9):
        for blocks in itertools.combinations(range(8), size):
            assert from_text(to_text(list(blocks))) == list(blocks)
