"""What travels of a Gram matrix: its diagonal in float32, what is above it in one of three precisions.

    {"tokens": T, "diagonal": (I,) float32, "upper": (I * (I - 1) / 2,), "scale": (1,) float32,
     "drift": (I * I,), "drift_scale": (1,) float32}

With `int8` an entry is the correlation `G_ij / sqrt(G_ii G_jj)` in units of `scale`, one for the matrix: errors then are
small beside the features that they belong to, whatever the features' magnitudes. `scale` is there only with `int8`, the
drift (see `pruning.from_sums`) only where the dense output is the target; it is normalized by the same diagonal.

Legend: I in features, T tokens.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fedspallm_appfl.aggregation.gram_sum import GramSum
from fedspallm_appfl.errors import quoted
from fedspallm_appfl.pruning.from_sums import Sums
from fedspallm_appfl.tensors import triangle
from fedspallm_appfl.wire.compression import Parts

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
LEVELS = 127  # of int8 on either side of 0
SMALLEST_SCALE = 1e-30
SCALE_OF = {"upper": "scale", "drift": "drift_scale"}
MOST_TOKENS = 2**40
MOST_SQUARES = 1e30  # of the diagonal: sums over any number of clients fit into float32
MOST_CORRELATION = 1.01  # 1 and what float32 sums and bfloat16 round
MOST_DRIFT = 1000  # of a pruned model's inputs from the dense one's, in units of its largest feature
SMALLEST_NORM = 1e-15  # squares of smaller features vanish in float32, their products with others do not


@dataclass(frozen=True, eq=False)
class PackedGram:
    """The packed statistics of one input.

    Attributes:
        tokens: T.
        diagonal: (I,) float32.
        upper: (I * (I - 1) / 2,) what is above the diagonal, in one of `PRECISIONS`.
        scale: (1,) float32, the unit of `upper`; with int8 only.
        drift: (I * I,) in the same precision, where the dense output is the target.
        drift_scale: (1,) float32, its unit; with int8 only.
    """

    tokens: int
    diagonal: Tensor
    upper: Tensor
    scale: Tensor | None = None
    drift: Tensor | None = None
    drift_scale: Tensor | None = None

    def to_dict(self) -> dict[str, Any]:
        """As it travels."""
        parts = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(part.nbytes for part in self.to_dict().values() if isinstance(part, Tensor))

    def problem(self) -> str | None:
        """Why it cannot be of a Gram matrix, or None; its dtypes and shapes are right."""
        if type(self.tokens) is not int or not 1 <= self.tokens <= MOST_TOKENS:
            return f"they must be of 1 to {MOST_TOKENS} tokens, got {quoted(self.tokens)}"
        tensors = {name: part for name, part in self.to_dict().items() if isinstance(part, Tensor)}
        for name, tensor in tensors.items():
            if tensor.dtype != torch.int8 and not bool(tensor.isfinite().all()):
                return f"{name} holds NaN or infinity"
        if not bool((self.diagonal >= 0).all()):
            return "the diagonal of a Gram matrix is nowhere negative"
        if bool((self.diagonal > MOST_SQUARES).any()):
            return f"sums of squares are at most {MOST_SQUARES:g}, got {float(self.diagonal.max()):g}"
        scales = [scale for scale in (self.scale, self.drift_scale) if scale is not None]
        if not all(float(scale) >= 0 for scale in scales):
            return "a scale is not negative"
        if self.scale is not None and float(self.scale) * LEVELS > MOST_CORRELATION:
            return f"correlations are at most 1, got {float(self.scale) * LEVELS:g}"
        roots = self.diagonal.sqrt()
        if self.scale is None and not self._within("upper", roots.clamp(min=SMALLEST_NORM), MOST_CORRELATION):
            return "correlations are at most 1, got larger ones"
        largest = float(roots.max().clamp(min=SMALLEST_NORM))
        if self.drift is not None and not self._within("drift", torch.full_like(roots, largest), MOST_DRIFT):
            return f"the drift is at most {MOST_DRIFT} times what the largest diagonal entries give, got more"
        return None

    def _within(self, name: str, norms: Tensor, most: float) -> bool:
        """Whether no entry exceeds so many times what inputs of such norms, (I,), give at most."""
        for (rows, _, inside), (_, values) in zip(
            triangle.strips(len(norms), whole=name == "drift"), self.strips(name, self.diagonal.sqrt()), strict=True
        ):
            limits = (norms[rows].unsqueeze(1) * norms)[inside].mul_(most)
            if not bool((values.abs() <= limits).all()):  # false for NaN too
                return False
        return True

    def strips(self, name: str, roots: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Entries as they were before they were rounded, a strip of rows at a time.

        Args:
            name: `upper` or `drift`.
            roots: (I,) float32, square roots of the diagonal, where the entries are wanted.
        """
        packed, scale = (self.upper, self.scale) if name == "upper" else (self.drift, self.drift_scale)
        assert packed is not None
        whole = name == "drift"
        for rows, part in triangle.parts(len(roots), whole):
            values = packed[part].to(roots.device).float()
            if scale is not None:
                values *= scale.to(roots.device)
                values *= triangle.products(roots, rows, whole)
            yield part, values

    def norm_of(self, name: str) -> float:
        """Frobenius norm of `drift`, or of what is above the diagonal."""
        strips = self.strips(name, self.diagonal.sqrt())
        return math.sqrt(math.fsum(float(values.double().square().sum()) for _, values in strips))

    def add_to(self, total: GramSum) -> None:
        """Fold it into a sum."""
        diagonal = self.diagonal.to(total.device)
        roots = diagonal.sqrt()
        total.add(
            self.tokens,
            diagonal,
            self.strips("upper", roots),
            self.strips("drift", roots) if self.drift is not None else (),
        )


