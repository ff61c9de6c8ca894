"""Targets, exact counts and exact choices."""

from fractions import Fraction

import pytest
import torch

from fedspallm_appfl.tensors.sparsity import (
    SPACING,
    by_digits,
    first_in_groups,
    kth_smallest,
    row_counts,
    select,
    smallest,
    smallest_in_rows,
    with_ties,
)
from fedspallm_appfl.tensors.target import NM, Ratio, check_divides, parse_target


def lowest(scores, count):
    """Oracle: sort (score, index) pairs and mark the first `count`."""
    first = sorted(range(len(scores)), key=lambda i: (float(scores[i]), i))[:count]
    return [i in first for i in range(len(scores))]


def tied_scores(*shape, seed=0):
    """Scores with many ties: integers from 0 to 4."""
    return torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("text", [0.7, "0.7", " 0.70 ", "7/10", "7e-1"])
def test_a_decimal_is_read_as_the_fraction_that_is_written(text):
    assert parse_target(text) == Ratio(Fraction(7, 10))
    assert parse_target(text).zeros(10) == 7


def test_a_ratio_asks_for_the_floor_of_share_times_entries():
    for percent in range(100):
        target = parse_target(f"0.{percent:02d}")
        assert [target.zeros(n) for n in range(200)] == [percent * n // 100 for n in range(200)]


@pytest.mark.parametrize(("text", "kept", "group"), [("2:4", 2, 4), ("4:8", 4, 8), (" 1:3 ", 1, 3)])
def test_a_pattern_names_what_is_kept_first(text, kept, group):
    assert parse_target(text) == NM(kept, group)
    assert parse_target(text).zeros(6 * group) == 6 * (group - kept)


@pytest.mark.parametrize("text", ["0", "0.5", "0.125", "2:4", "4:8"])
def test_a_target_prints_as_it_is_written(text):
    assert str(parse_target(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1", r"a share in \[0, 1\), got 1;"),
        (-0.1, r"a share in \[0, 1\), got -0.1;"),
        (70, r"got 70; 70 % is written 0.7"),
        ("half", "0.5 or a pattern such as 2:4, got 'half'"),
        ("1/0", "got '1/0'"),
        ("nan", "got 'nan'"),
        ("4:4", r"0 < n < m \(n non-zero in every m\), got 4:4"),
        ("0:4", "got 0:4"),
        ("2:4:8", "got '2:4:8'"),
    ],
)
def test_what_is_no_target_is_refused_in_words(text, message):
    with pytest.raises(ValueError, match=message):
        parse_target(text)


def test_only_a_pattern_asks_rows_to_divide():
    assert check_divides(NM(2, 4), 12) is None
    assert check_divides(Ratio(Fraction(1, 2)), 13) is None
    assert check_divides(NM(2, 4), 14) == "2:4 needs rows that are a multiple of 4 long, got 14"


def test_among_equal_scores_the_lowest_index_is_chosen():
    assert smallest(torch.tensor([1.0, 0.0, 1.0, 1.0]), 3).tolist() == [True, True, True, False]


@pytest.mark.parametrize("seed", range(3))
def test_exactly_the_smallest_scores_are_chosen_for_every_count(seed):
    scores = tied_scores(13, seed=seed)
    for count in range(14):
        assert smallest(scores, count).tolist() == lowest(scores, count)


def test_each_row_has_its_own_count():
    scores, counts = tied_scores(8, 7), torch.arange(8)
    chosen = smallest_in_rows(scores, counts)
    assert chosen.tolist() == [lowest(row, int(count)) for row, count in zip(scores, counts, strict=True)]


@pytest.mark.parametrize(("share", "rows", "columns"), [("0.5", 3, 5), ("0.37", 17, 33), ("0.7", 1, 1), ("0", 4, 4)])
def test_row_counts_add_up_and_differ_by_at_most_one(share, rows, columns):
    target = parse_target(share)
    counts = row_counts(target, rows, columns).tolist()
    assert len(counts) == rows
    assert sum(counts) == target.zeros(rows * columns)
    assert set(counts) <= {target.zeros(columns), target.zeros(columns) + 1}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("text", "per_row"), [("0.5", False), ("0.37", True), ("2:4", True), ("4:8", False)])
