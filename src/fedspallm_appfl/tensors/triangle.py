"""The part of a square matrix above its diagonal as a flat row of numbers, row by row.

Legend: I side of the matrix.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

ROWS = 256  # of a strip: few enough that what is made for one does not matter
COPIES = 4  # of a strip, that packing or summing makes


def size(side: int) -> int:
    """Entries above the diagonal."""
    return side * (side - 1) // 2


def strips(side: int, device: torch.device | str = "cpu", whole: bool = False) -> Iterator[tuple[slice, slice, Tensor]]:
    """Some rows at a time: (rows of the matrix, their part of the row of numbers, which of their entries it holds).

    The last is (rows, I) bool; it selects entries row by row, in storage order. With `whole` the row of numbers
    holds the whole matrix.
    """
    columns = torch.arange(side, device=device)
    for start in range(0, side, ROWS):
        rows = slice(start, min(start + ROWS, side))
        if whole:
            yield rows, slice(rows.start * side, rows.stop * side), columns.new_ones(len(columns[rows]), side).bool()
        else:
            part = slice(size(side) - size(side - rows.start), size(side) - size(side - rows.stop))
            yield rows, part, columns > columns[rows].unsqueeze(1)


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


def products(numbers: Tensor, rows: slice, inside: Tensor) -> Tensor:
    """Products of numbers, (I,), two at a time: those of a strip's entries, in storage order.

    Args:
        numbers: one for each row and column.
        rows: of the strip.
        inside: its entries, as `strips` gives them.
    """
    if numbers.device.type != "cpu" or bool(inside[-1, 0]):
        return (numbers[rows].unsqueeze(1) * numbers)[inside]
    first = zip(range(rows.start, rows.stop), numbers[rows].tolist(), strict=True)
    return torch.cat([numbers[row + 1 :] * one for row, one in first])  # selecting takes longer than multiplying


def strips_bytes(side: int) -> int:
    """Bytes of what is made of a strip of rows of a float32 matrix: some copies of it."""
    return COPIES * 4 * min(ROWS, side) * side
