"""What travels beside a payload: numbers and notes for the report, which are as untrusted as the payload."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedspallm_appfl.errors import UpdateError, quoted

MOST = 2**31  # limit of every number
LONGEST = 10_000  # characters of a text
LONGEST_NAME = 200  # characters of a name in the notes
LONGEST_NOTES = 2**22  # characters; a note takes less than a hundred
LONGEST_KEYS = 2**27  # characters of keys and shares of secure sums; those of a unit take 300 a neighbour
KEYS = ("_chunk_idx", "_total_chunks", "samples", "seconds", "notes", "host", "secure")


@dataclass(frozen=True)
class Metadata:
    """What a client says of one message.

    Attributes:
        number: which message of the exchange, from 0.
        total: messages of the exchange.
        samples: calibration windows of the client.
        seconds: that it worked for the message.
        notes: linear -> name -> number.
        host: where it ran.
        secure: what the client says in an exchange of keys; nothing of it has been looked at.
    """

    number: int
    total: int
    samples: int
    seconds: float
    notes: dict[str, dict[str, float]]
    host: str
    secure: str

    @property
    def is_last(self) -> bool:
        """Whether it is the last message of the exchange."""
        return self.number == self.total - 1


def read_metadata(metadata: Any, sender: str) -> Metadata:
    """Check the metadata of a message.

    Args:
        metadata: what arrived.
        sender: whom to name in the error.

    Raises:
        UpdateError: a key is missing, or unknown without a leading underscore, or a value has another type or range.
    """
    where = f"refused the metadata of {sender}"
    if not isinstance(metadata, Mapping) or not all(type(key) is str for key in metadata):
        raise UpdateError(f"{where}: it has keys and values, got {quoted(metadata)}")
    # An underscore begins what APPFL's communicators add for themselves, such as `_client_ids`; nothing here reads it.
    unknown = [key for key in metadata if key not in KEYS and not key.startswith("_")]
    if unknown:
        raise UpdateError(f"{where}: unknown key {quoted(unknown[0])}; there are {', '.join(KEYS)}")
    total = _count(metadata, "_total_chunks", 1, MOST, where)
    return Metadata(
        _count(metadata, "_chunk_idx", 0, total, where),
        total,
        _count(metadata, "samples", 1, MOST, where),
        _seconds(metadata, where),
        _notes(metadata.get("notes"), where),
        word(metadata.get("host", "")),
        _secure(metadata.get("secure", ""), where),
    )


def _count(metadata: Mapping[str, Any], key: str, least: int, limit: int, where: str) -> int:
    value = metadata.get(key)
    if type(value) is int and least <= value < limit:
        return value
    raise UpdateError(f"{where}: {key} is a whole number from {least} to {limit - 1}, got {quoted(value)}")


def _seconds(metadata: Mapping[str, Any], where: str) -> float:
    value: Any = metadata.get("seconds")
    if _is_number(value) and 0 <= value < MOST:
        return float(value)
    raise UpdateError(f"{where}: seconds is a number from 0 to {MOST - 1}, got {quoted(value)}")


def _secure(text: Any, where: str) -> str:
    if type(text) is str and len(text) <= LONGEST_KEYS and text.isascii():
        return text
    raise UpdateError(f"{where}: secure is ASCII text of at most {LONGEST_KEYS} characters, got {quoted(text)}")


def _notes(notes: Any, where: str) -> dict[str, dict[str, float]]:
    """Notes are nothing, or JSON of linear -> name -> number."""
    if notes is None or notes == "":
        return {}
    rule = f"{where}: notes is JSON of linear, name and a finite number, got {quoted(notes)}"
    if type(notes) is not str or len(notes) > LONGEST_NOTES:
        raise UpdateError(rule)
    try:
        read = json.loads(notes)
    except (ValueError, RecursionError) as error:
        raise UpdateError(rule) from error
    if not (type(read) is dict and all(_is_name(linear) and _are_numbers(of) for linear, of in read.items())):
        raise UpdateError(rule)
    return read


def _are_numbers(values: Any) -> bool:
    return type(values) is dict and all(_is_name(name) and _is_number(value) for name, value in values.items())


def _is_number(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**63 or type(value) is float and math.isfinite(value)


def _is_name(name: str) -> bool:
    return len(name) <= LONGEST_NAME and printable(name) == name


def word(words: Any) -> str:
    """A host or a list of blocks, without characters that would affect a table."""
    return re.sub(r"[^\w.,-]", "", words[:LONGEST] if type(words) is str else "", flags=re.ASCII)[:100]


def printable(words: Any) -> str:
    """Text of another site without terminal control characters."""
    text = words if type(words) is str else quoted(words)
    return "".join(letter for letter in text[:LONGEST] if letter.isprintable() or letter in "\n\t")
