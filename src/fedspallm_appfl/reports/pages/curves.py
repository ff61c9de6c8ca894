"""Curves and points over two axes as SVG, with a key below them; the vertical axis is logarithmic.

As in `pictures`, shares of the page are horizontal and pixels vertical, so that text keeps its size on a phone. Colours are
in page.css; a curve is told by its mark as well.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from fedspallm_appfl.reports.pages.pictures import LINE, picture

LEFT, RIGHT = 11.0, 4.0  # margins, in percent
TOP, HEIGHT = 8, 300  # pixels
COLOURS = 8  # classes c0, c1, ... of page.css
MARKS = (  # around (0, 0)
    "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0Z",
    "M-4 -4H4V4H-4Z",
    "M0 -5L5 4H-5Z",
    "M0 -5.5L5.5 0L0 5.5L-5.5 0Z",
    "M0 5L5 -4H-5Z",
    "M-2 -5H2V-2H5V2H2V5H-2V2H-5V-2H-2Z",
    "M-5 0L4 -5V5Z",
    "M5 0L-4 -5V5Z",
)


@dataclass(frozen=True)
class Point:
    """A point of a curve.

    Attributes:
        x: on the horizontal axis.
        y: on the vertical axis, positive.
        words: what it is, in words.
        reach: length of the bar above and below it.
        alone: no line leads to it, and its mark is hollow.
    """

    x: float
    y: float
    words: str
    reach: float = 0.0
    alone: bool = False


@dataclass(frozen=True)
class Curve:
    """Points of one name.

    Attributes:
        name: for the key.
        look: class of its colour and of its line: `c0` to `c7`, or `apart`, `pooled` or `dense`.
        mark: number of its mark.
        points: from left to right.
        level: height of a line across the whole picture; None for none.
    """

    name: str
    look: str
    mark: int = 0
    points: Sequence[Point] = ()
    level: float | None = None


def curves(found: Sequence[Curve], ticks: Mapping[str, float], what: str) -> str:
    """Curves, and a key in their order.

    Args:
        found: some point or level at least.
        ticks: words below the horizontal axis -> place on it.
        what: description.
    """
    axes = _Axes.of(found, ticks)
    pieces = [*axes.drawn(ticks), *(piece for curve in found for piece in _curve(curve, axes))]
    names = "".join(f"<li>{_key(curve)}{escape(curve.name)}</li>" for curve in found)
    return f'{picture(pieces, TOP + HEIGHT + LINE, what)}<ul class="key">{names}</ul>'


@dataclass(frozen=True)
class _Axes:
    """Where a value stands: the ends of both axes, the vertical ones as logarithms."""

    left: float
    right: float
    low: float
    high: float

    @classmethod
    def of(cls, found: Sequence[Curve], ticks: Mapping[str, float]) -> "_Axes":
        points = [point for curve in found for point in curve.points]
        places = [*(point.x for point in points), *ticks.values()]
        heights = [curve.level for curve in found if curve.level is not None]
        heights += [height for one in points for height in (max(one.y - one.reach, one.y / 2), one.y + one.reach)]
        left, right = _widened(min(places), max(places), 0.5)
        return cls(left, right, *_widened(math.log(min(heights)), math.log(max(heights)), 0.05))

    def x(self, value: float) -> float:
        """In percent."""
        return LEFT + (100 - LEFT - RIGHT) * (value - self.left) / (self.right - self.left)

    def y(self, value: float) -> float:
        """In pixels; what lies outside stands at the edge."""
        share = (math.log(max(value, 1e-300)) - self.low) / (self.high - self.low)
        return TOP + HEIGHT * (1 - min(1.0, max(0.0, share)))

    def drawn(self, ticks: Mapping[str, float]) -> Iterator[str]:
        """Lines of the grid with their numbers."""
        for value in round_numbers(math.exp(self.low), math.exp(self.high)):
            y = self.y(value)
            yield f'<line class="grid" x1="{LEFT}%" y1="{y:.1f}" x2="100%" y2="{y:.1f}"/>'
            yield f'<text class="end" x="{LEFT}%" dx="-6" y="{y + 4:.1f}">{value:g}</text>'
        for words, place in ticks.items():
            x = f"{self.x(place):.2f}%"
            yield f'<line class="grid" x1="{x}" y1="{TOP}" x2="{x}" y2="{TOP + HEIGHT}"/>'
            yield f'<text class="middle" x="{x}" y="{TOP + HEIGHT + 17}">{escape(words)}</text>'


def _widened(low: float, high: float, least: float) -> tuple[float, float]:
    margin = 0.06 * (high - low) or least
    return low - margin, high + margin


def round_numbers(low: float, high: float) -> list[float]:
    """About three to ten round numbers within two positive ones: equally far apart, or like 1, 2, 5, 10."""
    if high > 6 * low:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ladder = (1, 2, 5) if high > 30 * low else (1, 1.5, 2, 3, 5, 7)
        found = [one * 10.0**power for power in powers for one in ladder]
    else:
        unit = 10.0 ** math.floor(math.log10(high - low))
        step = next(unit * part for part in (1, 0.5, 0.2) if high - low >= 4 * unit * part)
        found = [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return [float(f"{one:.10g}") for one in found if low <= one <= high]


def _curve(curve: Curve, axes: _Axes) -> Iterator[str]:
    if curve.level is not None:
        title, level = escape(f"{curve.name}: {curve.level:.2f}"), axes.y(curve.level)
        yield f"<g><title>{title}</title>{_line(curve.look, LEFT, level, 100, level)}</g>"
    joined = [point for point in curve.points if not point.alone]
    for one, other in zip(joined, joined[1:], strict=False):
        yield _line(curve.look, axes.x(one.x), axes.y(one.y), axes.x(other.x), axes.y(other.y))
    for point in curve.points:
        x, y = axes.x(point.x), axes.y(point.y)
        ends = axes.y(point.y - point.reach), axes.y(point.y + point.reach)
        bar = _line(f"{curve.look} bar", x, ends[0], x, ends[1]) if point.reach else ""
        mark = _mark(curve, f'x="{x:.2f}%" y="{y:.1f}"', point.alone)
        yield f"<g><title>{escape(point.words)}</title>{bar}{mark}</g>"


def _line(look: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{look}" x1="{x1:.2f}%" y1="{y1:.1f}" x2="{x2:.2f}%" y2="{y2:.1f}"/>'


def _mark(curve: Curve, place: str, hollow: bool = False) -> str:
    look = f"{curve.look} hollow" if hollow else curve.look
    return f'<svg {place}><path class="{look}" d="{MARKS[curve.mark % len(MARKS)]}"/></svg>'


def _key(curve: Curve) -> str:
    """Its line and mark, for the key."""
    mark = _mark(curve, 'x="14" y="8"') if curve.points else ""
    line = f'<line class="{curve.look}" x1="0" y1="8" x2="28" y2="8"/>'
    return f'<svg aria-hidden="true" width="28" height="16">{line}{mark}</svg>'
