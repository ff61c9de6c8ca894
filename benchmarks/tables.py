"""Tables of results, as Markdown that can also be read as it is."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.measure import Ratio

COMPARISON = ("what", "before", "ours", "ratio", "median", "range", "must", "aim", "met")


@dataclass
class Table:
    """What one benchmark found.

    Attributes:
        title: what was measured.
        columns: heads.
        rows: cells, as text.
        notes: what a reader must know, a paragraph each.
    """

    title: str
    columns: Sequence[str] = COMPARISON
    rows: list[Sequence[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def compare(
        self, what: str, before: Sequence[float], ours: Sequence[float], must: float, aim: float | None = None
    ) -> None:
        """Add a row about times; `must` and `aim` are the ratios to reach."""
        ratio = Ratio.of(before, ours)
        spread = f"{ratio.low:.2f} .. {ratio.high:.2f}"
        cells = f"{min(before):.3f} s", f"{min(ours):.3f} s", f"{ratio.best:.2f}x", f"{ratio.median:.2f}x", spread
        self.rows.append((what, *cells, f"{must:g}x", "" if aim is None else f"{aim:g}x", met(ratio.best, must, aim)))

    def add(self, *cells: object) -> None:
        """Add a row of what can be printed; floats with three digits that matter."""
        self.rows.append(tuple(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells))

    def markdown(self) -> str:
        """The table with its title and notes."""
        widths = [max(map(len, column)) for column in zip(self.columns, *self.rows, strict=True)]
        lines = [self.columns, ["-" * width for width in widths], *self.rows]
        table = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
        return "\n\n".join([f"## {self.title}", "\n".join(table), *self.notes]) + "\n"


def met(value: float, must: float, aim: float | None = None) -> str:
    """Which of two targets is reached by a value that should be large."""
    if aim is not None and value >= aim:
        return "aim"
    return "must" if value >= must else "NO"
