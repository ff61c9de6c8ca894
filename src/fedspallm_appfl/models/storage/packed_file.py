"""A file of a packed model: matrices with zeros as a bit mask and the kept values (docs/wire.md).

The values of a matrix NAME lie in it as `NAME.values` and its mask as `NAME.mask`; the header says its shape. Kept is every
entry with a bit that is set, so -0.0 and NaN are.
"""

import json
import math
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from fedspallm_appfl.errors import ModelError, quoted
from fedspallm_appfl.tensors import bitmask

VERSION = "1"
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of an entry -> dtype of its bits


def as_integers(tensor: Tensor) -> Tensor:
    """The bits of the entries, a view."""
    return tensor.view(INTEGERS[tensor.element_size()])


class PackedFile:
    """Its tensors, as if they were not packed."""

    def __init__(self, path: Path) -> None:
        """Open it.

        Raises:
            ValueError: it was written in another format, or its header is damaged.
        """
        self._path, self._file = path, safe_open(path, framework="pt")
        metadata = self._file.metadata() or {}
        version = metadata.get("format_version")
        if version != VERSION:
            raise ValueError(
                f"its format_version is {quoted(version)}, and {VERSION} is what can be read here; update fedspallm-appfl"
            )
        self._shapes = _shapes(metadata.get("packed", ""))
        stored = set(self._file.keys())
        parts = {f"{name}.{part}" for name in self._shapes for part in ("mask", "values")}
        if missing := sorted(parts - stored):
            raise ValueError(f"it lacks {quoted(missing[0])}; pack the model again")
        self._others = sorted(stored - parts)
        self._recent: dict[str, Tensor] = {}

    def keys(self) -> list[str]:
        """Names of the tensors."""
        return [*self._shapes, *self._others]

    def shape_and_dtype(self, key: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of one tensor."""
        packed = key in self._shapes
        stored = self._file.get_tensor(f"{key}.values" if packed else key)
        return self._shapes[key] if packed else tuple(stored.shape), stored.dtype

    def get_tensor(self, key: str) -> Tensor:
        """One tensor; the last two are kept, as the matrices of experts are read from two in turn.

        Raises:
            ModelError: mask, values and shape do not go with each other.
        """
        if key not in self._shapes:
            return self._file.get_tensor(key)
        if key not in self._recent:
            if len(self._recent) == 2:
                self._recent.pop(next(iter(self._recent)))
            self._recent[key] = self._unpacked(key)
        return self._recent[key]

    def _unpacked(self, key: str) -> Tensor:
        bits, values = (self._file.get_tensor(f"{key}.{part}") for part in ("mask", "values"))
        self._check(key, bits, values)
        return bitmask.scatter(as_integers(values), bits, self._shapes[key]).view(values.dtype)

    def _check(self, key: str, bits: Tensor, values: Tensor) -> None:
        entries = math.prod(self._shapes[key])
        beyond = int(bits[-1]) >> (entries % 8 or 8) if bits.dtype == torch.uint8 and bits.numel() else 0
        whole = bits.dtype == torch.uint8 and bits.shape == (-(-entries // 8),) and not beyond
        if whole and values.dim() == 1 and values.is_floating_point() and bitmask.count(bits) == len(values):
            return
        found = f", {bitmask.count(bits)} of them" if bits.dtype == torch.uint8 else ""
        raise ModelError(
            f"{self._path}: {key} {list(self._shapes[key])} takes a mask of {-(-entries // 8)} bytes and a float for each "
            f"bit of it that is set, got {bits.dtype} {list(bits.shape)}{found}, and "
            f"{values.dtype} {list(values.shape)}; the file is damaged, pack the model again"
        )


def _shapes(words: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the packed matrices.

    Raises:
        ValueError: the header says something else.
    """
    read = json.loads(words)
    sizes = list(read.values()) if type(read) is dict else [None]
    if not all(type(one) is list and one and all(type(size) is int and size > 0 for size in one) for one in sizes):
        raise ValueError(
            f"`packed` in its header is JSON of names and shapes, got {quoted(words)}; pack the model again"
        )
    return {name: tuple(shape) for name, shape in read.items()}
