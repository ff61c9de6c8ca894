"""What a client keeps on disk, so that a run that goes on does not begin at the first block again.

Now and then its hidden states: two are kept, as a client may be ahead of what the server has finished. Without one that
fits, the sweep begins at its start; only the time differs. And what it has learnt in a round of recovery, where all blocks
are trained together.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedspallm_appfl.models.blockwise import Activations
from fedspallm_appfl.wire.deltas import PackedDelta
from fedspallm_appfl.wire.durable import in_words
from fedspallm_appfl.wire.store import save_whole

KEPT = 2
Changes = Mapping[int, dict[str, PackedDelta]]  # block -> linear -> its change
SHARE = 20  # times as long as the last one took to be written, at least, before the next is


@dataclass
class Checkpoint:
    """Where the hidden states of one client are kept, and when they were last.

    Attributes:
        folder: for the files of this client, which nobody else can read; they are made of private text.
        every: seconds between two of them.
        stage: the round and exchange that is on.
    """

    folder: Path
    every: float
    stage: str = ""
    _due: float = field(default_factory=time.monotonic)

    def begin(self, stage: str) -> None:
        """Note that a sweep begins."""
        self.stage, self._due = stage, time.monotonic() + self.every

    def keep(self, block: int, state: Activations) -> None:
        """Write what goes into a block, if it is time and nothing else carries over from block to block.

        Raises:
            ModelError: there is no room.
        """
        began = time.monotonic()
        if began < self._due or not _is_whole(state):
            return
        with in_words(self.folder):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        tensors = {str(number): hidden.cpu() for number, hidden in enumerate(state.hidden)}
        save_whole(self.folder / f"{block:04d}.safetensors", tensors, {"stage": self.stage}, "hidden states")
        for old in sorted(self._files(), key=lambda file: file.stat().st_mtime_ns)[:-KEPT]:
            old.unlink()
        now = time.monotonic()
        self._due = now + max(self.every, SHARE * (now - began))

    def restore(self, most: int, state: Activations) -> int:
        """Put the latest that fits in the place of what goes into the first block.

        Args:
            most: the first block that is wanted.
            state: in front of the first block.

        Returns:
            The block that the state now stands in front of.
        """
        for file in sorted(self._files(), reverse=True):
            block = int(file.stem)
            found = self._read(file) if block <= most else None
            if found is not None and len(found) == len(state.hidden):
                for number, hidden in enumerate(state.hidden):
                    state.hidden[number] = found[str(number)].to(hidden.device, copy=True)  # in memory of its own
                return block
        return 0

    def keep_changes(self, changes: Changes) -> None:
        """Write the changes of all blocks.

        Raises:
            ModelError: there is no room.
        """
        with in_words(self.folder):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        tensors = {
            f"{block}/{name}/{part}": tensor
            for block, linears in changes.items()
            for name, change in linears.items()
            for part, tensor in change.to_dict().items()
        }
        save_whole(self._learnt, tensors, {"stage": self.stage}, "changes of weights")

    def changes(self) -> Changes | None:
        """The changes that an earlier start has written in the stage that is on; None if none."""
        found: dict[int, dict[str, dict[str, Tensor]]] = {}
        for key, tensor in (self._read(self._learnt) or {}).items():
            block, name, part = key.split("/")
            found.setdefault(int(block), {}).setdefault(name, {})[part] = tensor
        made = {block: {name: PackedDelta(**of) for name, of in linears.items()} for block, linears in found.items()}
        return made or None

    @property
    def _learnt(self) -> Path:
        return self.folder / "changes.safetensors"

    def _read(self, file: Path) -> dict[str, Tensor] | None:
        """What a file holds, if it is of the stage that is on."""
        try:
            with safe_open(file, framework="pt") as stored:
                if (stored.metadata() or {}).get("stage") != f'"{self.stage}"':
                    return None
                return {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 (no iterator)
        except (OSError, SafetensorError):  # it is only a shortcut
            return None

    def _files(self) -> list[Path]:
        return list(self.folder.glob("[0-9]*.safetensors"))


def _is_whole(state: Activations) -> bool:
    """Whether hidden states are all that goes from block to block, and lie in memory as they would after reading."""
    calls = state.calls[0] if state.calls else []
    plain = all(_is_plain(call.args) and _is_plain(list(call.kwargs.values())) for call in calls)
    return plain and all(hidden.is_contiguous() for hidden in state.hidden)


def _is_plain(value: Any) -> bool:
    """Whether a block cannot leave anything in an argument for a later one."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, Tensor | int | float | str)
