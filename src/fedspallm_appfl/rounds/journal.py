"""What the server writes down, so that a run that was cut off goes on where it stood.

What an exchange makes of a block is written into a folder of its own. Renaming that folder is the moment at which the block
is finished. The files move to where they belong when the exchange ends, so that until then the stores hold what all clients
have: whoever goes on needs that. `position.json` says which exchange is on.

Whatever happens between two of these steps, the next start either finds a block finished or finds nothing of it.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedspallm_appfl.errors import ModelError, first_line, shortened
from fedspallm_appfl.wire.durable import rename, write_text
from fedspallm_appfl.wire.store import PackedStore

MAKING, FINISHED = "making", "finished"  # folders of the server's state: block -> store -> file
OLD = "old"  # what goes
SETTLED = ("global", "masks", "squares", "sums")  # stores that change when an exchange ends, and not before
POSITION, RECORD = "position.json", "record.json"
BROKEN = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)  # what reading damaged notes raises


class Journal:
    """Where a run stands, in the folder of the server's state.

    Attributes:
        folder: that folder; what is finished moves into its subfolders.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._exchange = [-1, -1]
        self._files: dict[str, int] = {}  # that were there when the exchange began

    def begin(self, position: Mapping[str, Any]) -> None:
        """Note that an exchange is on, of which nothing is finished.

        Args:
            position: plain types; `exchange` is (round, exchange).
        """
        self._exchange = list(position["exchange"])
        self._files = self._stored()
        self.amend(position)
        self._clear()

    def amend(self, position: Mapping[str, Any]) -> None:
        """Note that more is known of the exchange that is on."""
        write_text(self.folder / POSITION, json.dumps({**position, "files": self._files}))

    def _clear(self) -> None:
        """Forget what was finished: at once, since a part of it would be taken for the whole."""
        shutil.rmtree(self.folder / OLD, ignore_errors=True)
        if (self.folder / FINISHED).is_dir():
            rename(self.folder / FINISHED, self.folder / OLD)
            shutil.rmtree(self.folder / OLD, ignore_errors=True)

    def _stored(self) -> dict[str, int]:
        """Files that stay as they are while the exchange is on, and their bytes."""
        files = (file for store in SETTLED for file in (self.folder / store).glob("*.safetensors"))
        return {str(file.relative_to(self.folder)): file.stat().st_size for file in files}

    def making(self, block: int) -> Path:
        """The folder for what is being made of a block."""
        return self.folder / MAKING / f"{block:04d}"

    def finish(self, block: int, record: Mapping[str, Any]) -> None:
        """Note that a block is whole, with what a later start has to know of it, in plain types."""
        made = self.making(block)
        files = [str(file.relative_to(made)) for file in made.rglob("*.safetensors")]
        write_text(made / RECORD, json.dumps({**record, "block": block, "exchange": self._exchange, "files": files}))
        rename(made, self.folder / FINISHED / made.name)

    def end(self) -> None:
        """Move what the exchange made to where it belongs."""
        for record in self._records():
            for file in sorted(record.parent.glob("*/**/*.safetensors")):
                rename(file, self.folder / file.relative_to(record.parent))

    def restored(self) -> tuple[dict[str, Any], dict[int, dict[str, Any]]] | None:
        """Where an earlier start stood; None if nowhere.

        Returns:
            (position, block -> record of what was finished of it in the exchange that is on).

        Raises:
            ModelError: what it wrote cannot be read.
        """
        if not (self.folder / POSITION).is_file():
            if any((self.folder / FINISHED).glob("*")):
                raise self.damaged(FileNotFoundError(f"{POSITION} is missing"))
            return None
        try:
            position: dict[str, Any] = json.loads((self.folder / POSITION).read_text("utf-8"))
            self._exchange, self._files = list(position["exchange"]), dict(position["files"])
            finished = {record["block"]: record for record in self._read_records()}
            self._require_whole(finished)
        except BROKEN as error:
            raise self.damaged(error) from error
        shutil.rmtree(self.folder / MAKING, ignore_errors=True)
        shutil.rmtree(self.folder / OLD, ignore_errors=True)
        return position, finished

    def _require_whole(self, finished: Mapping[int, Mapping[str, Any]]) -> None:
        """See whether every file is there that was; what a finished block made may have moved to its place already.

        Raises:
            ValueError: one is missing or has another size.
        """
        made = {name: block for block, record in finished.items() for name in record["files"]}
        for name, block in made.items():
            places = (self.folder / FINISHED / f"{block:04d}" / name, self.folder / name)
            if not any(place.is_file() for place in places):
                raise ValueError(f"{name} is missing")
        for name, size in self._files.items():
            file = self.folder / name
            if name not in made and not (file.is_file() and file.stat().st_size == size):
                raise ValueError(f"{name} is missing or not whole")

    def damaged(self, error: Exception) -> ModelError:
        """What to raise where something that was written down cannot be."""
        why = shortened(first_line(error))
        return ModelError(f"{self.folder} is damaged: {why}; run the experiment again from its start")

    def _read_records(self) -> list[dict[str, Any]]:
        """What is noted of the exchange that is on; notes of earlier ones go."""
        now = []
        for file in self._records():
            record: dict[str, Any] = json.loads(file.read_text("utf-8"))
            if record["exchange"] == self._exchange:
                now.append(record)
            else:
                shutil.rmtree(file.parent)
        return now

    def _records(self) -> Iterator[Path]:
        return iter(sorted((self.folder / FINISHED).glob(f"*/{RECORD}")))


