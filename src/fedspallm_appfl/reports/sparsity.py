"""The zeros of any model folder, by matrix and pattern, counted in the checkpoint itself."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.text import Text

from fedspallm_appfl.models import experts
from fedspallm_appfl.models.lazy_model import Skeleton
from fedspallm_appfl.models.storage.checkpoint import allow_code_of, resolve_model
from fedspallm_appfl.reports.result import Shown
from fedspallm_appfl.reports.terminal import ConsoleTable
from fedspallm_appfl.settings.schema import Model
from fedspallm_appfl.tensors.counting import PATTERNS, Zeros, count_zeros


@dataclass(frozen=True)
class MatrixZeros:
    """The zeros of one prunable matrix.

    Attributes:
        block: index of its decoder block.
        name: dotted name inside the block.
        stored: where it lies in the checkpoint.
        shape: (O, I).
        found: what was counted.
    """

    block: int
    name: str
    stored: str
    shape: tuple[int, int]
    found: Zeros

    @property
    def kind(self) -> str:
        """Its name without the number of an expert."""
        expert = re.search(experts.LISTED, self.name)
        return self.name if expert is None else f"{self.name[: expert.start(1)]}*{self.name[expert.end(1) :]}"

    def to_dict(self) -> dict[str, Any]:
        """Its entry in JSON."""
        return {"block": self.block, "name": self.name, "stored": self.stored, "shape": self.shape, **_sums([self])}


@dataclass(frozen=True, repr=False)
class Check(Shown):
    """The zeros of a model.

    Attributes:
        model: the folder, as it was named.
        matrices: all prunable matrices, block by block.
        block_weights: all weights in the decoder blocks, prunable or not.
    """

    model: str
    matrices: Sequence[MatrixZeros]
    block_weights: int

    @property
    def zeros(self) -> int:
        """Zeros among the prunable weights."""
        return sum(one.found.zeros for one in self.matrices)

    @property
    def entries(self) -> int:
        """Prunable weights."""
        return sum(one.found.entries for one in self.matrices)

    @property
    def sparsity(self) -> float:
        """Share of the prunable weights that is zero."""
        return self.zeros / self.entries

    def kinds(self) -> dict[str, list[MatrixZeros]]:
        """The matrices of each name, those of all experts together."""
        found: dict[str, list[MatrixZeros]] = {}
        for one in self.matrices:
            found.setdefault(one.kind, []).append(one)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "model": self.model,
            **_sums(self.matrices),
            "block_weights": self.block_weights,
            "kinds": {kind: {"matrices": len(alike), **_sums(alike)} for kind, alike in self.kinds().items()},
            "matrices": [one.to_dict() for one in self.matrices],
        }

    def __rich__(self) -> RenderableType:
        """A row for each kind of matrix."""
        table = self._table("matrix", "count", "weights", "zeros %", "least %", "most %", "patterns")
        rows = self.kinds() if len(self.kinds()) == 1 else {**self.kinds(), "all": self.matrices}
        for kind, alike in rows.items():
            shares = [one.found.share for one in alike]
            share = sum(one.found.zeros for one in alike) / sum(one.found.entries for one in alike)
            row = (f"{len(alike):,}", f"{sum(one.found.entries for one in alike):,}")
            table.add_row(
                escape(kind), *row, *(f"{100 * one:.4f}" for one in (share, min(shares), max(shares))), _patterns(alike)
            )
        return Group(table, self._line())

    def each(self) -> RenderableType:
        """A row for each matrix."""
        table = self._table("block", "matrix", "shape", "zeros", "share", "patterns")
        for one in self.matrices:
            shape, zeros = f"{one.shape[0]} x {one.shape[1]}", f"{one.found.zeros:,}"
            table.add_row(str(one.block), escape(one.name), shape, zeros, _percent(one.found.share), _patterns([one]))
        return Group(table, self._line())

    def _table(self, *columns: str) -> ConsoleTable:
        table = ConsoleTable(title=f"Zeros of {escape(self.model)}", title_justify="left")
        for column in columns:
            table.add_column(column, justify="left" if column in ("matrix", "patterns") else "right")
        return table

    def _line(self) -> Text:
        return Text(
            f"{self.zeros:,} of {self.entries:,} prunable weights are zero ({_percent(self.sparsity)}); the blocks hold "
            f"{self.block_weights:,} weights"
        )


def check(model: str | Path, blocks: str | None = None, trust_remote_code: bool = False) -> Check:
    """Count the zeros of a model folder; one matrix at a time is in memory.

    Args:
        model: folder or hub name.
        blocks: dotted name of the list of decoder blocks; None to search for it.
        trust_remote_code: run Python code that the folder brings along.

    Raises:
        ModelError: it is no model, its weights are not there or quantized, or its blocks cannot be found.
    """
    allow_code_of(Model(path=str(model), trust_remote_code=trust_remote_code))
    skeleton = Skeleton(str(resolve_model(str(model), key="MODEL")), blocks)
    matrices = []
    for block, linears in enumerate(skeleton.layout.blocks):
        for one in linears:
            found = count_zeros(skeleton.dense_weight(block, one))
            matrices.append(MatrixZeros(block, one.name, skeleton.place(block, one).name, one.shape, found))
        skeleton.files.release()
    return Check(str(model), matrices, skeleton.block_weights)


def _sums(matrices: Sequence[MatrixZeros]) -> dict[str, Any]:
    zeros, entries = sum(one.found.zeros for one in matrices), sum(one.found.entries for one in matrices)
    following = [str(one) for one in PATTERNS if all(one in each.found.patterns for each in matrices)]
    return {"entries": entries, "zeros": zeros, "sparsity": zeros / entries, "patterns": following}


def _percent(share: float) -> str:
    return f"{100 * share:.4f} %"


def _patterns(matrices: Sequence[MatrixZeros]) -> str:
    """Which patterns all of them follow, or how many do."""
    words = []
    for pattern in PATTERNS:
        following = sum(pattern in one.found.patterns for one in matrices)
        if following:
            words.append(str(pattern) if following == len(matrices) else f"{pattern} in {following:,}")
    return ", ".join(words)
