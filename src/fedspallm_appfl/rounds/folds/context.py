"""What folds share, and what a fold is.

A unit is what clients send under one name: a matrix, or the statistics of an input that several matrices take. A fold is
one exchange's. Which fold it is follows from what goes up; what is made of complete sums says the exchange.

Legend: O out features, I in features.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedspallm_appfl.aggregation.screening import Seen
from fedspallm_appfl.algorithms.algorithm import SQUARES, Groups, Matrix
from fedspallm_appfl.models.layout import Layout
from fedspallm_appfl.rounds.journal import Journal
from fedspallm_appfl.settings.schema import ServerSettings
from fedspallm_appfl.tensors.target import Target
from fedspallm_appfl.wire.packed import Packed, packed_sizes
from fedspallm_appfl.wire.update import Check

GLOBAL, MASKS, STATISTICS = "global", "masks", "statistics"  # folders of the server's state
DOWN = {
    None: GLOBAL,
    "weights": GLOBAL,
    "masks": MASKS,
    SQUARES: SQUARES,
}  # what goes down -> the store that it comes from
Stores = dict[str, dict[str, Packed]]  # store -> linear -> what was made of it


@dataclass(frozen=True)
class Context:
    """What folds share.

    Attributes:
        layout: blocks and linears of the model.
        dtype: dtype of the checkpoint.
        settings: how to combine uploads.
        folder: a folder of its own.
        device: where sums are kept and combined.
        dense: (block, linear) -> its dense weight (O, I) in `dtype`.
        groups: linears that share an input, for algorithms that gather statistics.
        typical: (block, linear) -> mean square of its inputs on random tokens, None where nobody knows; for the same.
    """

    layout: Layout
    dtype: torch.dtype
    settings: ServerSettings
    folder: Path
    device: str
    dense: Callable[[int, str], Tensor]
    groups: Groups = ()
    typical: Callable[[int, str], float | None] = lambda block, name: None

    def making(self, block: int) -> Path:
        """The folder for what an exchange makes of a block; what earlier ones made is in `folder`."""
        return Journal(self.folder).making(block)

    def dense_float(self, block: int, name: str) -> Tensor:
        """A dense weight, (O, I) float32, where sums are."""
        return self.dense(block, name).to(self.device).float()

    def matrix(self, block: int, name: str) -> Matrix:
        """What the arithmetic of an exchange may ask of a matrix."""
        return Matrix(self.target(block, name), self.settings.expansion, partial(self.dense_float, block, name))

    def target(self, block: int, name: str) -> Target:
        """The sparsity of a matrix."""
        return self.settings.sparsity.of(block, name)

    def shape(self, block: int, name: str) -> tuple[int, int]:
        """(O, I) of a linear."""
        return self.layout.linear(block, name).shape

    def packed_bytes(self, block: int, names: Iterable[str]) -> int:
        """Bytes of pruned matrices with their values once packed."""
        shapes = {name: self.shape(block, name) for name in names}
        return sum(packed_sizes(shapes, self.settings.sparsity, self.dtype, block=block).values())

    @property
    def cumulative(self) -> bool:
        """Whether sums of earlier rounds are added."""
        return self.settings.fold == "cumulative"


@dataclass(frozen=True)
class UnitBytes:
    """Memory that the server takes for one unit.

    Attributes:
        sums: bytes of its sums.
        closing: bytes at most, beside them, when it is closed.
        made: bytes of what is made of it, packed.
    """

    sums: int
    closing: int
    made: int


class Fold(ABC):
    """The server's side of one exchange. What folds do not say themselves of `guard`, `keep` and `leave_out` is nothing."""

    @abstractmethod
    def bytes_of(self, block: int, unit: str, clients: int) -> UnitBytes:
        """What a unit takes that so many clients send."""

    @abstractmethod
    def units(self, block: int) -> tuple[str, ...]:
        """What clients send of a block."""

    @abstractmethod
    def check(self, client: str, block: int, unit: str) -> Check:
        """How an upload of a unit is checked."""

    @abstractmethod
    def open(self, block: int, unit: str, clients: int) -> Any:
        """Empty sums of a unit that so many clients will send."""

    def guard(self, sums: Any, packed: Any, weight: int) -> None:  # noqa: B027
        """Refuse, with a ValueError, what would leave the range of the sums; they are None before the first upload."""

    @abstractmethod
    def look(self, client: str, block: int, unit: str, packed: Any) -> Seen:
        """What screening sees of a checked upload (see `aggregation.screening`)."""

    def keep(self, client: str, block: int, unit: str, packed: Any) -> None:  # noqa: B027
        """Store a checked upload as it came, where clients have models of their own."""

    @abstractmethod
    def add(self, sums: Any, client: str, block: int, unit: str, packed: Any, weight: int) -> None:
        """Fold a checked upload."""

    @abstractmethod
    def close(self, block: int, unit: str, sums: Any) -> tuple[Stores, dict[str, int]]:
        """What is made of complete sums: matrices for each store, and facts for the report. The sums are used up."""

    def leave_out(self, client: str, block: int, unit: str) -> None:  # noqa: B027
        """Go on without a client that sent nothing of an expert."""

    @abstractmethod
    def unreached(self, block: int, unit: str) -> Stores:
        """What is made of an expert of which no client sent anything."""
