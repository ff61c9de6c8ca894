"""The message format of a Gram matrix: its diagonal in float32, the part above it in one of three precisions.

    {"tokens": T, "diagonal": (I,) float32, "upper": (I * (I - 1) / 2,), "scale": (1,) float32,
     "drift": (I * I,), "drift_scale": (1,) float32}

With `int8` an entry is the correlation `G_ij / sqrt(G_ii G_jj)` in units of `scale`, one per matrix. Errors are then
small relative to their features, for any magnitude of the features. `scale` exists only with `int8`, the
drift (see `algorithms.gram`) only if the dense output is the target; it is normalized by the same diagonal.

Legend: I in features, T tokens.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedspallm_appfl.algorithms.gram import Sums
from fedspallm_appfl.tensors import triangle
from fedspallm_appfl.tensors.exact_sum import ExactSum
from fedspallm_appfl.wire.compression import Packed, Parts, inflated, is_plain, require

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
LEVELS = 127  # of int8 on either side of 0
SMALLEST_SCALE = 1e-30
SCALE_OF = {"upper": "scale", "drift": "drift_scale"}
MOST_TOKENS = 2**40


def pack_gram(sums: Sums, precision: str) -> Packed:
    """Pack one client's statistics of one input, on the CPU.

    Args:
        sums: the statistics.
        precision: one of `PRECISIONS`.
    """
    diagonal = sums.upper.diagonal().clone(memory_format=torch.contiguous_format)
    packed: Packed = {"tokens": sums.tokens, "diagonal": diagonal.cpu()}
    packed |= _rounded("upper", sums.upper, diagonal, precision)
    if sums.drift is not None:
        packed |= _rounded("drift", sums.drift, diagonal, precision)
    return packed


def _rounded(name: str, matrix: Tensor, diagonal: Tensor, precision: str) -> Packed:
    """The encoded entries above the diagonal, or all entries, one strip of rows at a time."""
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


def check_gram(packed: Any, where: str, features: int, precision: str, drift: bool) -> Packed:
    """Refuse statistics of an unexpected form; returns them uncompressed.

    Raises:
        UpdateError: names the first problem.
    """
    parts = parts_of(features, precision, drift)
    expected = {"tokens", *parts}
    complete = isinstance(packed, Mapping) and set(packed) - {"zstd"} == expected
    require(complete, where, f"statistics have the keys {', '.join(sorted(expected))}, and `zstd` if compressed")
    tokens = packed["tokens"]
    right = type(tokens) is int and 1 <= tokens <= MOST_TOKENS
    require(right, where, f"they must be of 1 to {MOST_TOKENS} tokens, got {tokens!r}")
    require(all(is_plain(packed[part]) for part in parts), where, f"{', '.join(parts)} must be tensors in memory")
    plain = {part: inflated(packed, part, where, *shape) for part, shape in parts.items()}
    for name, tensor in plain.items():
        finite = tensor.dtype == torch.int8 or bool(tensor.isfinite().all())
        require(finite, where, f"{name} holds NaN or infinity")
    require(bool((plain["diagonal"] >= 0).all()), where, "the diagonal of a Gram matrix must not be negative")
    scales = [plain[name] for name in ("scale", "drift_scale") if name in plain]
    require(all(float(scale) >= 0 for scale in scales), where, "a scale must not be negative")
    return {"tokens": tokens, **plain}


class GramSum:
    """The sum of packed statistics of one input.

    Attributes:
        features: I.
        tokens: T so far.
    """

    def __init__(self, features: int, drift: bool = False, device: str = "cpu") -> None:
        self.features, self.tokens = features, 0
        self._diagonal = ExactSum(features, device=device)
        self._upper = ExactSum(triangle.size(features), device=device)
        self._drift = ExactSum(features * features, device=device) if drift else None

    def add(self, packed: Packed) -> None:
        """Fold one client's checked statistics."""
        diagonal = packed["diagonal"].to(self._diagonal.high.device)
        self._diagonal.add(diagonal)
        self._fold(self._upper, "upper", packed, diagonal.sqrt())
        if self._drift is not None:
            self._fold(self._drift, "drift", packed, diagonal.sqrt())
        self.tokens += packed["tokens"]

    def _fold(self, into: ExactSum, name: str, packed: Packed, roots: Tensor) -> None:
        for rows, part, inside in triangle.strips(self.features, roots.device, whole=name == "drift"):
            values = packed[name][part].to(roots.device).float()
            if SCALE_OF[name] in packed:
                values *= packed[SCALE_OF[name]].to(roots.device)
                values *= (roots[rows].unsqueeze(1) * roots)[inside]
            into.add(values, part)

    def result(self) -> Sums:
        """The sums in float32; drops their accumulators."""
        upper = triangle.unflatten(self._upper.value(), self._diagonal.value())
        drift = None if self._drift is None else self._drift.value().view(self.features, self.features)
        del self._upper, self._drift
        return Sums(upper, self.tokens, drift)
