"""What rests on disk: packed blocks, what a client was sent, Gram matrices, and sums between rounds.

Each is a folder of safetensors files. A file appears under its name only when it is complete, so a run that was killed
leaves no half of one.

Legend: I in features.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedspallm_appfl.aggregation.l0_mean import L0Sums
from fedspallm_appfl.aggregation.mask_expansion import Votes
from fedspallm_appfl.errors import ModelError, first_line, shortened
from fedspallm_appfl.pruning.from_sums import Sums
from fedspallm_appfl.tensors import triangle
from fedspallm_appfl.wire.durable import in_words, publish
from fedspallm_appfl.wire.packed import Packed
from fedspallm_appfl.wire.update import read_matrices

PARTS = ("mask", "values")
SumsT = TypeVar("SumsT", L0Sums, Votes)


def save_whole(file: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], what: str) -> None:
    """Write a safetensors file in place of an earlier one.

    Args:
        file: its name; the folder is made if need be.
        tensors: by name.
        facts: what its header says, as JSON.
        what: what to name in the error.

    Raises:
        ModelError: there is no room, or the folder cannot be written.
    """
    partial = file.with_suffix(".partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), partial, metadata={name: json.dumps(value) for name, value in facts.items()})
        publish(partial, file)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{what} cannot be stored in {file.parent}: {error}; make room there") from error


def _whole(packed: Packed) -> Packed:
    """The same, if its parts belong together.

    Raises:
        ValueError: they do not.
    """
    rows, columns = packed.shape
    mask, values = packed.mask, packed.values
    right = type(rows) is type(columns) is int and rows > 0 and columns > 0
    if not right or mask is None or mask.dtype != torch.uint8 or tuple(mask.shape) != (-(-rows * columns // 8),):
        raise ValueError(f"its mask is not that of a matrix of {shortened(packed.shape)}")
    if values is not None and tuple(values.shape) != (packed.kept,):
        raise ValueError(f"it has {values.numel()} values for {packed.kept} entries")
    return packed


def _damaged(file: Path, error: Exception) -> ModelError:
    return ModelError(f"{file} is damaged: {shortened(first_line(error))}; run the experiment again")


class PackedStore:
    """A folder of packed blocks: what the server has agreed on does not have to stay in memory.

    Attributes:
        folder: where the files are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def blocks(self) -> list[int]:
        """Indices of the blocks that are stored."""
        return sorted(int(file.stem.removeprefix("block-")) for file in self.folder.glob("block-*.safetensors"))

    def save(self, block: int, linears: Mapping[str, Packed]) -> None:
        """Store one block, in place of what was stored of it.

        Raises:
            ModelError: there is no room, or the folder cannot be written.
        """
        parts = {f"{name}/{part}": getattr(linears[name], part) for name in linears for part in PARTS}
        tensors = {name: tensor for name, tensor in parts.items() if tensor is not None}
        shapes = {name: linears[name].shape for name in sorted(linears)}
        save_whole(self._file(block), tensors, {"shapes": shapes}, f"block {block}")

    def add(self, block: int, linears: Mapping[str, Packed]) -> None:
        """Store some matrices of a block beside those that are stored of it already."""
        self.save(block, {**(self.get(block) or {}), **linears})

    def get(self, block: int, only: str | None = None) -> dict[str, Packed] | None:
        """One block with its matrices, or only one of them, in the order of their names; None if it is not stored.

        Raises:
            ModelError: the file is damaged.
        """
        if not self._file(block).is_file():
            return None
        with self._opened(block) as (file, shapes):
            stored = set(file.keys())
            return {
                name: _whole(
                    Packed(
                        tuple(shape),
                        *(file.get_tensor(f"{name}/{part}") if f"{name}/{part}" in stored else None for part in PARTS),
                    )
                )
                for name, shape in shapes.items()
                if only in (None, name)
            }

    def names(self, block: int) -> list[str]:
        """The matrices that are stored of a block.

        Raises:
            ModelError: the file is damaged.
        """
        with self._opened(block) as (_, shapes):
            return list(shapes)

    @contextmanager
    def _opened(self, block: int) -> Iterator[tuple[Any, dict[str, Any]]]:
        """The file of a block, and the shapes of its matrices."""
        try:
            with safe_open(self._file(block), framework="pt") as file:
                yield file, dict(json.loads(file.metadata()["shapes"]))
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
            raise _damaged(self._file(block), error) from error

    def _file(self, block: int) -> Path:
        return self.folder / f"block-{block:04d}.safetensors"


