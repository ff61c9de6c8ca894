"""A client's side of a round: prune the assigned blocks on private text, message by message.

The sweep over the blocks is a generator that stands still between messages, so that a message leaves as soon as its
blocks are pruned and only they are in memory. Clients in one process share one dense model, since no block is loaded
while a sweep stands still.
"""

import json
import os
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from fedspallm_appfl.aggregation.layer_sampling import to_text
from fedspallm_appfl.algorithms import registry
from fedspallm_appfl.algorithms.algorithm import SQUARES, Exchange, of_round
from fedspallm_appfl.errors import FederationError
from fedspallm_appfl.events import OnEvent, ignore
from fedspallm_appfl.models.inputs import shared_inputs
from fedspallm_appfl.models.lazy_model import LazyModel
from fedspallm_appfl.models.perplexity import losses
from fedspallm_appfl.models.storage.checkpoint import allow_code_of
from fedspallm_appfl.pruning import registry as pruners
from fedspallm_appfl.rounds.checkpoint import Checkpoint
from fedspallm_appfl.rounds.hidden.client import Hiding
from fedspallm_appfl.rounds.hidden.kept import make_private
from fedspallm_appfl.rounds.hidden.places import exchanges_of, numbered, roster_of
from fedspallm_appfl.rounds.hidden.terms import terms_of
from fedspallm_appfl.rounds.hidden.view import KINDS, kind_of, view_of
from fedspallm_appfl.rounds.source import Source
from fedspallm_appfl.rounds.uploads import Noted, Sweep, sizes, sweep
from fedspallm_appfl.secure.identity import Identity
from fedspallm_appfl.settings.schema import ClientSettings, Pooled, Prune
from fedspallm_appfl.texts.checks import check_vocabulary
from fedspallm_appfl.texts.drawing import draw
from fedspallm_appfl.texts.tokenizer import forget_tokenizers, tokenizer_for
from fedspallm_appfl.texts.windows import Cut, forget_windows
from fedspallm_appfl.wire.hidden import PackedWords
from fedspallm_appfl.wire.messages import Unit, plan
from fedspallm_appfl.wire.store import AgreedBlocks
from fedspallm_appfl.wire.update import compress, make_update, units_of

