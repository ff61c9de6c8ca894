"""The pruned blocks from the server, on disk: in later rounds a client runs one of them at a time.

Clients of one process may share a folder, because all receive the same: each piece is then stored once.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fedspallm_appfl.wire.packed import Packed, decompress
from fedspallm_appfl.wire.store import PackedStore


class AgreedBlocks:
    """The blocks agreed on so far."""

    def __init__(self, dtype: torch.dtype, folder: Path | None = None) -> None:
        """Start without blocks.

        Args:
            dtype: dtype of the values.
            folder: a folder for one run, which its clients in this process share; None makes a temporary one that is
                removed with this object.
        """
        self._dtype = dtype
        self._own = tempfile.TemporaryDirectory(prefix="fedspallm-") if folder is None else None
        self._folder = folder or Path(self._own.name if self._own else "")
        self._store = PackedStore(self._folder)

    def take(self, update: Mapping[str, Any]) -> None:
        """Store a piece of the server's update over earlier data, unless another client already did."""
        mark = self._folder / f"round-{update['round']}-{update['exchange']}-piece-{update['piece']}"
        if mark.exists():
            return
        for block, linears in decompress(update, self._dtype)["blocks"].items():
            self._store.add(int(block), linears)
        mark.touch()

    def get(self, block: int) -> dict[str, Packed] | None:
        """The matrices of a block, or None if it is still dense."""
        return self._store.load(block)

    def blocks(self) -> list[int]:
        """Indices of the blocks that are no longer dense."""
        return self._store.blocks()
