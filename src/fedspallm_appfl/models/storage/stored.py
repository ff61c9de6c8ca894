"""Where the tensors of a model lie in its checkpoint: under older names, or in pieces.

transformers renames weights when it loads them, and merges the matrices of experts, which most checkpoints keep apart, into
one tensor. A pruned matrix has to be written back to where it was read, so the way is known in both directions here.

Legend: E experts, O out features, I in features.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightRenaming

from fedspallm_appfl.errors import ModelError
from fedspallm_appfl.models.layout import Linear
from fedspallm_appfl.models.storage.checkpoint import CheckpointFiles


@dataclass(frozen=True)
class Piece:
    """A tensor of the checkpoint that fills a parameter or a part of it.

    Attributes:
        key: its name in the checkpoint.
        expert: index along the first dimension of the parameter that it fills; None for all.
        rows: rows of the parameter, or of that expert's part of it; None for all.
        swapped: its last two dimensions are those of the parameter the other way round.
    """

    key: str
    expert: int | None = None
    rows: tuple[int, int] | None = None
    swapped: bool = False


@dataclass(frozen=True)
class Place:
    """Where a prunable matrix lies in the checkpoint.

    Attributes:
        key: name of the tensor.
        expert: index along its first dimension; None if the tensor is one matrix.
        rows: rows of the matrix (O, I) there; None for all.
        transposed: the matrix lies there as (I, O).
    """

    key: str
    expert: int | None
    rows: tuple[int, int] | None
    transposed: bool

    @property
    def name(self) -> str:
        """For manifests: the key, and which part of the tensor."""
        expert = "" if self.expert is None else f"[{self.expert}]"
        return self.key + expert + ("" if self.rows is None else f"[{self.rows[0]}:{self.rows[1]}]")

    def view(self, stored: Tensor) -> Tensor:
        """The matrix (O, I), a view of the tensor that is stored."""
        return self.inside(stored if self.expert is None else stored[self.expert])

    def inside(self, slab: Tensor) -> Tensor:
        """The matrix (O, I), a view of the two-dimensional part of the tensor that it lies in."""
        matrix = slab.T if self.transposed else slab
        return matrix if self.rows is None else matrix[slice(*self.rows)]


class Stored:
    """Parameters and buffers of a model by their place in the checkpoint."""

    def __init__(self, model: PreTrainedModel, files: CheckpointFiles) -> None:
        self._files = files
        self._prefix = f"{model.base_model_prefix}."
        self._steps = get_model_conversion_mapping(model)
        self._todays: dict[str, str] = {}  # name that this version of transformers uses -> name in the checkpoint
        self._merged: dict[str, tuple[Any, dict[str, list[str]]]] = {}  # parameter -> (step, pattern -> keys)
        for key in files.keys():  # noqa: SIM118 - not a dict
            self._note(key)

    def _note(self, key: str) -> None:
        name = key
        for step in self._steps:
            if isinstance(step, WeightRenaming):
                name = step.rename_source_key(name)[0]
        self._todays[name] = key
        for step in self._steps:
            if not isinstance(step, WeightRenaming):
                target, pattern = step.rename_source_key(name)
                if pattern is not None:
                    _, sources = self._merged.setdefault(target, (step, defaultdict(list)))
                    sources[pattern].append(key)
                    return

    def key(self, name: str) -> str | None:
        """Name in the checkpoint of what has one; it may be an older name or differ by the base's prefix."""
        options = self._options(name)
        renamed = next((self._todays[option] for option in options if option in self._todays), None)
        return renamed or next((option for option in options if option in self._files), None)

    def _options(self, name: str) -> tuple[str, ...]:
        return name, name.removeprefix(self._prefix), self._prefix + name

    def pieces(self, name: str, shape: tuple[int, ...]) -> tuple[Piece, ...]:
        """What fills a parameter of this name and shape; empty if the checkpoint lacks it.

        Raises:
            ModelError: it has another shape, or transformers computes it in a way that is not known here.
        """
        step, sources = next((self._merged[one] for one in self._options(name) if one in self._merged), (None, {}))
        key = self.key(name)
        if key is not None:
            stored = self._files.shape_and_dtype(key)[0]
            swaps = any(isinstance(operation, Transpose) for operation in getattr(step, "operations", ()))
            if stored != shape and not (swaps and stored == (*shape[:-2], shape[-1], shape[-2])):
                raise ModelError(
                    f"{self._files.folder}: {key} has shape {list(stored)}, config.json says {list(shape)}"
                )
            return (Piece(key, swapped=stored != shape),)
        if step is None:
            return ()
        found = self._joined(step, sources, shape)
        if not found:
            raise ModelError(
                f"{self._files.folder}: transformers makes {name} of {', '.join(map(str, step.source_patterns))} in a way "
                f"that cannot be undone here ({', '.join(type(one).__name__ for one in step.operations)}): not supported"
            )
        return found

    def _joined(self, step: Any, sources: dict[str, list[str]], shape: tuple[int, ...]) -> tuple[Piece, ...]:
        """The pieces that are put one above the other, of each expert if there are some; empty if it is made otherwise."""
        kinds = tuple(type(operation) for operation in step.operations)
        if kinds not in ((MergeModulelist,), (MergeModulelist, Concatenate), (Concatenate,)):
            return ()
        experts = kinds[0] is MergeModulelist
        matrix = shape[1:] if experts else shape
        pieces, top = [], 0
        for pattern in step.source_patterns:
            keys = sorted(sources[pattern], key=_by_number)
            sizes = {self._files.shape_and_dtype(key)[0] for key in keys}
            if len(keys) != (shape[0] if experts else 1) or len(sizes) != 1 or next(iter(sizes))[1:] != matrix[1:]:
                return ()
            height = next(iter(sizes))[0]
            rows = None if height == matrix[0] else (top, top + height)
            pieces += [Piece(key, expert if experts else None, rows) for expert, key in enumerate(keys)]
            top += height
        return tuple(pieces) if top == matrix[0] else ()


