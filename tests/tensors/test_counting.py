"""Zeros and n:m patterns of a matrix, counted."""

import pytest
import torch

from fedspallm_appfl.by_hand import magnitude
from fedspallm_appfl.tensors.counting import PATTERNS, count_zeros


def by_hand(matrix):
    """Oracle: (zeros, patterns) by loops over Python lists."""
    rows = matrix.tolist()
    groups = {
        one: [row[at : at + one.group] for row in rows for at in range(0, len(row), one.group)] for one in PATTERNS
    }
    follows = tuple(
        one
        for one, parts in groups.items()
        if all(len(part) == one.group and sum(x != 0 for x in part) <= one.kept for part in parts)
    )
    return sum(x == 0 for row in rows for x in row), follows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("target", "patterns"),
    [("2:4", ["2:4", "4:8"]), ("4:8", ["4:8"]), ("1:4", ["2:4", "4:8"]), (0.5, []), (0.0, [])],
)
def test_they_are_those_of_a_loop(target, patterns, dtype):
    matrix = magnitude(torch.randn(6, 16, generator=torch.Generator().manual_seed(1)), target)[0].to(dtype)
    found = count_zeros(matrix)
    assert (found.zeros, found.patterns) == by_hand(matrix)
    assert [str(one) for one in found.patterns] == patterns
    assert found.entries == 96 and found.share == found.zeros / 96
    assert count_zeros(matrix.T.contiguous().T) == found  # a view of what is stored transposed


def test_one_weight_too_many_breaks_a_pattern_and_a_group_does_not_span_rows():
    matrix = magnitude(torch.randn(6, 16, generator=torch.Generator().manual_seed(1)), "2:4")[0]
    matrix[3, int((matrix[3] == 0).nonzero()[0])] = 1
    assert [str(one) for one in count_zeros(matrix).patterns] == []
    matrix[3, :4] = 0
    assert [str(one) for one in count_zeros(matrix).patterns] == ["2:4", "4:8"]
    assert count_zeros(torch.zeros(4, 6)).patterns == ()
