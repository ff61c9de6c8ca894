"""The events of a run while it writes them."""

import os
from pathlib import Path
from typing import IO

from fedspallm_appfl.errors import ConfigError
from fedspallm_appfl.events import Event, parsed


class Followed:
    """Reads what is new in a file of events; nothing is written.

    Attributes:
        written: when the file was written last, in seconds since the epoch; 0 while there is none.
    """

    def __init__(self, file: Path) -> None:
        """Begin with the first line of a file, which need not be there yet."""
        self._file = file
        self._opened: IO[bytes] | None = None
        self._place = self._lines = 0
        self.written = 0.0

    def news(self) -> tuple[bool, list[Event]]:
        """Events since the last call; a last line that is not whole yet comes with a later one.

        Returns:
            Whether another run has begun in the place of the one that was followed, and the events.

        Raises:
            ConfigError: the file cannot be read.
            ModelError: a line is no event.
        """
        try:
            anew = self._is_another() and self.close()
            if self._opened is None and self._file.is_file():
                self._opened = self._file.open("rb", buffering=0)
            return anew, self._read(self._opened) if self._opened else []
        except OSError as error:
            raise ConfigError(f"{self._file} cannot be read: {error}") from error

    def close(self) -> bool:
        """Let go of the file; returns whether something had been read of it."""
        known = self._lines > 0
        if self._opened:
            self._opened.close()
        self._opened, self._place, self._lines, self.written = None, 0, 0, 0.0
        return known

    def _is_another(self) -> bool:
        """Whether the name stands for another file now, or for less; one that is open keeps its number to itself."""
        if self._opened is None:
            return False
        try:
            now = self._file.stat()
        except FileNotFoundError:
            return True
        return now.st_size < self._place or not os.path.samestat(now, os.fstat(self._opened.fileno()))

    def _read(self, opened: IO[bytes]) -> list[Event]:
        opened.seek(self._place)
        whole, end, _ = opened.read().rpartition(b"\n")
        lines = (whole + end).splitlines(keepends=True)
        self.written = os.fstat(opened.fileno()).st_mtime
        events = [parsed(line, number, self._file) for number, line in enumerate(lines, self._lines + 1)]
        self._place += len(whole + end)
        self._lines += len(lines)
        return events