def pack_gram(sums: Sums, precision: str) -> PackedGram:
    """Pack one client's statistics of one input, on the CPU.

    Args:
        sums: the statistics.
        precision: one of `PRECISIONS`.
    """
    diagonal = sums.upper.diagonal().clone(memory_format=torch.contiguous_format)
    upper = _rounded("upper", sums.upper, diagonal, precision)
    drift = {} if sums.drift is None else _rounded("drift", sums.drift, diagonal, precision)
    return PackedGram(sums.tokens, diagonal.cpu(), **upper, **drift)


def _rounded(name: str, matrix: Tensor, diagonal: Tensor, precision: str) -> dict[str, Tensor]:
    """What travels of the entries above the diagonal, or of all of them, a strip of rows at a time."""
    side, whole, kind = len(matrix), name == "drift", PRECISIONS[precision]
    flat = torch.empty(side * side if whole else triangle.size(side), dtype=kind)
    if precision != "int8":
        for rows, part, inside in triangle.strips(side, matrix.device, whole):
            flat[part] = matrix[rows][inside].to(kind).cpu()
        return {name: flat}
    inverse = torch.where(diagonal > 0, diagonal.rsqrt(), 0.0)

    def correlations(rows: slice, inside: Tensor) -> Tensor:
        return (matrix[rows] * inverse[rows].unsqueeze(1) * inverse)[inside]

    strips = list(triangle.strips(side, matrix.device, whole))
    largest = max(
        (float(correlations(rows, inside).abs().max()) for rows, _, inside in strips if inside.any()), default=0.0
    )
    scale = torch.tensor([max(largest, SMALLEST_SCALE) / LEVELS])
    for rows, part, inside in strips:
        flat[part] = correlations(rows, inside).div_(float(scale)).round_().to(kind).cpu()
    return {name: flat, SCALE_OF[name]: scale}


def gram_size(features: int, precision: str, drift: bool = False) -> int:
    """Bytes that the statistics of one input take, uncompressed."""
    entries, scales = triangle.size(features), 1
    if drift:
        entries, scales = entries + features * features, 2
    scales = scales if precision == "int8" else 0
    return 4 * features + entries * PRECISIONS[precision].itemsize + 4 * scales


def packing_bytes(features: int) -> int:
    """Bytes that packing statistics of an input takes beside them: which entries each strip of rows has, and strips."""
    return features * features + triangle.strips_bytes(features)


def parts_of(features: int, precision: str, drift: bool) -> Parts:
    """The tensors of packed statistics: name -> (entries, dtype)."""
    kind = PRECISIONS[precision]
    parts: Parts = {"diagonal": (features, torch.float32), "upper": (triangle.size(features), kind)}
    if precision == "int8":
        parts["scale"] = (1, torch.float32)
    if drift:
        parts["drift"] = (features * features, kind)
        if precision == "int8":
            parts["drift_scale"] = (1, torch.float32)
    return parts