def test_select_compares_within_matrix_row_or_group(text, per_row, transposed):
    target, (rows, columns) = parse_target(text), (6, 16)
    scores = tied_scores(columns, rows).T if transposed else tied_scores(rows, columns)
    if isinstance(target, NM):
        groups, counts = scores.reshape(-1, target.group), [target.group - target.kept] * (96 // target.group)
    else:
        groups = scores if per_row else scores.reshape(1, -1)
        counts = row_counts(target, *groups.shape).tolist()
    expected = [lowest(group, count) for group, count in zip(groups, counts, strict=True)]
    pruned = select(scores, target, per_row)
    assert pruned.shape == scores.shape
    assert pruned.flatten().tolist() == sum(expected, [])
    assert int(pruned.sum()) == target.zeros(96)


def test_counting_digits_finds_the_score_of_a_rank():
    generator = torch.Generator().manual_seed(0)
    odd = torch.tensor([torch.inf, -torch.inf, 1.0, -1.0, 0.0, -0.0, 1e-40, -1e-40, 3e38])
    crowded = torch.randint(-3, 3, (5000,), generator=generator).float()
    for scores in (odd, crowded, torch.randn(70_000, generator=generator), torch.ones(1)):
        for rank in {1, len(scores), 1 + len(scores) // 2, max(1, len(scores) // 3)}:
            assert by_digits(scores, rank) == scores.sort().values[rank - 1]


@pytest.mark.parametrize("count", [1, 4000, 4999])
def test_ties_are_broken_by_index_without_waiting_for_a_number(count):
    scores = torch.randint(0, 5, (5000,), generator=torch.Generator().manual_seed(count)).float()
    assert torch.equal(with_ties(scores, kth_smallest(scores, count), count), smallest(scores, count))


@pytest.mark.parametrize("seed", range(3))
def test_the_kth_smallest_is_the_kth_of_the_sorted_scores(seed):
    scores = tied_scores(17, seed=seed) - 2
    given = scores.clone()
    assert [kth_smallest(scores, k).item() for k in range(1, 18)] == sorted(scores.tolist())
    assert kth_smallest(scores[::2], 3).item() == sorted(scores[::2].tolist())[2]
    assert torch.equal(scores, given)


@pytest.mark.parametrize("scores", [torch.randn(40000), torch.arange(40000.0), tied_scores(40000), torch.ones(40000)])
def test_a_sample_of_many_scores_only_says_where_to_look(scores):
    ordered = scores.sort().values
    for k in (1, 2, 700, 19999, 20000, 39999, 40000):
        assert kth_smallest(scores, k) == ordered[k - 1]
    misleading = scores.clone()
    misleading[::SPACING] = 1e9
    assert kth_smallest(misleading, 20000) == misleading.sort().values[19999]


def test_infinite_scores_and_both_zeros_have_their_place():
    scores = torch.tensor([0.0, float("inf"), -0.0, -float("inf"), 0.0, float("inf"), -1.0, -float("inf")])
    for count in range(9):
        assert smallest(scores, count).tolist() == lowest(scores, count)
        assert smallest_in_rows(scores[None], torch.tensor([count])).tolist() == [lowest(scores, count)]


def test_scores_that_are_all_equal_are_chosen_from_the_front():
    for count in range(7):
        assert smallest(torch.ones(6), count).tolist() == [i < count for i in range(6)]
        rows = smallest_in_rows(torch.ones(3, 6), torch.tensor([count, 6 - count, 0])).tolist()
        assert rows == [[i < count for i in range(6)], [i < 6 - count for i in range(6)], [False] * 6]


@pytest.mark.parametrize("counts", [[0, 0, 0, 0], [9, 9, 9, 9], [0, 9, 0, 9], [4, 4, 4, 4], [4, 5, 4, 5], [9, 0, 5, 4]])
@pytest.mark.parametrize("seed", range(4))
def test_rows_of_any_counts_are_chosen_exactly(counts, seed):
    scores = tied_scores(4, 9, seed=seed)
    given = scores.clone()
    chosen = smallest_in_rows(scores, torch.tensor(counts))
    assert chosen.tolist() == [lowest(row, count) for row, count in zip(scores, counts, strict=True)]
    assert torch.equal(scores, given)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("seed", range(3))
def test_the_first_of_every_group_are_chosen_whatever_the_order_is(size, seed):
    scores = tied_scores(5, 3 * size, seed=seed)
    places = scores.reshape(-1, size).T
    for count in range(size + 1):
        chosen = first_in_groups(size, count, lambda a, b: places[b] > places[a], (5, 3 * size), torch.device("cpu"))
        expected = [flag for group in scores.reshape(-1, size) for flag in lowest(-group, count)]
        assert chosen.shape == (5, 3 * size)
        assert chosen.flatten().tolist() == expected


@pytest.mark.parametrize("text", ["2:4", "4:8", "3:6", "8:16", "1:2", "2:3"])
@pytest.mark.parametrize("seed", range(3))
def test_a_pattern_takes_the_smallest_of_every_group(text, seed):
    target = parse_target(text)
    scores = tied_scores(5, 48, seed=seed)
    expected = [
        flag for group in scores.reshape(-1, target.group) for flag in lowest(group, target.group - target.kept)
    ]
    assert select(scores, target, per_row=True).flatten().tolist() == expected


@pytest.mark.parametrize("per_row", [False, True])
def test_a_share_of_nothing_and_a_share_of_nearly_all_are_met(per_row):
    scores = tied_scores(3, 7)
    assert not select(scores, parse_target(0), per_row).any()
    assert int(select(scores, parse_target("0.999"), per_row).sum()) == 20
