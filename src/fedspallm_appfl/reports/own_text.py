"""What clients have measured on windows of their own text, as tables."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedspallm_appfl.events import EventLog
from fedspallm_appfl.models.perplexity import Loss

TITLE = "Perplexity on the clients' own held-out text"
HEAD = ("client", "tokens", "dense", "pruned")
ALL = "(all)"  # no client can be called so


@dataclass(frozen=True)
class OwnText:
    """Perplexity of two models on one client's text, or on that of all.

    Attributes:
        tokens: tokens that were predicted.
        dense: perplexity of the dense model.
        pruned: that of the pruned one, or of the client's own.
    """

    tokens: int
    dense: float
    pruned: float


def own_texts(log: EventLog) -> dict[str, OwnText]:
    """Client -> what it has measured; the last row is over the tokens of all. Empty if nobody has."""
    measured = sorted((event for event in log.of("measured") if event["tokens"]), key=lambda event: event["client"])
    if not measured:
        return {}
    sums = {key: math.fsum(event[key] for event in measured) for key in ("dense", "pruned")}
    everybody = {"tokens": sum(event["tokens"] for event in measured), **sums}
    return {event["client"]: _perplexities(event) for event in measured} | {ALL: _perplexities(everybody)}


def _perplexities(sums: dict) -> OwnText:
    tokens = sums["tokens"]
    return OwnText(tokens, *(Loss(sums[model], tokens).perplexity for model in ("dense", "pruned")))


def rows(found: Mapping[str, OwnText], digits: int) -> list[Sequence[str]]:
    """The table under `HEAD`."""
    return [
        (client, f"{one.tokens:,}", f"{one.dense:.{digits}f}", f"{one.pruned:.{digits}f}")
        for client, one in found.items()
    ]


def notes(log: EventLog) -> list[str]:
    """Who has not measured, and why."""
    short = [event["client"] for event in log.of("measured") if not event["tokens"]]
    missing = [f"- {event['client']}: {' '.join(event['why'].split())}" for event in log.of("unmeasured")]
    return missing + [f"- {client}: its text has no windows beside those for pruning" for client in short]