def require_of_run(
    position: Mapping[str, Any],
    finished: Mapping[int, Mapping[str, Any]],
    blocks: Mapping[int, Mapping[str, Any]],
    exchanges: int,
) -> None:
    """See whether what was written down can be of a run.

    Args:
        position: where it stood.
        finished: block -> what was finished of it.
        blocks: block -> linears, of the model.
        exchanges: of a round.

    Raises:
        ValueError: it cannot; another of `BROKEN` where something is missing or has another type.
    """
    index, exchange = position["exchange"]
    counts = [index, exchange, position["bytes_down"]]
    if not all(type(count) is int and count >= -1 for count in counts) or exchange >= exchanges:
        raise ValueError(f"the run cannot stand at {counts}")
    pairs = [
        *position["held"],
        *((block, name) for block, of in finished.items() for name in [*of["made"], *of["closed"]]),
    ]
    pairs += [(int(block), name) for block, names in position["closed"].items() for name in names]
    if unknown := [(block, name) for block, name in pairs if name not in blocks.get(block, ())]:
        raise ValueError(f"there is no block {unknown[0][0]}, {unknown[0][1]}")
    named = [*position["changed"], *map(int, position["facts"]), *finished]
    named += [block for assigned in position["assigned"].values() for block in assigned]
    if unknown := [block for block in named if type(block) is not int or block not in blocks]:
        raise ValueError(f"there is no block {unknown[0]}")
    if not set(position["given_up"]) <= set(position["assigned"]):
        raise ValueError("clients were given up that are not there")
    facts = [*position["facts"].values(), *(of["facts"] for of in finished.values())]
    if not all(type(count) is int for of in facts for count in of.values()):
        raise ValueError("facts are not numbers")
    if not all(type(of["last"]) is bool for of in finished.values()):
        raise ValueError("`last` is neither true nor false")


class Latest(PackedStore):
    """A store of the server's state with what the exchange that is on has finished, which has not moved there yet."""

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__(folder / name)
        self._finished, self._name = folder / FINISHED, name

    def blocks(self) -> list[int]:
        """Indices of the blocks that are stored or finished."""
        fresh = {int(file.parents[self._name.count("/") + 1].name) for file in self._finished.glob(f"*/{self._name}/*")}
        return sorted(fresh.union(super().blocks()))

    def _file(self, block: int) -> Path:
        usual = super()._file(block)
        fresh = self._finished / f"{block:04d}" / self._name / usual.name
        return fresh if fresh.is_file() else usual
