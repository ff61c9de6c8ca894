"""The server's side of a round: fold uploads as they come, and make each matrix of the global model when it is complete.

A matrix is open from the first upload for it to the last. While it is open its sums and votes are in memory; then its l0
mean is masked to the target (`l0_aggregation`, `mask_expansion`), packed and stored on disk, and the sums are dropped. So
the server holds the sums of the open blocks, their finished matrices packed, and one message, whatever the number of
clients and rounds, and never the model.

Aggregated weights are rounded to the dtype of the checkpoint, which is also what clients send and receive.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedspallm_appfl.blocks import Layout
from fedspallm_appfl.errors import UpdateError
from fedspallm_appfl.heap import give_back
from fedspallm_appfl.l0_aggregation import L0Sums, l0_mean, largest_magnitude, plain_mean
from fedspallm_appfl.mask_expansion import expand, unexpanded_zeros
from fedspallm_appfl.messages import Unit, plan
from fedspallm_appfl.packed_store import PackedStore
from fedspallm_appfl.payload import (
    Blocks,
    Packed,
    check_update,
    compress,
    make_update,
    matrices,
    nbytes,
    pack,
    update_nbytes,
    with_values,
)
from fedspallm_appfl.sparsity import Target, select

FOLDS = ("latest", "cumulative")
WEIGHTS = ("equal", "sample_size")
COMPARISONS = ("standalone", "fedavg")


@dataclass(frozen=True)
class Aggregation:
    """How the server combines uploads.

    Attributes:
        target: sparsity of every matrix.
        weights: `equal`, or `sample_size` (calibration windows of each client).
        fold: with `latest` a new round's aggregate of a block replaces the earlier one, `cumulative` adds sums and votes.
        expansion: `matrix` or `row`, the group in which entries compete in mask expansion.
        comparisons: which of `standalone` and `fedavg` to make beside the global model.
        mask_only: clients whose pruner leaves kept weights as they are; they send masks without values.
        compression: whether to compress what goes down.
    """

    target: Target
    weights: str = "equal"
    fold: str = "latest"
    expansion: str = "matrix"
    comparisons: tuple[str, ...] = ()
    mask_only: frozenset[str] = frozenset()
    compression: bool = False


@dataclass
class _Open:
    """A matrix that some clients have sent and others still owe."""

    sums: L0Sums
    missing: set[str]


@dataclass
class Round:
    """Who prunes what in the round that is on.

    Attributes:
        index: the round, from 0.
        assigned: client -> blocks.
        changed: blocks that were completed in it.
        given_up: clients of whom nothing more is expected.
    """

    index: int
    assigned: Mapping[str, list[int]]
    changed: set[int] = field(default_factory=set)
    given_up: set[str] = field(default_factory=set)

    def clients_of(self, block: int) -> set[str]:
        """Clients that prune a block, or have before they were given up."""
        return {client for client, blocks in self.assigned.items() if block in blocks}


@dataclass(frozen=True)
class Piece:
    """A part of a round's update that travels in one message.

    Attributes:
        round_index: the round that made it.
        number: which piece of the update, from 0.
        total: pieces of the update.
        units: its (block, linear) pairs.
        nbytes: bytes of its tensors.
    """

    round_index: int
    number: int
    total: int
    units: list[Unit]
    nbytes: int


class GlobalModel:
    """Sums and votes of open matrices, and the packed matrices that are done.

    Attributes:
        done: the global model's pruned blocks.
        round: the round that is on.
    """

    def __init__(
        self,
        layout: Layout,
        dtype: torch.dtype,
        settings: Aggregation,
        folder: Path,
        device: str = "cpu",
        on_event: Callable[[dict[str, Any]], None] = lambda event: None,
        dense: Callable[[int, str], Tensor] | None = None,
    ) -> None:
        """Start with nothing pruned.

        Args:
            layout: blocks and linears of the model.
            dtype: dtype of the checkpoint.
            settings: how to combine uploads.
            folder: a folder of its own for packed blocks and, with `cumulative`, sums.
            device: where sums are kept and combined.
            on_event: called with a dict for each block that is done.
            dense: (block, linear) -> its dense weight (O, I) in `dtype`; needed where clients send masks without values.
        """
        if settings.mask_only and dense is None:
            raise ValueError(f"clients {sorted(settings.mask_only)} send masks alone: `dense` must give the weights")
        self.layout = layout
        self.dtype = dtype
        self.settings = settings
        self.folder = folder
        self.device = device
        self.on_event = on_event
        self.dense = dense
        self.done = PackedStore(folder / "global")
        self.round = Round(-1, {})
        self._open: dict[tuple[int, str], _Open] = {}
        self._ready: dict[int, dict[str, dict[str, Packed]]] = {}
        self._received: set[tuple[str, int, str]] = set()
        self._facts: dict[int, dict[str, Any]] = {}
        self._no_sums = L0Sums.empty((0, 0), settings.weights == "sample_size")

    def begin_round(self, index: int, assigned: Mapping[str, list[int]]) -> None:
        """Expect from each client its assigned blocks.

        Raises:
            RuntimeError: blocks of the round before are still open.
        """
        if self.open_blocks():
            raise RuntimeError(
                f"round {self.round.index} cannot end: blocks {sorted(self.open_blocks())} are not complete"
            )
        self.round = Round(index, assigned)
        self._received.clear()

    def receive(self, client: str, update: Any, samples: int) -> int:
        """Check and fold one upload.

        Args:
            client: who sent it.
            update: what arrived; `{}` for a message without matrices.
            samples: calibration windows of the client.

        Returns:
            Bytes of the tensors received.

        Raises:
            UpdateError: the upload is not what was assigned, and nothing of it was folded; or, with `cumulative`, the
                sums of all rounds leave their range.
        """
        if client not in self.round.assigned:
            raise UpdateError(f"refused an update from {client}: it is not in the roster {sorted(self.round.assigned)}")
        if client in self.round.given_up:
            raise UpdateError(f"refused an update from client {client}: round {self.round.index} goes on without it")
        if isinstance(update, Mapping) and not update:
            return 0
        checked = self._checked(client, update)
        for block, name, _ in matrices(checked):
            if (client, block, name) in self._received:
                raise UpdateError(f"refused an update from client {client}: block {block}, {name} was sent before")
        weight = self._client_weight(client, samples)
        for block, name, packed in matrices(checked):
            self._check_range(client, block, name, packed, weight)
        if "standalone" in self.settings.comparisons:
            for block, linears in checked["blocks"].items():
                self.comparison(f"standalone/{client}").add(int(block), linears)
        for block, name, packed in matrices(checked):
            self._received.add((client, block, name))
            self._fold(client, block, name, packed, weight)
        return update_nbytes(update)

    def give_up(self, client: str) -> None:
        """Expect nothing more from a client in this round; what it has sent counts, matrix by matrix.

        Matrices that lacked only its part are finished. A block of which some matrices can no longer come stays as it was.
        """
        self.round.given_up.add(client)
        sent = {block for sender, block, _ in self._received if sender == client}
        assigned = {**self.round.assigned, client: [b for b in self.round.assigned.get(client, []) if b in sent]}
        self.round = replace(self.round, assigned=assigned)
        for (block, name), matrix in list(self._open.items()):
            matrix.missing.discard(client)
            if not matrix.missing:
                del matrix
                self._close(block, name)
        for block in [block for block in self._ready if not self._can_be_finished(block)]:
            del self._ready[block], self._facts[block]

    def _can_be_finished(self, block: int) -> bool:
        return any(self.owes(client, block) for client in self.round.assigned)

    def _checked(self, client: str, update: Any) -> dict[str, Any]:
        """The update as it was before compression, with values in it whoever sent it."""
        assigned = set(self.round.assigned[client])
        shapes = {block: self.layout.shapes(block) for block in assigned}
        target, mask_only = self.settings.target, client in self.settings.mask_only
        checked = check_update(
            update, f"client {client}", self.round.index, assigned, shapes, self.dtype, target, mask_only
        )
        if mask_only and self.dense:
            for block, linears in checked["blocks"].items():
                for name, packed in linears.items():
                    linears[name] = with_values(packed, self.dense(int(block), name))
        return checked

    def open_blocks(self) -> set[int]:
        """Blocks of which some client sent a matrix and something is still missing."""
        return {block for block, _ in self._open} | set(self._ready)

    def owes(self, client: str, block: int) -> bool:
        """Whether a matrix of a block that was assigned to a client has not come yet."""
        names = {linear.name for linear in self.layout.blocks[block]}
        sent = {name for name in names if (client, block, name) in self._received}
        return client not in self.round.given_up and block in self.round.assigned.get(client, []) and sent != names

    def check_complete(self, client: str) -> None:
        """Refuse to end a round for a client that owes matrices.

        Raises:
            UpdateError: names the first matrix that is missing.
        """
        for block in self.round.assigned[client]:
            for linear in self.layout.blocks[block]:
                if (client, block, linear.name) not in self._received:
                    where = f"block {block}, {linear.name}"
                    raise UpdateError(f"client {client} ended round {self.round.index} without {where}")

    def changes(self, limit: int) -> list[Piece]:
        """What to send down, the blocks that changed in this round, in pieces of at most `limit` bytes.

        Raises:
            ConfigError: one matrix exceeds the limit.
        """
        sizes = {block: {n: nbytes(p) for n, p in self._stored(block).items()} for block in sorted(self.round.changed)}
        parts = plan(sizes, len(sizes), limit)
        pieces = [
            Piece(self.round.index, number, len(parts), units, sum(sizes[block][name] for block, name in units))
            for number, units in enumerate(parts)
        ]
        return [self._compressed(piece) for piece in pieces] if self.settings.compression else pieces

    def _compressed(self, piece: Piece) -> Piece:
        """Compress a piece once and keep it on disk: it goes down to every client."""
        update = compress(self._made(piece))
        self._file_of(piece).parent.mkdir(parents=True, exist_ok=True)
        torch.save(update, self._file_of(piece))
        return replace(piece, nbytes=update_nbytes(update))

    def _file_of(self, piece: Piece) -> Path:
        return self.folder / "down" / f"{piece.number}.pt"

    def load_piece(self, piece: Piece) -> dict[str, Any]:
        """One piece of the update to send down, ready for the wire."""
        if self.settings.compression:
            return torch.load(self._file_of(piece), weights_only=True)
        return self._made(piece)

    def _made(self, piece: Piece) -> dict[str, Any]:
        stored = {block: self._stored(block) for block in {block for block, _ in piece.units}}
        blocks: Blocks = {}
        for block, name in piece.units:
            blocks.setdefault(block, {})[name] = stored[block][name]
        return make_update(piece.round_index, blocks) | {"piece": piece.number, "pieces": piece.total}

    def _stored(self, block: int) -> dict[str, Packed]:
        return self.done.load(block) or {}

    def comparison(self, name: str) -> PackedStore:
        """The packed blocks of a comparison: `fedavg` or `standalone/CLIENT`."""
        return PackedStore(self.folder / name)

    def _client_weight(self, client: str, samples: int) -> int:
        if samples < 1:
            raise UpdateError(
                f"refused an update from client {client}: its sample size is {samples}, at least 1 is needed"
            )
        return samples if self.settings.weights == "sample_size" else 1

    def _matrix(self, block: int, name: str) -> _Open:
        """The sums of a matrix, opened by the first upload for it."""
        if (block, name) not in self._open:
            shape, clients = self.layout.shapes(block)[name], self.round.clients_of(block) - self.round.given_up
            empty = L0Sums.empty(shape, self.settings.weights == "sample_size", len(clients), self.device)
            self._open[block, name] = _Open(empty, clients)
        return self._open[block, name]

    def _check_range(self, client: str, block: int, name: str, packed: Packed, weight: int) -> None:
        largest = largest_magnitude(packed["values"])
        sums = self._open[block, name].sums if (block, name) in self._open else self._no_sums
        try:
            sums.check_range(largest, weight)
        except ValueError as error:
            raise UpdateError(f"refused an update from client {client}, block {block}, {name}: {error}") from error

    def _fold(self, client: str, block: int, name: str, packed: Packed, weight: int) -> None:
        matrix = self._matrix(block, name)
        matrix.sums.add_packed(packed["values"].to(self.device), packed["mask"].to(self.device), weight)
        matrix.missing.discard(client)
        if not matrix.missing:
            del matrix  # its sums are dropped as soon as they have been used
            self._close(block, name)

    def _close(self, block: int, name: str) -> None:
        """Make the global matrix of its sums, and the FedAvg one if it is wanted."""
        give_back()  # what the uploads left behind; the steps to come are the largest
        sums = self._open.pop((block, name)).sums
        if self.settings.fold == "cumulative":
            sums = self._with_earlier_rounds(block, name, sums)
        ready = self._ready.setdefault(block, {"global": {}})
        if "fedavg" in self.settings.comparisons:
            ready.setdefault("fedavg", {})[name] = self._fedavg(sums)
        mean, votes, clients = l0_mean(sums), sums.votes, sums.clients
        del sums  # most of what an open matrix takes
        mask = expand(votes, clients, mean, self.settings.target, self.settings.expansion)
        ready["global"][name] = pack(mean, mask, self.dtype)
        zeros = mask.numel() - int(mask.count_nonzero())
        facts = self._facts.setdefault(block, {"zeros": 0, "zeros_before_expansion": 0, "over_target": 0})
        facts["zeros"] += zeros
        facts["zeros_before_expansion"] += unexpanded_zeros(votes, clients)
        facts["over_target"] += max(0, zeros - self.settings.target.zeros(mask.numel()))
        if len(ready["global"]) == len(self.layout.blocks[block]):
            self._finish_block(block)

    def _fedavg(self, sums: L0Sums) -> Packed:
        average = plain_mean(sums)
        return pack(average, ~select(average.abs(), self.settings.target, per_row=False), self.dtype)

    def _finish_block(self, block: int) -> None:
        for store, linears in self._ready.pop(block).items():
            PackedStore(self.folder / store).save(block, linears)
        self.round.changed.add(block)
        clients = sorted(self.round.clients_of(block))
        self.on_event(
            {"event": "block", "round": self.round.index, "block": block, "clients": clients} | self._facts.pop(block)
        )

    def _with_earlier_rounds(self, block: int, name: str, sums: L0Sums) -> L0Sums:
        file = self.folder / "sums" / f"{block:04d}-{name}.safetensors"
        if file.is_file():
            try:
                sums.merge(_load_sums(file, self.device))
            except ValueError as error:
                raise UpdateError(f"block {block}, {name}: the sums of all rounds: {error}") from error
        file.parent.mkdir(parents=True, exist_ok=True)
        _save_sums(sums, file)
        return sums


def _save_sums(sums: L0Sums, file: Path) -> None:
    tensors = {"total": sums.total, "votes": sums.votes} | ({} if sums.kept is None else {"kept": sums.kept})
    numbers = {"clients": str(sums.clients), "weight": str(sums.weight), "bound": repr(sums.bound)}
    partial = file.with_suffix(".partial")
    save_file({name: tensor.cpu() for name, tensor in tensors.items()}, partial, metadata=numbers)
    partial.replace(file)


def _load_sums(file: Path, device: str) -> L0Sums:
    with safe_open(file, framework="pt", device=device) as stored:
        numbers = stored.metadata()
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (no iterator)
    return L0Sums(
        tensors["total"],
        tensors["votes"],
        tensors.get("kept"),
        int(numbers["clients"]),
        int(numbers["weight"]),
        float(numbers["bound"]),
    )
