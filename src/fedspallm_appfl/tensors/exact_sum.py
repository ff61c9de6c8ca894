"""Sums of floating-point numbers that do not depend on the order of the numbers.

A double with the rounding errors of all additions in a second one holds a hundred bits: more than lie between the largest
and the smallest of float32 numbers that differ by less than 2^70, and far more than the float32 result needs.
Fixed-point numbers, as in `l0_mean`, would not work, because the values here have any magnitude.
"""

import torch
from torch import Tensor


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
        high, values = self.high[part], values.double()
        total = high + values
        taken = total - high
        self.low[part] += (high - (total - taken)) + (values - taken)
        self.high[part] = total

    def value(self, part: slice = slice(None)) -> Tensor:
        """The sum, or a part of it, in float32."""
        return (self.high[part] + self.low[part]).float()
