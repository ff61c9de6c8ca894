"""Stored Gram matrices: one safetensors file for each input, for pruning further models.

Legend: I in features.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fedspallm_appfl.algorithms.gram import Sums
from fedspallm_appfl.errors import ModelError
from fedspallm_appfl.tensors import triangle


class GramStore:
    """A folder of sums, by block and by the first linear that takes the input.

    Attributes:
        folder: where the files are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, block: int, linears: tuple[str, ...], sums: Sums, rounded: bool) -> None:
        """Store the sums of one input, and replace earlier ones.

        Args:
            block: the block.
            linears: all linears that take the input.
            sums: without drift, which belongs to a single pruned model.
            rounded: whether clients rounded their uploads, which can make the sum indefinite.

        Raises:
            ModelError: the disk is full, or the folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self._file(block, linears[0])
        tensors = {"diagonal": sums.upper.diagonal().clone().cpu(), "upper": triangle.flatten(sums.upper).cpu()}
        facts = {"linears": json.dumps(linears), "tokens": str(sums.tokens), "rounded": json.dumps(rounded)}
        try:
            save_file(tensors, file.with_suffix(".partial"), metadata=facts)
            file.with_suffix(".partial").replace(file)
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"the sums of block {block}, {linears[0]} cannot be stored in {self.folder}: {error}; free disk space there"
            ) from error

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
            linears = tuple(json.loads(facts["linears"]))
            sums = Sums(triangle.unflatten(flat, diagonal), int(facts["tokens"]))
            return linears, sums, bool(json.loads(facts["rounded"]))
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise ModelError(f"{self._file(block, linear)} is damaged: {error}; run the experiment again") from error

    def add(self, block: int, linears: tuple[str, ...], sums: Sums, rounded: bool) -> Sums:
        """Add sums to the stored ones of the same input; stores and returns the result."""
        found = self.load(block, linears[0])
        if found is not None:
            earlier = found[1]
            total = sums.upper.add_(earlier.upper.to(sums.upper.device))
            sums, rounded = replace(sums, upper=total, tokens=sums.tokens + earlier.tokens), rounded or found[2]
        self.save(block, linears, sums, rounded)
        return sums

    def units(self) -> list[tuple[int, str]]:
        """(block, first linear) of all inputs that are stored, in order."""
        names = (file.stem.partition("-") for file in self.folder.glob("[0-9][0-9][0-9][0-9]-*.safetensors"))
        return sorted((int(block), linear) for block, _, linear in names)

    def _file(self, block: int, linear: str) -> Path:
        return self.folder / f"{block:04d}-{linear}.safetensors"
