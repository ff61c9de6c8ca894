"""Sums of floating-point numbers that do not depend on the order of the numbers, or on threads.

A double with the rounding errors of all additions in a second one holds a hundred bits: more than lie between the largest
and the smallest of float32 numbers that differ by less than 2^70, and far more than the float32 result needs.
Fixed-point numbers, as in `l0_mean`, would not work, because the values here have any magnitude.
"""

import math

import torch
from torch import Tensor

from fedspallm_appfl.tensors import native

PART = 2**14  # entries that torch adds up with one thread, whatever it has
TILE = 2**15  # entries added at a time on a CPU: what is made on the way stays in the cache


class ExactSum:
    """A sum of tensors of one shape.

    Attributes:
        high: the rounded sum, float64.
        low: its rounding error, float64.
    """

    def __init__(self, *shape: int, device: torch.device | str = "cpu") -> None:
        self.high = torch.zeros(shape, dtype=torch.float64, device=device)
        self.low = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(self, values: Tensor, part: slice = slice(None)) -> None:
        """Add float values to the whole sum or to a part of it (two-sum of Knuth, TAOCP 2, section 4.2.2)."""
        high, low, values = self.high[part].view(-1), self.low[part].view(-1), values.reshape(-1)
        if values.dtype == torch.float32 and len(values) == len(high) and native.serves(high, low, values):
            shares = native.ranges(len(values), 1)
            native.call_in_parts(
                "add_exactly", [(values[one], len(values[one]), high[one], low[one]) for one in shares]
            )
            return
        step = TILE if high.device.type == "cpu" else max(1, len(high))
        for start in range(0, len(high), step):
            tile = slice(start, start + step)
            _add(high[tile], low[tile], values[tile].double())

    def value(self, part: slice = slice(None)) -> Tensor:
        """The sum, or a part of it, in float32."""
        return (self.high[part] + self.low[part]).float()


def _add(high: Tensor, low: Tensor, values: Tensor) -> None:
    """Add doubles to a sum in its place."""
    total = high + values
    taken = total - high
    low += (high - (total - taken)) + (values - taken)
    high.copy_(total)


def sum_of_squares(values: Tensor) -> float:
    """Of a tensor of any shape and float dtype, with the same bits for any number of threads."""
    return math.fsum(float(part.double().square().sum()) for part in values.reshape(-1).split(PART))
