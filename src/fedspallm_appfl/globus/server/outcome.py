"""A task that was sent to a client, and how it ended."""

import time
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Task:
    """A task that was sent.

    Attributes:
        client: the client it is for.
        kind: which of `TASKS`.
        request: its argument, as it was sent.
        sent: how often it was sent.
        looked: when it was sent, or looked for last; seconds of `time.monotonic`.
    """

    client: str
    kind: str
    request: dict[str, Any]
    sent: int = 0
    looked: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Outcome:
    """How a task ended.

    Attributes:
        client: the client it was for.
        request: its argument.
        result: what it returned; None if it failed.
        problem: why it failed, in one line.
        details: the remote traceback, if there is one.
    """

    client: str
    request: dict[str, Any]
    result: dict[str, Any] | None
    problem: str = ""
    details: str = ""
