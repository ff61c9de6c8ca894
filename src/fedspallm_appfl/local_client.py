"""A client's side of a round: prune the assigned blocks on private text, message by message.

The sweep over the blocks is a generator that stands still between messages, so that a message leaves as soon as its
blocks are pruned and only they are in memory. Clients in one process share one dense model, since no block is loaded
while a sweep stands still.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from fedspallm_appfl.agreed_blocks import AgreedBlocks
from fedspallm_appfl.blockwise import PrunedLinear, prune_blocks
from fedspallm_appfl.calibration import check_vocabulary, cut_windows, draw_windows, load_tokenizer, read_text
from fedspallm_appfl.lazy_model import LazyModel
from fedspallm_appfl.messages import plan
from fedspallm_appfl.payload import Packed, compress, make_update, pack, pack_mask, packed_sizes
from fedspallm_appfl.pruning import Settings


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
    compression: bool = False
    activations: str = "memory"
    agreed: Path | None = None
    model_hash: str = ""


@dataclass
class Message:
    """One message of an upload.

    Attributes:
        update: the packed matrices, `{}` if the client has none for this message.
        number: which message of the round, from 0.
        total: messages of the round.
        seconds: time spent on it.
        notes: JSON of linear -> what the report should say; empty if nothing.
    """

    update: dict[str, Any]
    number: int
    total: int
    seconds: float
    notes: str


@dataclass
class _Progress:
    """Where a client stands in a round."""

    round_index: int
    assigned: set[int]
    sweep: Iterator[tuple[int, dict[str, PrunedLinear]]]
    next_message: int = 0
    waiting: dict[tuple[int, str], PrunedLinear] = field(default_factory=dict)


class LocalClient:
    """One client: its model, its text, its place in the round.

    Attributes:
        settings: what it was told.
        agreed: pruned blocks that the server has sent.
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
        self._windows = self._private_windows()
        self.samples = len(self._windows)
        self.agreed = AgreedBlocks(self.model.skeleton.stored_dtype, settings.agreed)
        self._progress: _Progress | None = None
        target, dtype = settings.pruning.target, self.model.skeleton.stored_dtype
        # With values whatever the pruner, as all clients must send equally many messages.
        sizes = {
            b: packed_sizes(self.model.layout.shapes(b), target, dtype) for b in range(len(self.model.layout.blocks))
        }
        self.messages = plan(sizes, settings.blocks_per_message, settings.max_message_bytes)

    def start_round(self, round_index: int, blocks: list[int]) -> None:
        """Begin to prune the blocks assigned in a round."""
        sweep = prune_blocks(
            self.model,
            self._windows,
            set(blocks),
            self.settings.pruning,
            batch=self.settings.batch,
            pruned=self.agreed,
            client=self.settings.client_id,
            activations=self.settings.activations,
        )
        self._progress = _Progress(round_index, set(blocks), sweep)

    @property
    def in_round(self) -> bool:
        """Whether messages of a round are still to be made."""
        return self._progress is not None

    def next_message(self) -> Message:
        """Prune what the next message needs and pack it.

        Raises:
            PruningError: a matrix cannot be pruned; names client, block and linear.
        """
        if self._progress is None:
            raise RuntimeError(f"client {self.settings.client_id}: no round was started, or its messages are all made")
        self._use_threads()
        started, progress = time.monotonic(), self._progress
        number = progress.next_message
        mine = [unit for unit in self.messages[number] if unit[0] in progress.assigned]
        blocks: dict[int, dict[str, Packed]] = {}
        notes: dict[str, dict[str, float]] = {}
        for block, name in mine:
            while (block, name) not in progress.waiting:
                done, linears = next(progress.sweep)
                progress.waiting.update({(done, linear): result for linear, result in linears.items()})
                del linears  # not kept while the next block is pruned
            result = progress.waiting.pop((block, name))
            blocks.setdefault(block, {})[name] = self._packed(result)
            if result.notes:
                notes[f"{block}.{name}"] = result.notes
        progress.next_message += 1
        if progress.next_message == len(self.messages):
            progress.sweep = iter(())
            self._progress = None
        update = make_update(progress.round_index, blocks) if blocks else {}
        if update and self.settings.compression:
            update = compress(update)
        seconds = time.monotonic() - started
        return Message(update, number, len(self.messages), seconds, json.dumps(notes) if notes else "")

    def take(self, update: dict[str, Any]) -> None:
        """Use the pruned blocks that the server sent in later forward passes."""
        if update:
            self.agreed.take(update)

    def _packed(self, pruned: PrunedLinear) -> Packed:
        """What travels of a pruned matrix; the server takes weights that the pruner left alone from its own copy."""
        if self.settings.pruning.keeps_weights:
            return pack_mask(pruned.mask)
        return pack(pruned.weight, pruned.mask, self.model.skeleton.stored_dtype)

    def _use_threads(self) -> None:
        if self.settings.threads is not None:
            torch.set_num_threads(self.settings.threads)

    def _private_windows(self) -> torch.Tensor:
        settings = self.settings
        if settings.text is None and settings.pruning.pruner == "magnitude":
            # The blocks are still run, to keep one path through the sweep: one short window of token 0 will do.
            return torch.zeros(1, 2, dtype=torch.int64)
        tokenizer = load_tokenizer(self.model.skeleton.folder)
        windows = cut_windows(tokenizer, read_text(settings.text), settings.length)
        check_vocabulary(windows, self.model.skeleton.vocabulary, f"client {settings.client_id}")
        return draw_windows(windows, settings.windows, settings.seed, settings.client_id)


@lru_cache(maxsize=4)
def _dense_model(path: str, blocks: str | None, dtype: str, device: str, model_hash: str) -> LazyModel:
    return LazyModel(path, blocks, dtype, device)
