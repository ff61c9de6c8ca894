"""Targets, exact counts and exact choices."""

from fractions import Fraction

import pytest
import torch

from fedspallm_appfl.sparsity import (
    NM,
    Ratio,
    check_divides,
    parse_target,
    row_counts,
    select,
    smallest,
    smallest_in_rows,
)


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
        (50, r"got 50; 50 % is written 0.5"),
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