class AgreedBlocks:
    """What the federation has agreed on so far, as a client was sent it; in later rounds it runs one block at a time.

    Clients of one process may share a folder, since they are all sent the same: then each piece is stored once.

    Attributes:
        seen: where it is asked for, block and linear -> the round it came in last, and its hash.
    """

    def __init__(self, dtype: torch.dtype, folder: Path, looks: bool = False) -> None:
        """Start with nothing agreed on.

        Args:
            dtype: dtype of the values.
            folder: of one run, which its clients in this process may share.
            looks: fill `seen`.
        """
        self._dtype, self._looks = dtype, looks
        self.seen: dict[tuple[int, str], tuple[int, str]] = {}
        self._folder, self._store = folder, PackedStore(folder)
        self.blocks, self.get = self._store.blocks, self._store.get

    def take(self, update: Mapping[str, Any]) -> None:
        """Store a piece of the server's update in place of what was agreed on before, unless somebody did already."""
        there = self._mark(update).exists()
        if there and not self._looks:
            return
        matrices = read_matrices(update, self._dtype)
        if self._looks:
            self.seen |= seen(update, matrices)
        if not there:
            for block, linears in matrices.items():
                self._store.add(block, linears)
            with in_words(self._mark(update)):
                self._mark(update).touch()

    def has(self, update: Mapping[str, Any]) -> bool:
        """Whether a piece lies here, whoever stored it; not where this one has to have seen it itself."""
        return not self._looks and self._mark(update).exists()

    def _mark(self, update: Mapping[str, Any]) -> Path:
        return self._folder / f"round-{update['round']}-{update['exchange']}-piece-{update['piece']}"


def seen(
    update: Mapping[str, Any], matrices: Mapping[int, Mapping[str, Packed]]
) -> dict[tuple[int, str], tuple[int, str]]:
    """Block and linear -> round and hash of each of the matrices in the server's update."""
    return {
        (block, name): (int(update["round"]), packed.sha256())
        for block, linears in matrices.items()
        for name, packed in linears.items()
    }


class GramStore:
    """A folder of Gram matrices, by block and by the first linear that takes the input; further models are made of them.

    Attributes:
        folder: where the files are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, block: int, linears: tuple[str, ...], sums: Sums, rounded: bool) -> None:
        """Store the sums of one input, in place of what was stored of it.

        Args:
            block: the block.
            linears: all linears that take the input.
            sums: without drift, which belongs to one pruned model only.
            rounded: whether clients rounded what they sent so that the sum may be indefinite.

        Raises:
            ModelError: there is no room, or the folder cannot be written.
        """
        tensors = {"diagonal": sums.upper.diagonal().clone().cpu(), "upper": triangle.flatten(sums.upper).cpu()}
        facts = {"linears": linears, "tokens": sums.tokens, "rounded": rounded}
        save_whole(self._file(block, linears[0]), tensors, facts, f"the sums of block {block}, {linears[0]}")

    def load(self, block: int, linear: str) -> tuple[tuple[str, ...], Sums, bool] | None:
        """(linears that take the input, sums, whether they were rounded); None if there are none.

        Raises:
            ModelError: the file is damaged.
        """
        if not self._file(block, linear).is_file():
            return None
        try:
            with safe_open(self._file(block, linear), framework="pt") as file:
                facts, flat, diagonal = file.metadata() or {}, file.get_tensor("upper"), file.get_tensor("diagonal")
            if len(flat) != triangle.size(len(diagonal)):
                raise ValueError(f"{len(flat)} entries above a diagonal of {len(diagonal)}")
            if not (flat.dtype == diagonal.dtype == torch.float32 and bool(flat.isfinite().all())):
                raise ValueError("its entries are not finite float32 numbers")
            if not bool((diagonal >= 0).all()) or not bool(diagonal.isfinite().all()):
                raise ValueError("its diagonal is not that of a Gram matrix")
            linears = tuple(map(str, json.loads(facts["linears"])))
            sums = Sums(triangle.unflatten(flat, diagonal), int(facts["tokens"]))
            return linears, sums, bool(json.loads(facts["rounded"]))
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise _damaged(self._file(block, linear), error) from error

    def added(self, block: int, linear: str, sums: Sums) -> Sums:
        """Sums with those added that are stored of the same input."""
        found = self.load(block, linear)
        if found is None:
            return sums
        earlier = found[1]
        total = sums.upper.add_(earlier.upper.to(sums.upper.device))
        return replace(sums, upper=total, tokens=sums.tokens + earlier.tokens)

    def units(self) -> list[tuple[int, str]]:
        """(block, first linear) of all inputs that are stored, in order."""
        names = (file.stem.partition("-") for file in self.folder.glob("[0-9][0-9][0-9][0-9]-*.safetensors"))
        return sorted((int(block), linear) for block, _, linear in names)

    def _file(self, block: int, linear: str) -> Path:
        return self.folder / f"{block:04d}-{linear}.safetensors"


def save_sums(sums: SumsT, file: Path) -> None:
    """Write sums in place of those that the file held, for `fold: cumulative`.

    Raises:
        ModelError: there is no room, or the folder cannot be written.
    """
    fields = {field.name: getattr(sums, field.name) for field in dataclasses.fields(sums)}
    tensors = {name: value.cpu() for name, value in fields.items() if isinstance(value, Tensor)}
    numbers = {name: value for name, value in fields.items() if isinstance(value, int | float)}
    save_whole(file, tensors, numbers, f"the sums {file.stem}")


def load_sums(kind: type[SumsT], file: Path, device: str) -> SumsT:
    """Read sums of a kind that were written before.

    Raises:
        ModelError: the file is damaged.
    """
    try:
        with safe_open(file, framework="pt", device=device) as stored:
            numbers = {name: json.loads(text) for name, text in stored.metadata().items()}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (no iterator)
        return kind(**tensors, **numbers)
    except (OSError, SafetensorError, AttributeError, ValueError, TypeError, RecursionError) as error:
        raise _damaged(file, error) from error
