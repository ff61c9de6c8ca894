"""The numbers in an event, by name."""

from collections.abc import Iterator
from typing import Any

from fedspallm_appfl.events import Event

FIELDS = {  # event -> fields of metrics.jsonl that are measurements
    "allocation": ("width", "losses", "targets"),
    "upload": ("bytes", "seconds"),
    "answer": ("seconds",),
    "block": ("zeros", "zeros_before_expansion", "over_target", "zeros_of_one", "zeros_of_two"),
    "round": ("bytes_down",),
    "measured": ("tokens", "dense", "pruned", "bytes_down"),
    "evaluation": ("perplexity",),
}
WHOSE = ("client", "method")


def numbers(event: Event) -> dict[str, float]:
    """`event/field`, then keys within the field, then the client or method that it is about -> value."""
    whose = [str(event[key]) for key in WHOSE if key in event]
    fields = [name for name in FIELDS.get(event["event"], ()) if name in event]
    return {
        "/".join([event["event"], *path, *whose]): value for name in fields for path, value in _in([name], event[name])
    }


def _in(path: list[str], value: Any) -> Iterator[tuple[list[str], float]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _in([*path, str(key)], inner)
    elif value is not None:
        yield path, float(value)