OWN_FOLDER = "fedspallm-client-"  # begins the names of folders of clients without a place in a run's state
FEWEST = 2  # windows to measure on: of a single one no loss leaves a client


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
        secure: what the client says in an exchange of keys; empty in others.
    """

    update: dict[str, Any]
    exchange: int
    number: int
    total: int
    seconds: float
    notes: str
    secure: str = ""


@dataclass
class _Progress:
    """Where a client stands in an exchange."""

    round_index: int
    exchange: int
    assigned: set[int]
    sweep: Sweep
    messages: list[list[Unit]]
    next_message: int = 0
    waiting: dict[Unit, Noted] = field(default_factory=dict)
    says: str = ""


class LocalClient:
    """One client: its model, its text, its place in the round.

    Attributes:
        settings: what it was told.
        agreed: pruned blocks that the server has sent.
        masks: masks that the server has sent, of blocks whose values are still to come.
        final: the model that it measures at the end: what was agreed on, or its own.
        exchanges: what travels in a round.
        samples: calibration windows, its sample size.
    """

    def __init__(self, settings: ClientSettings, on_event: OnEvent = ignore) -> None:
        """Open the model and cut the private text.

        Args:
            settings: what it is told.
            on_event: hears of steps of training, every now and then.

        Raises:
            ModelError: the model cannot be read.
            DataError: the text cannot be read or is too short.
            ConfigError: its identity cannot be read.
            SecureSumError: there are too few clients for secure sums.
        """
        self.settings = settings
        self._use_threads()
        model = settings.model
        allow_code_of(model)
        self.model = self._open(model.dtype)
        windows, self._own_windows = self._private_windows()
        self.samples = len(windows)
        self._own: tempfile.TemporaryDirectory | None = None
        dtype, shared = self.model.skeleton.stored_dtype, Path(settings.agreed or self._folder("agreed"))
        looks = settings.secure_sums
        self.agreed = AgreedBlocks(dtype, shared, looks)
        self.masks = AgreedBlocks(dtype, shared / "masks", looks)
        algorithm = registry.find(settings.algorithm)
        self.final = AgreedBlocks(dtype, self._folder("final")) if algorithm.apart else self.agreed
        groups = shared_inputs(self.model.skeleton.folder, self.model.layout) if algorithm.gathers else ()
        roster = roster_of(settings)
        self.exchanges = exchanges_of(settings, groups)
        self._lacking: set[tuple[str, int, str]] = set()  # kind, block and linear of what was sent and never came here
        self.squares = AgreedBlocks(torch.float32, shared / SQUARES, looks)
        in_float32 = partial(self._open, "float32")
        keep = settings.checkpoints and Checkpoint(Path(settings.checkpoints), settings.checkpoint_every)
        self._source = Source(
            self.model,
            windows,
            settings,
            groups,
            self.agreed,
            self.masks,
            checkpoint=keep or None,
            squares=self.squares,
            scratch=self._scratch,
            in_float32=in_float32,
            on_event=on_event,
        )
        secrets = Path(settings.secrets) if settings.secrets else None
        identity = Identity.load(Path(settings.identity).expanduser()) if roster and settings.identity else None
        terms = terms_of(settings) if roster else ""
        numbers = numbered(self.exchanges, self._sizes_of)
        self._hiding = Hiding(settings.client_id, roster, terms, numbers, secrets, identity)
        self._sweep: Sweep | None = None  # that goes on over several exchanges
        self._progress: _Progress | None = None

    def _open(self, dtype: str) -> LazyModel:
        """The dense model in an arithmetic; clients of a process share it."""
        settings, model = self.settings, self.settings.model
        chosen = tuple(settings.prune.include), tuple(settings.prune.ignore)
        return _dense_model(model.path, model.blocks, dtype, tuple(settings.places), model.hash, chosen)

    def exchanges_in(self, index: int) -> int:
        """How many exchanges a round has."""
        return len(of_round(self.exchanges, index + 1 == self.settings.rounds))

    def messages(self, exchange: int) -> list[list[Unit]]:
        """The messages of an exchange, each as its (block, unit) pairs; the same for all clients.

        With values whatever the pruner, as all clients must send equally many messages.
        """
        comm = self.settings.comm
        return plan(self._sizes_of(self.exchanges[exchange]), comm.blocks_per_message, comm.max_message_bytes) or [[]]

    def _sizes_of(self, exchange: Exchange) -> dict[int, dict[str, int]]:
        """Bytes of each unit of an exchange, by block."""
        layout, settings, dtype = self.model.layout, self.settings, self.model.skeleton.stored_dtype
        return sizes(exchange, layout.pruned, settings.sparsity, dtype, self._source.groups, settings.gram)

    def _scratch(self) -> Path:
        """A folder for statistics, which goes with the client's keys if it has any: another worker may send them."""
        return make_private(Path(self.settings.secrets or self._folder("statistics")))

    def _folder(self, name: str) -> Path:
        """Where a folder of this client alone may be made, which goes with the run's state, or with this object."""
        if self.settings.checkpoints:
            kept = Path(self.settings.checkpoints)
            return kept.with_name(f"{kept.name}+{name}")  # no client's id has a plus
        if self._own is None:
            self._own = tempfile.TemporaryDirectory(prefix=OWN_FOLDER, ignore_cleanup_errors=True)
        return Path(self._own.name) / name

    def close(self) -> None:
        """Remove the files that go with this object: a worker process that is ended would leave them."""
        if self._own is not None:
            self._own.cleanup()

    def start_exchange(
        self,
        round_index: int,
        number: int,
        blocks: list[int],
        finished: Iterable[int] = (),
        told: Mapping[str, Any] | None = None,
    ) -> None:
        """Begin to make what an exchange of a round sends of the assigned blocks.

        Args:
            round_index: the round.
            number: its exchange.
            blocks: assigned ones.
            finished: those of them that were sent before.
            told: what the server says of secure sums.

        Raises:
            SecureSumError: the server breaks their protocol.
            FederationError: it lacks something of what the server sent.
        """
        self._require_all_that_was_sent()
        exchange, assigned, done = self.exchanges[number], set(blocks), frozenset(finished)
        wanted = assigned - done
        if self._own is not None:
            os.utime(self._own.name)  # what is as old as a week is taken for that of a task that was killed
        view = ""
        if self.settings.secure_sums:
            view = view_of(round_index, {kind: of.seen for kind, of in self._sent.items()})
        if self._source.checkpoint:  # a round of secure sums is begun anew, maybe with other clients, and other weights
            self._source.checkpoint.begin(f"{round_index}.{number}.{view}")
        if exchange.only is None or number == 0 or self._sweep is None:
            made = sweep(replace(self._source, finished=done), exchange, assigned)
            self._sweep = made if wanted else None  # a sweep that goes on begins where something is wanted
        says = ""
        if self.settings.secure_sums:
            says = self._hiding.begin(round_index, number, exchange.up, told or {}, view)
        messages = self.messages(number)
        self._progress = _Progress(round_index, number, wanted, self._sweep or iter(()), messages, says=says)

    def goes_on(self, exchange: int) -> bool:
        """Whether the next exchange needs what the client holds: its place in a sweep, or its keys."""
        both = self.exchanges[exchange : exchange + 2]
        return len(both) == 2 and (self.settings.secure_sums or all(one.only is not None for one in both))

    @property
    def in_exchange(self) -> bool:
        """Whether messages of an exchange are still to be made."""
        return self._progress is not None

    def leave_exchange(self) -> None:
        """Forget an exchange in the middle of which the client has failed."""
        if self._progress is not None:
            self._progress = self._sweep = None

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
        blocks: dict[int, dict[str, Any]] = {}
        notes: dict[str, dict[str, float]] = {}
        for block, name in mine:
            while (block, name) not in progress.waiting:
                done, units = next(progress.sweep)
                progress.waiting.update({(done, unit): made for unit, made in units.items()})
                del units  # not kept while the next block is made
            packed, said = progress.waiting.pop((block, name))
            if isinstance(packed, PackedWords):
                packed = PackedWords(self._hiding.mask(block, name, packed.words))
            blocks.setdefault(block, {})[name] = packed
            if said:
                notes[f"{block}.{name}"] = said
        progress.next_message += 1
        if progress.next_message == len(progress.messages):
            self._progress = None
            if self.exchanges[progress.exchange].only is None:
                self._sweep = None
        if self.settings.secure_sums:
            last = progress.exchange + 1 == self.exchanges_in(progress.round_index)
            self._hiding.keep(ended=last and self._progress is None)
        update = make_update(progress.round_index, blocks, progress.exchange) if blocks else {}
        hidden = self.exchanges[progress.exchange].hidden  # masked words are as random as can be
        if update and self.settings.comm.compression == "zstd" and not hidden:
            update = compress(update)
        seconds = time.monotonic() - started
        total, said_all = len(progress.messages), json.dumps(notes) if notes else ""
        return Message(update, progress.exchange, number, total, seconds, said_all, progress.says)

    def take(self, update: dict[str, Any]) -> None:
        """Use what the server sent in later exchanges: pruned blocks, or masks to solve for."""
        if update:
            kind = self._kind_of(update)
            self._sent[kind].take(update)
            self._lacking -= {(kind, *unit) for unit in units_of(update)}

    def miss(self, updates: Iterable[Mapping[str, Any]]) -> None:
        """Note what the server sent while this client could not be opened, but for what lies here all the same."""
        for update in updates:
            kind = self._kind_of(update)
            if not self._sent[kind].has(update):
                self._lacking |= {(kind, *unit) for unit in units_of(update)}

    def _kind_of(self, update: Mapping[str, Any]) -> str:
        return kind_of(self.exchanges[update["exchange"]].down)

    def _require_all_that_was_sent(self) -> None:
        """Without it the client would prune other inputs than the others, or solve for no mask."""
        if self._lacking:
            blocks = sorted({block for _, block, _ in self._lacking})
            raise FederationError(
                f"client {self.settings.client_id}: it could not be opened when the server sent what was agreed on of block"
                f"{'s' if len(blocks) > 1 else ''} {to_text(blocks)}, and takes part again when that is replaced; "
                "`fedspallm resume` sends it again"
            )

    @property
    def _sent(self) -> dict[str, AgreedBlocks]:
        """What the server has sent, by its kind."""
        return dict(zip(KINDS, (self.agreed, self.masks, self.squares), strict=True))

    def measure(self) -> dict[str, Any]:
        """The dense and the final model on windows of its text that were kept out of calibration.

        Returns:
            `{"tokens": number, "dense": loss, "pruned": loss}`, losses summed over the tokens that are predicted; tokens is
            0 if the text has fewer than `FEWEST` such windows.
        """
        self._use_threads()
        if len(self._own_windows) < FEWEST:
            return {"tokens": 0, "dense": 0.0, "pruned": 0.0}
        text, batch = {"own": self._own_windows}, self.settings.data.batch
        dense, pruned = (losses(self.model, text, of, batch)["own"] for of in (lambda block: None, self.final.get))
        return {"tokens": dense.tokens, "dense": dense.total, "pruned": pruned.total}

    def _use_threads(self) -> None:
        if self.settings.threads is not None:
            torch.set_num_threads(self.settings.threads)

    def _private_windows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Windows to prune with, and those that are kept out."""
        data, pruner = self.settings.data, pruners.find(self.settings.pruner)
        if data.text is None and not data.pool and pruner.needs is None:
            # The blocks are still run, to keep one path through the sweep: one short window of token 0 will do.
            return torch.zeros(1, 2, dtype=torch.int64), torch.zeros(0, 2, dtype=torch.int64)
        own = Pooled(self.settings.client_id, data.text, data.windows, data.field)
        of = data.pool or [own]
        drawn = [self._drawn(one) for one in of]
        parts = [(windows[: one.windows], windows[one.windows :]) for one, windows in zip(of, drawn, strict=True)]
        return torch.cat([used for used, _ in parts]), torch.cat([kept_out for _, kept_out in parts])

    def _drawn(self, of: Pooled) -> torch.Tensor:
        data, text, skeleton = self.settings.data, of.text or [], self.model.skeleton
        cut = Cut(data.length, data.bos, of.field, data.control_words)
        tokenizer, spare = tokenizer_for(skeleton.folder, text), self.settings.own_windows
        windows = draw(text, cut, tokenizer, of.windows, self.settings.seed, of.client_id, spare)
        check_vocabulary(windows, skeleton.vocabulary, f"client {of.client_id}")
        return windows


def forget() -> None:
    """Drop models, tokenizers and windows that clients of this process share: files may change before the next run."""
    _dense_model.cache_clear()
    forget_tokenizers()
    forget_windows()


@lru_cache(maxsize=4)
def _dense_model(
    path: str,
    blocks: str | None,
    dtype: str,
    devices: tuple[str, ...],
    model_hash: str,
    chosen: tuple[tuple[str, ...], ...],
) -> LazyModel:
    include, ignore = map(list, chosen)
    return LazyModel(path, blocks, dtype, devices[0], Prune(include, ignore), devices[1:])
