"""What the report says of targets that were chosen for each matrix."""

from collections.abc import Mapping

from fedspallm_appfl.events import Event

WORDS = "Share of each matrix that is pruned; all together have as many zeros as with one target for all."


def choice_line(event: Event) -> str:
    """The width that was kept, and the loss at each that was tried."""
    tried = ", ".join(f"{loss:.4f} at {width}" for width, loss in event["losses"].items())
    return f"targets within {event['width']:g} of the whole" + (f"; loss on other public text {tried}" if tried else "")


def table(targets: Mapping[str, float]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: a block a row, a matrix a column.

    Args:
        targets: `blocks.N.NAME` -> share.
    """
    cells: dict[str, dict[str, str]] = {}
    for name, share in targets.items():
        _, block, matrix = name.split(".", 2)
        cells.setdefault(block, {})[matrix] = f"{share:.3f}"
    names = list(dict.fromkeys(matrix for row in cells.values() for matrix in row))
    rows = [[block, *(row.get(name, "-") for name in names)] for block, row in cells.items()]
    return ["block", *names], rows
