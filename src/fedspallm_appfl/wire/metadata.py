"""What a client says beside a message: who it is does not change what may stand there, nor does the way that it came."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from fedspallm_appfl.errors import UpdateError, quoted

MOST = 2**31  # of every number
LONGEST = 10_000_000  # characters of the notes
KEYS = {
    "_chunk_idx",
    "_total_chunks",
    "samples",
    "seconds",
    "notes",
    "host",
}  # as `FedSpaLLMTrainer.get_parameters` gives


def checked_metadata(metadata: Any, where: str) -> dict[str, Any]:
    """Metadata in plain types, with the notes read and a host that is a word.

    Args:
        metadata: what came.
        where: what errors name: the client, and the message if that is known.

    Raises:
        UpdateError: a value is missing, or is not what it has to be.
    """
    if not isinstance(metadata, Mapping):
        raise UpdateError(f"refused an update from {where}: its metadata is {quoted(metadata)}, expected a dict")
    number: Any = metadata.get("_chunk_idx")
    total: Any = metadata.get("_total_chunks")
    wrong = [
        name
        for name, right in {
            "_chunk_idx": _is_count(number, 0),
            "_total_chunks": _is_count(total, 1),
            "samples": _is_count(metadata.get("samples"), 1),
            "seconds": _is_number(metadata.get("seconds")) and 0 <= metadata["seconds"] < MOST,
        }.items()
        if not right
    ]
    if not wrong and number >= total:
        wrong = ["_chunk_idx"]
    if wrong:
        values = ", ".join(f"{name} {quoted(metadata.get(name))}" for name in wrong)
        raise UpdateError(f"refused an update from {where}: its metadata has {values}")
    numbers = {name: metadata[name] for name in ("_chunk_idx", "_total_chunks", "samples", "seconds")}
    return numbers | {"host": word(metadata.get("host", "")), "notes": _notes(metadata.get("notes"), where)}


def word(words: Any) -> str:
    """A host or a list of blocks, without characters that would affect a table."""
    return re.sub(r"[^\w.,-]", "", str(words)[:1000], flags=re.ASCII)[:100]


def _notes(notes: Any, where: str) -> dict[str, dict[str, float]]:
    """Linear -> name -> number, from JSON."""
    try:
        if notes and (not isinstance(notes, str) or len(notes) > LONGEST):
            raise ValueError("not a text of a sensible length")
        read = json.loads(notes) if notes else {}
        pairs = [(linear, name, value) for linear, values in read.items() for name, value in values.items()]
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UpdateError(
            f"refused an update from {where}: its notes are no JSON of numbers: {quoted(notes)}"
        ) from error
    for linear, name, value in pairs:
        if not (_is_name(linear) and _is_name(name) and _is_number(value)):
            raise UpdateError(f"refused an update from {where}: its notes say {quoted((linear, name, value))}")
    return read


def _is_count(value: Any, least: int) -> bool:
    return type(value) is int and least <= value < MOST


def _is_number(value: Any) -> bool:
    return (type(value) is int and abs(value) < MOST) or (type(value) is float and math.isfinite(value))


def _is_name(text: Any) -> bool:
    return isinstance(text, str) and text.isprintable() and len(text) < 1000
