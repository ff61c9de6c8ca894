"""Events of a run as plain dicts: written to metrics.jsonl, one per line, and passed to listeners."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fedspallm_appfl.errors import ModelError, first_line, shortened

Event = dict[str, Any]
OnEvent = Callable[[Event], None]

# kinds that count only once
ONCE = ("start", "block", "round", "measured", "allocation", "notice", "outlier", "brought_back")
MANY = "upload"  # the kind of which there is one for each client and message; it is not kept in memory


def ignore(event: Event) -> None:
    """Do nothing with an event."""


class EventLog:
    """Append events to a file, from which the report reads them, and pass them on to listeners.

    Attributes:
        seconds: of work until the last event.
    """

    def __init__(self, file: Path, *listeners: OnEvent) -> None:
        """Go on after the events that the file holds."""
        self._file = file
        self._listeners = listeners
        self._few: list[Event] = []
        self.seconds = 0.0
        self._whole = 0  # bytes of whole lines
        for number, line in enumerate(_lines(file), 1):
            self._keep(parsed(line, number, file))
            self._whole += len(line)
        self._known = {_frozen(event) for event in self._few if event["event"] in ONCE}
        self._started = time.monotonic() - self.seconds

    def __call__(self, event: Event) -> None:
        """Take one event; `time` is seconds of work since the log was begun.

        Raises:
            ModelError: there is no room for it.
        """
        if _frozen(event) in self._known:  # what was done again after the run was cut off
            return
        stamped = {**event, "time": round(time.monotonic() - self._started, 4)}
        self._keep(stamped)
        line = json.dumps(stamped, ensure_ascii=False).encode() + b"\n"
        try:
            with self._file.open("ab") as file:
                file.truncate(self._whole)  # a line that was cut off goes
                file.write(line)
            self._whole += len(line)
        except OSError as error:
            raise ModelError(f"{self._file} cannot be written: {error}; make room there") from error
        for listener in self._listeners:
            listener(stamped)

    def _keep(self, event: Event) -> None:
        self.seconds = float(event["time"])
        if event["event"] != MANY:
            self._few.append(event)

    @property
    def events(self) -> Iterator[Event]:
        """All events so far, as the file has them."""
        return (parsed(line, number, self._file) for number, line in enumerate(_lines(self._file), 1))

    def of(self, kind: str) -> list[Event]:
        """Events of one kind other than uploads."""
        return [event for event in self._few if event["event"] == kind]

    @property
    def uploads(self) -> Iterator[Event]:
        """Events of uploads, one at a time."""
        return (event for event in self.events if event["event"] == MANY)


def _lines(file: Path) -> Iterator[bytes]:
    """The whole lines of a file; none if it is not there."""
    if file.is_file():
        with file.open("rb") as opened:
            yield from (line for line in opened if line.endswith(b"\n"))


def parsed(line: bytes, number: int, file: Path) -> Event:
    """The event of a line.

    Raises:
        ModelError: it is none.
    """
    try:
        event: Event = json.loads(line)
        str(event["event"]), _frozen(event), float(event["time"])
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        why = f"line {number} of {file} is no event; begin the run anew with --overwrite"
        raise ModelError(f"{why} ({shortened(first_line(error))})") from error
    return event


def _frozen(event: Event) -> str:
    return json.dumps({key: value for key, value in event.items() if key != "time"}, sort_keys=True)
