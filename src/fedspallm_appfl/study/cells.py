"""What a study has measured: a cell for each method, target and seed, kept in a file that grows a line a cell.

The first line of the file is the settings that all cells share. A study that was interrupted goes on with the same
settings; with others it is refused, since its cells could not stand in one table.
"""

import fcntl
import json
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from fedspallm_appfl.errors import ConfigError

FILE = "cells.jsonl"
DENSE = "dense"  # the method of the cell that is the model before pruning; its target is empty

Key = tuple[str, str, int]


@dataclass(frozen=True)
class Cell:
    """One method with one target and one seed.

    Attributes:
        method: as it is spelled in `--algorithms`, or `dense`.
        target: ratio or n:m; empty for `dense`.
        seed: of calibration windows and layer sampling.
        perplexity: text -> perplexity; of `standalone` the geometric mean over the clients' own models.
        zeros: entries that masks prune, read back from the written model (of `standalone`, from all of them).
        entries: prunable entries of the same files.
        up: client -> bytes of the tensors that it sent.
        down: client -> bytes of the tensors that it was sent.
        weights: prunable entries of one model.
        client_seconds: seconds that clients spent on their messages, all together.
        server_seconds: wall seconds from when all clients had opened model and text until the pruned model was written and
            read back, less `client_seconds`.
        memory_bytes: most resident memory of the process, server and clients in one, until the model was written, above
            what it held when the cell began; None where the system does not say.
        stored: made from the sums that another cell of this seed has gathered, whose bytes and client seconds stand here
            too; `server_seconds` and `memory_bytes` are of making the model alone.
    """

    method: str
    target: str
    seed: int
    perplexity: Mapping[str, float]
    zeros: int = 0
    entries: int = 0
    up: Mapping[str, int] | None = None
    down: Mapping[str, int] | None = None
    weights: int = 0
    client_seconds: float = 0.0
    server_seconds: float = 0.0
    memory_bytes: int | None = None
    stored: bool = False

    @property
    def key(self) -> Key:
        """What tells cells apart."""
        return self.method, self.target, self.seed

    @property
    def mean(self) -> float:
        """Geometric mean of the perplexities."""
        return statistics.geometric_mean(self.perplexity.values())

    @property
    def sparsity(self) -> float:
        """Share of the prunable weights that are zero."""
        return self.zeros / self.entries if self.entries else 0.0

    @property
    def up_a_client(self) -> float:
        """Bytes up of a client, on average."""
        return statistics.mean(self.up.values()) if self.up else 0.0

    @property
    def down_a_client(self) -> float:
        """Bytes down to a client, on average."""
        return statistics.mean(self.down.values()) if self.down else 0.0

    @property
    def bits_up(self) -> float:
        """Bits that a client sends up for each prunable weight, on average."""
        return 8 * self.up_a_client / self.weights if self.weights else 0.0


class CellFile:
    """The cells of a study on disk.

    Attributes:
        cells: those that are done.
    """

    def __init__(self, stream: IO[str], cells: Mapping[Key, Cell]) -> None:
        self._stream = stream
        self.cells = dict(cells)

    def add(self, cell: Cell) -> None:
        """Keep a cell that is done."""
        self._stream.write(json.dumps(asdict(cell)) + "\n")
        self._stream.flush()
        self.cells[cell.key] = cell


@contextmanager
def opened(folder: Path, settings: Mapping[str, Any], overwrite: bool = False) -> Iterator[CellFile]:
    """The cells of the study in a folder; nobody else may write there meanwhile.

    Args:
        folder: the study's; it is made if need be.
        settings: what all cells have in common, in plain types.
        overwrite: forget the cells that are there.

    Raises:
        ConfigError: the folder cannot be written, another study works in it, it holds something else, or cells of other
            settings.
    """
    file = folder / FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not file.exists() and any(folder.iterdir()):
            raise ConfigError(
                f"--out: {folder} is not empty and holds no earlier study (no {FILE}); name another folder"
            )
        stream = file.open("a+", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out: {folder} cannot be written: {error}; name another folder") from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"--out: another study is at work in {folder}; name another folder") from error
        lines = [] if overwrite else _whole_lines(stream)
        stream.truncate(sum(len(line.encode()) for line in lines))
        if not lines:
            stream.write(json.dumps(settings) + "\n")
            stream.flush()
        try:
            earlier, *cells = [json.loads(line) for line in lines] or [json.loads(json.dumps(settings))]
            found = {cell.key: cell for cell in (Cell(**cell) for cell in cells)}
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"--out: {file} is damaged ({error}); name another folder, or give --overwrite to begin anew"
            ) from error
        _require_same(folder, earlier, json.loads(json.dumps(settings)))
        yield CellFile(stream, found)


def _whole_lines(stream: IO[str]) -> list[str]:
    """All lines but one that was being written when a study was killed."""
    stream.seek(0)
    return [line for line in stream if line.endswith("\n")]


def _require_same(folder: Path, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    before, after = _flat(earlier), _flat(now)
    keys = sorted(key for key in {*before, *after} if before.get(key) != after.get(key))
    if keys:
        shown = ", ".join(f"{key} was {before.get(key)!r} and is {after.get(key)!r}" for key in keys[:3])
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        raise ConfigError(
            f"--out: the study in {folder} was begun with other settings: {shown}{more}; "
            "go on with those, name another folder, or give --overwrite to begin anew"
        )


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    """Dotted key -> value."""
    if not isinstance(tree, dict | list):
        return {path: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {k: v for key, value in items for k, v in _flat(value, f"{path}.{key}" if path else str(key)).items()}