def _by_number(key: str) -> list[tuple[int, str]]:
    """Keys in the order of the numbers in them: 2 before 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in key.split(".")]


def place(linear: Linear, pieces: Sequence[Piece]) -> Place:
    """Where a matrix lies, of the pieces that fill its parameter.

    Raises:
        ModelError: the matrix itself is in pieces.
    """
    part = linear.part
    if part is None:
        if len(pieces) > 1:
            raise ModelError(
                f"{linear.name} is stored as {', '.join(piece.key for piece in pieces)}: a matrix that transformers puts "
                "together is not supported"
            )
        [piece] = pieces
        return Place(piece.key, None, None, linear.transposed != piece.swapped)
    piece = next(one for one in pieces if one.expert in (None, part.expert) and one.rows in (None, part.rows))
    expert = part.expert if piece.expert is None else None
    rows = None if piece.rows == part.rows else part.rows
    return Place(piece.key, expert, rows, linear.transposed != piece.swapped)


def read(
    pieces: Sequence[Piece], files: CheckpointFiles, shape: torch.Size, device: torch.device, dtype: torch.dtype | None
) -> Tensor:
    """A parameter in memory of its own, copied once whatever its pieces; `dtype` None is that of the checkpoint."""
    stored = files.read(pieces[0].key)
    if len(pieces) == 1:
        stored = stored.transpose(-1, -2) if pieces[0].swapped else stored
        if device.type == "cuda":  # it travels as it is stored
            return stored.to(device).to(dtype or stored.dtype)
        return stored.to(device=device, dtype=dtype, copy=True)
    whole = torch.empty(shape, dtype=dtype or stored.dtype, device=device)
    for piece in pieces:
        part = whole if piece.expert is None else whole[piece.expert]
        part = part if piece.rows is None else part[slice(*piece.rows)]
        part.copy_(files.read(piece.key))
    return whole
