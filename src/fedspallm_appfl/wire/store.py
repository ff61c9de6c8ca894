"""Packed blocks on disk, one safetensors file per block: finished blocks do not have to stay in memory.

A file gets its name only when it is complete, so a killed run leaves no partial file.
"""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fedspallm_appfl.errors import ModelError
from fedspallm_appfl.wire.packed import Packed

PARTS = ("mask", "values")


class PackedStore:
    """A folder of packed blocks.

    Attributes:
        folder: where the files are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def blocks(self) -> list[int]:
        """Indices of the blocks that are stored."""
        return sorted(int(file.stem.removeprefix("block-")) for file in self.folder.glob("block-*.safetensors"))

    def save(self, block: int, linears: dict[str, Packed]) -> None:
        """Store one block, and replace an earlier version.

        Raises:
            ModelError: the disk is full, or the folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{name}/{part}": p[part] for name, p in linears.items() for part in PARTS if part in p}
        shapes = {name: linears[name]["shape"] for name in sorted(linears)}
        partial = self._file(block).with_suffix(".partial")
        try:
            save_file(tensors, partial, metadata={"shapes": json.dumps(shapes)})
            partial.replace(self._file(block))
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"block {block} cannot be stored in {self.folder}: {error}; free disk space there"
            ) from error

    def add(self, block: int, linears: dict[str, Packed]) -> None:
        """Add some matrices of a block to those already stored."""
        self.save(block, {**(self.load(block) or {}), **linears})

    def load(self, block: int, only: str | None = None) -> dict[str, Packed] | None:
        """One block with its matrices sorted by name, or only one matrix; None if it is not stored."""
        if not self._file(block).is_file():
            return None
        with safe_open(self._file(block), framework="pt") as file:
            shapes = json.loads(file.metadata()["shapes"])
            stored = set(file.keys())
            return {
                name: {"shape": shape}
                | {part: file.get_tensor(f"{name}/{part}") for part in PARTS if f"{name}/{part}" in stored}
                for name, shape in shapes.items()
                if only in (None, name)
            }

    def _file(self, block: int) -> Path:
        return self.folder / f"block-{block:04d}.safetensors"
