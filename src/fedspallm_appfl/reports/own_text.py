"""What clients have measured on windows of their own text, as tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedspallm_appfl.events import EventLog
from fedspallm_appfl.models.perplexity import Loss

TITLE = "Perplexity on the clients' own held-out text"
HEAD = ("client", "tokens", "dense", "pruned")
ALL = "all"


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
    events = {event["client"]: event for event in log.of("measured") if event["tokens"]}
    if not events:
        return {}
    sums = {key: sum(event[key] for event in events.values()) for key in ("tokens", "dense", "pruned")}
    return {client: _perplexities(event) for client, event in {**events, ALL: sums}.items()}


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
