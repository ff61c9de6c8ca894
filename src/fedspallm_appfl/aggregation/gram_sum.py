"""The sum of Gram matrices over clients: every token counts the same, whoever has it, in whatever order they come.

Legend: I in features, T tokens.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from fedspallm_appfl.pruning.from_sums import Sums
from fedspallm_appfl.tensors import triangle
from fedspallm_appfl.tensors.exact_sum import ExactSum

Strips = Iterable[tuple[slice, Tensor]]  # a part of a row of numbers, and its values in float32


class GramSum:
    """The sum of the statistics of one input.

    Attributes:
        features: I.
        tokens: T so far.
    """

    def __init__(self, features: int, drift: bool = False, device: str = "cpu") -> None:
        self.features, self.tokens = features, 0
        self._diagonal = ExactSum(features, device=device)
        self._upper = ExactSum(triangle.size(features), device=device)
        self._drift = ExactSum(features * features, device=device) if drift else None

    def add(self, tokens: int, diagonal: Tensor, upper: Strips, drift: Strips = ()) -> None:
        """Fold one client's statistics.

        Args:
            tokens: how many its Gram matrix is of.
            diagonal: (I,) float32.
            upper: what is above the diagonal, row after row, a strip at a time.
            drift: the whole drift in the same way, where it is summed.
        """
        self._diagonal.add(diagonal)
        for part, values in upper:
            self._upper.add(values, part)
        if self._drift is not None:
            for part, values in drift:
                self._drift.add(values, part)
        self.tokens += tokens

    @property
    def device(self) -> torch.device:
        """Where the sums are."""
        return self._diagonal.high.device

    def result(self) -> Sums:
        """The sums in float32; what they were made of is dropped."""
        upper = triangle.unflatten(self._upper.value(), self._diagonal.value())
        drift = None if self._drift is None else self._drift.value().view(self.features, self.features)
        del self._upper, self._drift
        return Sums(upper, self.tokens, drift)

    @staticmethod
    def closing_bytes(features: int, drift: bool) -> int:
        """Bytes that `result` takes beside the sums: doubles, then floats, then the square; the drift last."""
        above, square = triangle.size(features), 4 * features * features
        upper = max(12 * above, 4 * above + square) + triangle.strips_bytes(features)
        return max(upper, square + 12 * features * features) if drift else upper

    @staticmethod
    def nbytes(features: int, drift: bool) -> int:
        """Bytes of the sums of an input: two doubles an entry."""
        return 16 * (features + triangle.size(features) + drift * features * features)
