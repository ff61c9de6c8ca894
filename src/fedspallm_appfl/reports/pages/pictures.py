"""Pictures of a report as SVG: bars, columns and a heat map. Widths are shares of the page, so that text keeps its size.

Each has a description for those who do not see it, and each shape its numbers as a title. Colours are in page.css.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import isfinite

LINE, GAP = 22, 14  # pixels
LONGEST = 45.0  # of a bar, in percent: its label stands behind it
LABELS = 22.0  # for names of rows, in percent
HEIGHT = 150  # of columns, in pixels


@dataclass(frozen=True)
class Bar:
    """A bar, or a column.

    Attributes:
        name: what it is of.
        value: its length, from 0.
        shown: the value in words.
        kind: class of its colour: `dense`, `own` or `other`.
    """

    name: str
    value: float
    shown: str
    kind: str = "other"


@dataclass(frozen=True)
class Cell:
    """A cell of a heat map: its value, and what it is, in words."""

    value: float
    words: str


def bars(groups: Mapping[str, Sequence[Bar]], what: str) -> str:
    """Bars one below the other; each group has a title and a scale of its own. What has no number is as long as can be."""
    pieces, y = [], 0
    for title, group in groups.items():
        if title:
            pieces.append(f'<text class="title" x="0" y="{y + 15}">{escape(title)}</text>')
            y += LINE
        longest = max((bar.value for bar in group if isfinite(bar.value)), default=0) or 1
        for bar in group:
            pieces.append(_bar(bar, LONGEST * (bar.value / longest if isfinite(bar.value) else 1), y))
            y += LINE
        y += GAP
    return picture(pieces, y - GAP, what)


def _bar(bar: Bar, width: float, y: int) -> str:
    words = escape(f"{bar.shown}  {bar.name}")
    return (
        f"<g><title>{escape(f'{bar.name}: {bar.shown}')}</title>"
        f'<rect class="{bar.kind}" x="0" y="{y + 2}" width="{width:.2f}%" height="{LINE - 6}"/>'
        f'<text x="{width:.2f}%" dx="6" y="{y + 14}">{words}</text></g>'
    )


def columns(inner: Sequence[Bar], outer: Sequence[float], top: float, what: str) -> str:
    """Columns from left to right, each within an outline.

    Args:
        inner: the columns, with short names.
        outer: the value of each outline.
        top: the value at the upper edge.
        what: description.
    """
    width, every = 100 / max(1, len(inner)), -(-len(inner) // 12)
    pieces = []
    for number, (bar, around) in enumerate(zip(inner, outer, strict=True)):
        x, shapes = number * width, ""
        for kind, value in (("outline", around), (bar.kind, bar.value)):
            height = HEIGHT * value / top
            shapes += (
                f'<rect class="{kind}" x="{x + width * 0.1:.3f}%" y="{HEIGHT - height:.1f}" '
                f'width="{width * 0.8:.3f}%" height="{height:.1f}"/>'
            )
        title = f"<title>{escape(f'{bar.name}: {bar.shown}')}</title>"
        name = f'<text class="middle" x="{x + width / 2:.3f}%" y="{HEIGHT + 15}">{escape(bar.name)}</text>'
        pieces.append(f"<g>{title}{shapes}{'' if number % every else name}</g>")
    return picture(pieces, HEIGHT + LINE, what)


def heat_map(rows: Mapping[str, Mapping[str, Cell]], names: Sequence[str], what: str) -> str:
    """Cells by row and column; the least value is the lightest, the largest the darkest.

    Args:
        rows: name of a row -> name of a column -> cell; a cell may be missing.
        names: of the columns, in order.
        what: description.
    """
    values = [cell.value for row in rows.values() for cell in row.values()]
    least, span = min(values), max(values) - min(values)
    width, every = (100 - LABELS) / len(names), -(-len(names) // 12)
    pieces = []
    for y, (label, row) in enumerate(rows.items()):
        pieces.append(f'<text x="0" y="{y * LINE + 15}">{escape(label)}</text>')
        for x, name in enumerate(names):
            if name in row:
                cell = row[name]
                depth = 0.15 + 0.85 * (cell.value - least) / span if span else 0.6
                pieces.append(
                    f'<rect class="own" x="{LABELS + x * width:.3f}%" y="{y * LINE}" width="{width * 0.96:.3f}%" '
                    f'height="{LINE - 2}" fill-opacity="{depth:.3f}"><title>{escape(cell.words)}</title></rect>'
                )
    bottom = len(rows) * LINE
    for x, name in enumerate(names[::every]):
        middle = LABELS + (x * every + 0.48) * width
        pieces.append(f'<text class="middle" x="{middle:.3f}%" y="{bottom + 15}">{escape(name)}</text>')
    return picture(pieces, bottom + LINE, what)


def picture(pieces: Sequence[str], height: int, what: str) -> str:
    """Pieces of SVG as wide as the page, with a description."""
    shown = escape(what)
    return f'<svg role="img" aria-label="{shown}" width="100%" height="{max(1, height)}">{"".join(pieces)}</svg>'
