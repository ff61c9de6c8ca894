"""The measurements of a study: one cell per method, target and seed, kept in a file with one line per cell.

The first line of the file has the settings that all cells share. An interrupted study resumes with the same
settings; with others it is refused, because its cells would not be comparable.
"""

import fcntl
import json
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from fedspallm_appfl.errors import ConfigError, quoted
from fedspallm_appfl.settings.yaml_text import flat

FILE = "cells.jsonl"
DENSE = "dense"  # the method of the cell of the model before pruning; its target is empty

Key = tuple[str, str, int]


@dataclass(frozen=True)
class Cell:
    """One method with one target and one seed.

    Attributes:
        method: as spelled in `--algorithms`, or `dense`.
        target: ratio or n:m; empty for `dense`.
        seed: of calibration windows and layer sampling.
        perplexity: text -> perplexity; of `standalone` the geometric mean over the clients' own models.
        zeros: entries that masks prune, read back from the written model (of `standalone`, from all of them).
        entries: prunable entries of the same files.
        up: client -> tensor bytes that it sent.
        down: client -> tensor bytes that it received.
        weights: prunable entries of one model.
        client_seconds: total seconds that all clients spent on their messages.
        server_seconds: wall seconds from when all clients had opened model and text until the pruned model was written and
            read back, less `client_seconds`.
        memory_bytes: most resident memory of the process, server and clients in one, until the model was written, above
            what it held when the cell began; None if the system does not report it.
        stored: made from sums that another cell of this seed has gathered. Bytes and client seconds are those of that cell;
            `server_seconds`, `memory_bytes` and `cpu_seconds` cover only pruning from the sums.
        cpu_seconds: processor time of all threads until the pruned model was written, from when the cell began; None in
            a study of an older version.
        run_of: the method in whose run it was measured, of the same uploads; bytes, seconds and memory are those of that
            run, and no model was written to count zeros in. Empty for a run of its own.
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
    cpu_seconds: float | None = None
    run_of: str = ""

    @property
    def key(self) -> Key:
        """The key that identifies a cell."""
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
        """Bytes uploaded per client, on average."""
        return statistics.mean(self.up.values()) if self.up else 0.0

    @property
    def down_a_client(self) -> float:
        """Bytes downloaded per client, on average."""
        return statistics.mean(self.down.values()) if self.down else 0.0

    @property
    def bits_up(self) -> float:
        """Bits uploaded per client and prunable weight, on average."""
        return 8 * self.up_a_client / self.weights if self.weights else 0.0


class CellFile:
    """The cells of a study on disk.

    Attributes:
        cells: the finished ones.
    """

    def __init__(self, stream: IO[str], cells: Mapping[Key, Cell]) -> None:
        self._stream = stream
        self.cells = dict(cells)

    def add(self, cell: Cell) -> None:
        """Keep a finished cell."""
        self._stream.write(json.dumps(asdict(cell)) + "\n")
        self._stream.flush()
        self.cells[cell.key] = cell


@contextmanager
def opened(folder: Path, settings: Mapping[str, Any], overwrite: bool = False) -> Iterator[CellFile]:
    """The cells of the study in a folder, which is locked meanwhile.

    Args:
        folder: the study's; it is created if needed.
        settings: the settings that all cells share, in plain types.
        overwrite: discard the existing cells.

    Raises:
        ConfigError: the folder cannot be written, another study uses it, or it holds something else or cells with other
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
            raise ConfigError(f"--out: another study is using {folder}; name another folder") from error
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
                f"--out: {file} is damaged ({error}); name another folder, or give --overwrite to start over"
            ) from error
        _require_same(folder, earlier, json.loads(json.dumps(settings)))
        yield CellFile(stream, found)


def _whole_lines(stream: IO[str]) -> list[str]:
    """All lines except an incomplete last one, which a killed study leaves."""
    stream.seek(0)
    return [line for line in stream if line.endswith("\n")]


def _require_same(folder: Path, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    before, after = flat(earlier), flat(now)
    keys = sorted(key for key in {*before, *after} if before.get(key) != after.get(key))
    if keys:
        shown = ", ".join(f"{key} was {quoted(before.get(key))} and is {quoted(after.get(key))}" for key in keys[:3])
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        raise ConfigError(
            f"--out: the study in {folder} was started with other settings: {shown}{more}; "
            "use the old settings, name another folder, or give --overwrite to start over"
        )
