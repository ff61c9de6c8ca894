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


def ignore(event: Event) -> None:
    """Do nothing with an event."""


class EventLog:
    """Append events to a file, keep them for the report, pass them on to listeners.

    Attributes:
        events: all events so far.
    """

    def __init__(self, file: Path, *listeners: OnEvent) -> None:
        """Go on after the events that the file holds."""
        self._file = file
        self._listeners = listeners
        self.events: list[Event] = list(_read(file))
        self._known = {_frozen(event) for event in self.events if event["event"] in ONCE}
        self._started = time.monotonic() - (self.events[-1]["time"] if self.events else 0.0)

    def __call__(self, event: Event) -> None:
        """Take one event; `time` is seconds of work since the log was begun.

        Raises:
            ModelError: there is no room for it.
        """
        if _frozen(event) in self._known:  # what was done again after the run was cut off
            return
        stamped = {**event, "time": round(time.monotonic() - self._started, 4)}
        self.events.append(stamped)
        try:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(stamped, ensure_ascii=False) + "\n")
        except OSError as error:
            raise ModelError(f"{self._file} cannot be written: {error}; make room there") from error
        for listener in self._listeners:
            listener(stamped)

    def of(self, kind: str) -> list[Event]:
        """Events of one kind."""
        return [event for event in self.events if event["event"] == kind]


def _read(file: Path) -> Iterator[Event]:
    """The events of a file; a line that was cut off is cut away."""
    if not file.is_file():
        return
    text = file.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        file.write_bytes(whole)
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            event: Event = json.loads(line)
            str(event["event"]), _frozen(event), float(event["time"])
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            why = f"line {number} of {file} is no event; begin the run anew with --overwrite"
            raise ModelError(f"{why} ({shortened(first_line(error))})") from error
        yield event


def _frozen(event: Event) -> str:
    return json.dumps({key: value for key, value in event.items() if key != "time"}, sort_keys=True)
