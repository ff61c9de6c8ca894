"""Events of a run as plain dicts: written to metrics.jsonl, one per line, and passed to listeners."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Event = dict[str, Any]
OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Do nothing with an event."""


class EventLog:
    """Append events to a file, keep them for the report, pass them on to listeners.

    Attributes:
        events: all events so far.
    """

    def __init__(self, file: Path, *listeners: OnEvent) -> None:
        self.events: list[Event] = []
        self._file = file
        self._listeners = listeners
        self._started = time.monotonic()

    def __call__(self, event: Event) -> None:
        """Take one event; `time` is seconds since the log was made."""
        stamped = {**event, "time": round(time.monotonic() - self._started, 4)}
        self.events.append(stamped)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(stamped, ensure_ascii=False) + "\n")
        for listener in self._listeners:
            listener(stamped)

    def of(self, kind: str) -> list[Event]:
        """Events of one kind."""
        return [event for event in self.events if event["event"] == kind]
