"""A client's side of a round: prune the assigned blocks on private text, message by message.

The sweep over the blocks is a generator that stands still between messages, so that a message leaves as soon as its
blocks are pruned and only they are in memory. Clients in one process share one dense model, since no block is loaded
while a sweep stands still.
"""

import json
import time
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from fedspallm_appfl.algorithms.gram import GramSettings
from fedspallm_appfl.algorithms.registry import exchanges
from fedspallm_appfl.models.lazy_model import LazyModel
from fedspallm_appfl.models.text import check_vocabulary, cut_windows, draw_windows, load_tokenizer, read_text
from fedspallm_appfl.pruning.pruner import Settings
from fedspallm_appfl.rounds.gathering import shared_inputs
from fedspallm_appfl.rounds.uploads import Source, Sweep, sizes, sweep
from fedspallm_appfl.wire.agreed_blocks import AgreedBlocks
from fedspallm_appfl.wire.messages import Unit, plan
from fedspallm_appfl.wire.packed import Packed, compress, make_update


@dataclass(frozen=True)
class ClientSettings:
    """What one client needs to know.

    Attributes:
        client_id: its id.
        model: folder or hub name of the dense model.
        dtype: arithmetic of forward passes.
        blocks: dotted name of the list of decoder blocks, or None.
        device: where it runs.
        threads: CPU threads, or None for torch's own choice.
        seed: the experiment's seed.
        text: private text: a file, a folder or a list of these; None if the pruner needs no data.
        windows: calibration windows.
        length: tokens in a window.
        batch: windows in a forward pass.
        pruning: how to prune a matrix.
        blocks_per_message: blocks in a message.
        max_message_bytes: bytes in a message.
        algorithm: one of `ALGORITHMS`.
        gram: which statistics to send, where the algorithm is `gram`.
        pool: (client, text, windows) of the clients whose text this one has, for comparison; empty for its own `text`.
        compression: whether to compress messages.
        activations: where hidden states between two blocks are kept, `memory` or `file`.
        agreed: a folder for pruned blocks that come down, shared by the clients of a process; None for one of its own.
        model_hash: tells models apart that lay in the same folder one after the other; for processes that outlive a run.
    """

    client_id: str
    model: str
    dtype: str
    blocks: str | None
    device: str
    threads: int | None
    seed: int
    text: Any
    windows: int
    length: int
    batch: int
    pruning: Settings
    blocks_per_message: int
    max_message_bytes: int
    algorithm: str = "fedspallm"
    gram: GramSettings = GramSettings()
    pool: tuple[tuple[str, Any, int], ...] = ()
    compression: bool = False
    activations: str = "memory"
    agreed: Path | None = None
    model_hash: str = ""


@dataclass
class Message:
    """One message of an upload.

    Attributes:
        update: the packed matrices, `{}` if the client has none for this message.
        exchange: which exchange of the round, from 0.
        number: which message of the exchange, from 0.
        total: messages of the exchange.
        seconds: time spent on it.
        notes: JSON of linear -> what the report should say; empty if nothing.
    """

    update: dict[str, Any]
    exchange: int
    number: int
    total: int
    seconds: float
    notes: str


@dataclass
class _Progress:
    """Where a client stands in an exchange."""

    round_index: int
    exchange: int
    assigned: set[int]
    sweep: Sweep
    messages: list[list[Unit]]
    next_message: int = 0
    waiting: dict[Unit, tuple[Packed, dict[str, float]]] = field(default_factory=dict)


