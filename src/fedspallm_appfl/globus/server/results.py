"""Read the result of a client's task, which is untrusted input.

The SDK has parsed its JSON into dicts and lists. This module turns it into the form that the server relies on, or into a
failure of that client. Text for a terminal or a report is made printable and short.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedspallm_appfl.errors import UpdateError
from fedspallm_appfl.wire.metadata import printable, read_metadata, word

LONGEST_LINE = 1000  # characters of a reason


@dataclass(frozen=True)
class Message:
    """One message of a client.

    Attributes:
        place: where its payload is, as returned by `places.placed`.
        metadata: its metadata.
    """

    place: Mapping[str, Any]
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Failure:
    """Why a client sent no messages.

    Attributes:
        why: the reason, in a line or two.
        traceback: from its site, or empty.
        host: where it ran, if known.
        blocks: the blocks it was working on, if known.
    """

    why: str
    traceback: str = ""
    host: str = ""
    blocks: str = ""


def read_result(client: str, result: Any, total: int) -> list[Message] | Failure:
    """Read the result of a task.

    Args:
        client: the client it ran for.
        result: the result.
        total: how many messages it must have.

    Returns:
        Its messages in order, or why there are none.

    Raises:
        UpdateError: it does not have the form that `worker.run_exchange` returns.
    """
    if not isinstance(result, dict):
        raise UpdateError(f"refused the result of client {client}: it is not a dict")
    if isinstance(result.get("error"), dict):
        error = {key: printable(result["error"].get(key, "")) for key in ("message", "traceback", "host", "blocks")}
        return Failure(error["message"][:LONGEST_LINE], error["traceback"], word(error["host"]), word(error["blocks"]))
    messages = result.get("messages")
    if not isinstance(messages, list) or len(messages) != total:
        there = len(messages) if isinstance(messages, list) else "no"
        raise UpdateError(f"refused the result of client {client}: it has {there} messages, expected {total}")
    return [_message(client, message, number, len(messages)) for number, message in enumerate(messages)]


def _message(client: str, message: Any, number: int, total: int) -> Message:
    where = f"refused the result of client {client}: message {number}"
    if not isinstance(message, dict) or not isinstance(message.get("payload"), dict):
        raise UpdateError(f"{where} has no payload")
    of = read_metadata(message.get("metadata"), f"client {client}, message {number}")
    if (of.number, of.total) != (number, total):
        raise UpdateError(f"{where} of {total} says that it is {of.number} of {of.total}")
    return Message(message["payload"], {**message["metadata"], "host": of.host})
