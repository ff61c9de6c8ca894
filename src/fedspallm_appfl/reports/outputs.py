"""How far pruning has moved what each block gives, as clients that pruned it have noted (see `rounds.pruning`)."""

import statistics
from collections.abc import Mapping

from fedspallm_appfl.events import EventLog
from fedspallm_appfl.rounds.pruning import OUTPUT_ERROR, SAMPLE

HEAD = "output error"
WORDS = (
    f"`{HEAD}` is how far a client's pruning moved the outputs of a block, as a share of what the dense block adds to its "
    f"inputs: norms over up to {SAMPLE:,} tokens of its text, after blocks that it had pruned before; mean over clients."
)


def errors(log: EventLog) -> dict[int, Mapping[str, float]]:
    """Block -> client -> its last error; what a client says may be anything that is a number."""
    found: dict[int, dict[str, float]] = {}
    for event in log.uploads:
        for linear, notes in event["notes"].items():
            block, error = linear.partition(".")[0], notes.get(OUTPUT_ERROR, -1.0)
            if block.isascii() and block.isdecimal() and error >= 0:
                found.setdefault(int(block), {})[event["client"]] = error
    return dict(found)


def mean(of: Mapping[str, float]) -> float:
    """Over clients."""
    return statistics.mean(of.values())