class LocalClient:
    """One client: its model, its text, its place in the round.

    Attributes:
        settings: what it was told.
        agreed: pruned blocks that the server has sent.
        masks: masks that the server has sent, of blocks whose values are still to come.
        exchanges: what travels in a round.
        samples: calibration windows, its sample size.
    """

    def __init__(self, settings: ClientSettings) -> None:
        """Open the model and cut the private text.

        Raises:
            ModelError: the model cannot be read.
            DataError: the text cannot be read or is too short.
        """
        self.settings = settings
        self._use_threads()
        self.model = _dense_model(settings.model, settings.blocks, settings.dtype, settings.device, settings.model_hash)
        windows = self._private_windows()
        self.samples = len(windows)
        dtype, shared = self.model.skeleton.stored_dtype, settings.agreed
        self.agreed = AgreedBlocks(dtype, shared)
        self.masks = AgreedBlocks(dtype, shared and shared / "masks")
        groups = shared_inputs(self.model) if settings.algorithm == "gram" else ()
        self.exchanges = exchanges(settings.algorithm, groups, settings.gram.propagate)
        options = {"batch": settings.batch, "activations": settings.activations}
        self._source = Source(
            settings.client_id,
            self.model,
            windows,
            settings.pruning,
            settings.gram,
            groups,
            self.agreed,
            self.masks,
            options,
            settings.seed,
        )
        self._sweep: Sweep | None = None  # that goes on over several exchanges
        self._progress: _Progress | None = None

    def messages(self, exchange: int) -> list[list[Unit]]:
        """The messages of an exchange, each as its (block, unit) pairs; the same for all clients.

        With values whatever the pruner, as all clients must send equally many messages.
        """
        layout, source = self.model.layout, self._source
        shapes = {block: layout.shapes(block) for block in range(len(layout.blocks))}
        bytes_of = sizes(
            self.exchanges[exchange],
            shapes,
            source.pruning.target,
            self.model.skeleton.stored_dtype,
            source.groups,
            source.gram,
        )
        return plan(bytes_of, self.settings.blocks_per_message, self.settings.max_message_bytes)

    def start_exchange(self, round_index: int, number: int, blocks: list[int]) -> None:
        """Begin to make what an exchange of a round sends of the assigned blocks."""
        exchange, assigned = self.exchanges[number], set(blocks)
        if exchange.only is None or number == 0 or self._sweep is None:
            self._sweep = sweep(self._source, exchange, assigned)
        self._progress = _Progress(round_index, number, assigned, self._sweep, self.messages(number))

    def sweeps_on(self, exchange: int) -> bool:
        """Whether the sweep of an exchange goes on in the next one."""
        return self.exchanges[exchange].only is not None and exchange + 1 < len(self.exchanges)

    @property
    def in_exchange(self) -> bool:
        """Whether messages of an exchange are still to be made."""
        return self._progress is not None

    def next_message(self) -> Message:
        """Make what the next message holds.

        Raises:
            PruningError: a matrix cannot be pruned; names client, block and linear.
            DataError: the calibration text is too short for what is to be sent.
        """
        if self._progress is None:
            raise RuntimeError(
                f"client {self.settings.client_id}: no exchange was started, or its messages are all made"
            )
        self._use_threads()
        started, progress = time.monotonic(), self._progress
        number = progress.next_message
        mine = [unit for unit in progress.messages[number] if unit[0] in progress.assigned]
        blocks: dict[int, dict[str, Packed]] = {}
        notes: dict[str, dict[str, float]] = {}
        for block, name in mine:
            while (block, name) not in progress.waiting:
                done, units = next(progress.sweep)
                progress.waiting.update({(done, unit): made for unit, made in units.items()})
                del units  # not kept while the next block is made
            packed, said = progress.waiting.pop((block, name))
            blocks.setdefault(block, {})[name] = packed
            if said:
                notes[f"{block}.{name}"] = said
        progress.next_message += 1
        if progress.next_message == len(progress.messages):
            self._progress = None
            if self.exchanges[progress.exchange].only is None:
                self._sweep = None
        update = make_update(progress.round_index, blocks, progress.exchange) if blocks else {}
        if update and self.settings.compression:
            update = compress(update)
        seconds = time.monotonic() - started
        total, said_all = len(progress.messages), json.dumps(notes) if notes else ""
        return Message(update, progress.exchange, number, total, seconds, said_all)

    def take(self, update: dict[str, Any]) -> None:
        """Use what the server sent in later exchanges: pruned blocks, or masks to solve for."""
        if update:
            down = self.exchanges[update["exchange"]].down
            (self.masks if down == "masks" else self.agreed).take(update)

    def _use_threads(self) -> None:
        if self.settings.threads is not None:
            torch.set_num_threads(self.settings.threads)

    def _private_windows(self) -> torch.Tensor:
        settings = self.settings
        if settings.text is None and not settings.pool and settings.pruning.pruner == "magnitude":
            # The blocks are still run, to keep one path through the sweep: one short window of token 0 will do.
            return torch.zeros(1, 2, dtype=torch.int64)
        own = ((settings.client_id, settings.text, settings.windows),)
        return torch.cat([self._drawn(*of) for of in settings.pool or own])

    def _drawn(self, client: str, text: Any, count: int) -> torch.Tensor:
        tokenizer = _tokenizer(self.model.skeleton.folder, self.settings.model_hash)
        windows = cut_windows(tokenizer, read_text(text), self.settings.length)
        check_vocabulary(windows, self.model.skeleton.vocabulary, f"client {client}")
        return draw_windows(windows, count, self.settings.seed, client)


@lru_cache(maxsize=4)
def _dense_model(path: str, blocks: str | None, dtype: str, device: str, model_hash: str) -> LazyModel:
    return LazyModel(path, blocks, dtype, device)


@lru_cache(maxsize=4)
def _tokenizer(folder: Path, model_hash: str) -> Any:
    return load_tokenizer(folder)
