"""The part of a square matrix above its diagonal as a flat row of numbers, row by row.

Legend: I side of the matrix.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

ROWS = 256  # of a strip: few enough that what is made for one does not matter
COPIES = 4  # of a strip, that packing or summing makes


def size(side: int) -> int:
    """Entries above the diagonal."""
    return side * (side - 1) // 2


def parts(side: int, whole: bool = False) -> Iterator[tuple[slice, slice]]:
    """Some rows at a time: (rows of the matrix, their part of the row of numbers).

    With `whole` the row of numbers holds the whole matrix.
    """
    for start in range(0, side, ROWS):
        rows = slice(start, min(start + ROWS, side))
        if whole:
            yield rows, slice(rows.start * side, rows.stop * side)
        else:
            yield rows, slice(size(side) - size(side - rows.start), size(side) - size(side - rows.stop))


def strips(side: int, device: torch.device | str = "cpu", whole: bool = False) -> Iterator[tuple[slice, slice, Tensor]]:
    """`parts`, and of each which entries of the matrix it holds.

    These are (rows, I) bool; they select entries row by row, in storage order.
    """
    columns = torch.arange(side, device=device)
    for rows, part in parts(side, whole):
        inside = columns > columns[rows].unsqueeze(1)
        yield rows, part, torch.ones_like(inside) if whole else inside


def flatten(matrix: Tensor) -> Tensor:
    """(I, I), read only above the diagonal -> (I * (I - 1) / 2,)."""
    flat = matrix.new_empty(size(len(matrix)))
    for rows, part, above in strips(len(matrix), matrix.device):
        flat[part] = matrix[rows][above]
    return flat


def unflatten(flat: Tensor, diagonal: Tensor) -> Tensor:
    """(I * (I - 1) / 2,) and the diagonal (I,) -> (I, I) with zeros below the diagonal."""
    matrix = torch.diag(diagonal)
    for rows, part, above in strips(len(diagonal), flat.device):
        matrix[rows][above] = flat[part]
    return matrix


def products(numbers: Tensor, rows: slice, whole: bool = False) -> Tensor:
    """Products of numbers, (I,) float, two at a time: those of some rows' entries, in storage order.

    Args:
        numbers: one for each row and column.
        rows: as `parts` gives them.
        whole: all entries of the rows, not only those above the diagonal.
    """
    if whole or numbers.device.type != "cpu":
        square, columns = numbers[rows].unsqueeze(1) * numbers, torch.arange(len(numbers), device=numbers.device)
        return square.view(-1) if whole else square[columns > columns[rows].unsqueeze(1)]
    side, factors, end = len(numbers), numbers.numpy(), 0
    made = torch.empty(size(side - rows.start) - size(side - rows.stop), dtype=numbers.dtype)
    flat = made.numpy()
    for row in range(rows.start, rows.stop):  # selecting takes longer than multiplying
        start, end = end, end + side - row - 1
        np.multiply(factors[row + 1 :], factors[row], out=flat[start:end])
    return made


def strips_bytes(side: int) -> int:
    """Bytes of what is made of a strip of rows of a float32 matrix: some copies of it."""
    return COPIES * 4 * min(ROWS, side) * side
