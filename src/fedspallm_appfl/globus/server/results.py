"""Read the result of a client's task, which is untrusted input.

The SDK has parsed its JSON into dicts and lists. This module turns it into the form that the server relies on, or into a
failure of that client. Text for a terminal or a report is made printable and short.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedspallm_appfl.errors import UpdateError

LONGEST_LINE = 1000  # characters of a reason
LONGEST = 10_000  # characters of a traceback
MOST = 2**31  # maximum of every count
METADATA = {"_chunk_idx", "_total_chunks", "samples", "seconds", "notes", "host"}  # arguments of `global_update`


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
        return Failure(
            error["message"][:LONGEST_LINE], error["traceback"], _word(error["host"]), _word(error["blocks"])
        )
    messages = result.get("messages")
    if not isinstance(messages, list) or len(messages) != total:
        there = len(messages) if isinstance(messages, list) else "no"
        raise UpdateError(f"refused the result of client {client}: it has {there} messages, expected {total}")
    return [_message(client, message, number, len(messages)) for number, message in enumerate(messages)]


def _message(client: str, message: Any, number: int, total: int) -> Message:
    where = f"refused the result of client {client}: message {number}"
    if not isinstance(message, dict) or not isinstance(message.get("payload"), dict):
        raise UpdateError(f"{where} has no payload")
    metadata = message.get("metadata")
    if not isinstance(metadata, dict) or not _are_complete(metadata):
        raise UpdateError(f"{where} has metadata {printable(metadata)[:200]}")
    if (metadata["_chunk_idx"], metadata["_total_chunks"]) != (number, total):
        raise UpdateError(f"{where} of {total} says that it is {metadata['_chunk_idx']} of {metadata['_total_chunks']}")
    return Message(message["payload"], {**metadata, "host": _word(metadata.get("host", ""))})


def _are_complete(metadata: Mapping[str, Any]) -> bool:
    """Whether metadata has the keys and types that the server relies on."""
    counts = all(
        type(metadata.get(key)) is int and 0 <= metadata[key] < MOST for key in ("_chunk_idx", "_total_chunks")
    )
    samples = type(metadata.get("samples")) is int and 0 < metadata["samples"] < MOST
    seconds = type(metadata.get("seconds")) in (int, float) and 0 <= metadata["seconds"] < MOST
    return counts and samples and seconds and _are_notes(metadata.get("notes")) and set(metadata) <= METADATA


def _are_notes(notes: Any) -> bool:
    """Whether notes are empty or JSON of linear -> name -> number."""
    try:
        read = json.loads(notes) if notes else {}
        pairs = [(linear, name, value) for linear, values in read.items() for name, value in values.items()]
    except (ValueError, TypeError, AttributeError, RecursionError):
        return False
    return all(
        printable(linear) == linear and printable(name) == name and type(value) in (int, float)
        for linear, name, value in pairs
    )


def _word(words: Any) -> str:
    """A host or a list of blocks, without characters that would affect a table."""
    return re.sub(r"[^\w.,-]", "", str(words), flags=re.ASCII)[:100]


def printable(words: Any) -> str:
    """Text of another site without terminal control characters."""
    return "".join(letter for letter in str(words)[:LONGEST] if letter.isprintable() or letter in "\n\t")
