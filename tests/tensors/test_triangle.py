"""What is above the diagonal, row after row: plain loops, sides around the width of a strip, nothing else read."""

import pytest
import torch

from fedspallm_appfl.tensors import triangle

SIDES = [0, 1, 2, 3, 255, 256, 257, 511, 512, 600]


def numbered(side):
    """Every entry says where it is."""
    return torch.arange(side * side, dtype=torch.float64).view(side, side)


def loops(side):
    """Oracle: the number of each entry above the diagonal of `numbered`."""
    return [row * side + column for row in range(side) for column in range(row + 1, side)]


@pytest.mark.parametrize("side", SIDES)
def test_the_row_of_numbers_is_the_triangle_row_by_row(side):
    flat = triangle.flatten(numbered(side))
    assert flat.dtype is torch.float64
    assert flat.tolist() == loops(side)
    assert triangle.size(side) == len(loops(side))


@pytest.mark.parametrize("side", SIDES)
def test_round_trip_with_zeros_below(side):
    matrix = numbered(side)
    back = triangle.unflatten(triangle.flatten(matrix), matrix.diagonal().clone())
    assert torch.equal(back, matrix.triu())


@pytest.mark.parametrize("side", [2, 257, 600])
def test_what_is_on_and_below_the_diagonal_is_not_read(side):
    matrix = numbered(side)
    expected = triangle.flatten(matrix)
    rows, columns = torch.tril_indices(side, side)
    matrix[rows, columns] = torch.nan
    assert torch.equal(triangle.flatten(matrix), expected)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("side", SIDES)
def test_strips_cover_every_entry_once_in_order(side, whole):
    end = seen = 0
    for rows, part, inside in triangle.strips(side, whole=whole):
        assert rows.start == seen
        assert rows.stop - rows.start <= triangle.ROWS
        assert part.start == end
        assert inside.shape == (rows.stop - rows.start, side)
        assert inside.dtype is torch.bool
        assert int(inside.sum()) == part.stop - part.start
        expected = torch.ones(side, side).bool() if whole else torch.ones(side, side).bool().triu(1)
        assert torch.equal(inside, expected[rows])
        seen, end = rows.stop, part.stop
    assert (seen, end) == (side, side * side if whole else triangle.size(side))


def test_the_diagonal_that_is_given_is_not_shared():
    diagonal = torch.ones(3)
    matrix = triangle.unflatten(torch.zeros(3), diagonal)
    matrix.zero_()
    assert diagonal.tolist() == [1.0] * 3


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("side", [1, 257, 600])
def test_products_of_two_numbers_are_those_of_the_square(side, whole):
    numbers = torch.rand(side, generator=torch.Generator().manual_seed(0))
    square = numbers.unsqueeze(1) * numbers
    for rows, _, inside in triangle.strips(side, whole=whole):
        assert torch.equal(triangle.products(numbers, rows, whole), square[rows][inside])
