"""study.html: what study.md says, with pictures, in one file that needs no network."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedspallm_appfl.reports.pages.curves import COLOURS, Curve, Point, curves, round_numbers
from fedspallm_appfl.reports.pages.page import document, figure
from fedspallm_appfl.reports.parts import bytes_text, html, marked, sections
from fedspallm_appfl.study.report import Spread, Study, heading, parts, spread, title
from fedspallm_appfl.tensors.target import parse_target
from fedspallm_appfl.wire.durable import write_text

FILE = "study.html"
WHAT = "geometric mean over texts, less is better; the scale is logarithmic"
BARS = " Bars reach a standard deviation over seeds up and down."
PATTERNS = " Hollow marks are n:m patterns."


def write(study: Study, folder: Path) -> None:
    """Write study.html.

    Raises:
        ModelError: there is no room.
    """
    body = []
    for name, of in sections(parts(study)):
        head = [f"<h2>{marked(name)}</h2>"] if name else []
        drawn = [_by_bytes(study, target) for target in study.targets if name == heading(target)]
        first = [] if name else [_by_sparsity(study)]
        body.append("\n".join(["<section>", *head, *drawn, *map(html, of), *first, "</section>"]))
    write_text(folder / FILE, document(title(study), body))


def _by_sparsity(study: Study) -> str:
    """Perplexity against sparsity, a curve for each method; n:m patterns stand alone."""
    places = {target: float(parse_target(target).share) for target in study.targets}
    order = sorted(study.targets, key=places.__getitem__)
    found = [
        Curve(
            method,
            look,
            mark,
            [
                Point(places[target], mean.mean, _words(method, target, mean), mean.deviation or 0.0, ":" in target)
                for target in order
                if (mean := _mean(study, method, target)) is not None
            ],
        )
        for method, look, mark in _looks(study, order[-1])
    ]
    what = f"Perplexity against sparsity, {WHAT}."
    more = _bars(study) + PATTERNS * any(":" in target for target in order)
    ticks = {f"{100 * place:.4g} %": place for place in places.values()}
    return figure(curves([*found, _dense(study)], ticks, what), what + more)


def _by_bytes(study: Study, target: str) -> str:
    """Perplexity against bytes; what sends nothing that a federation would send is a line across."""
    found, sent = [], []
    for method, look, mark in _looks(study, target):
        mean = _mean(study, method, target)
        if mean is None:
            continue
        if not study.sends(method):
            found.append(Curve(method, look, level=mean.mean))
            continue
        up = spread([cell.up_a_client for cell in study.of(method, target)]).mean
        words = f"{_words(method, target, mean)}, {bytes_text(up)}"
        found.append(Curve(method, look, mark, [Point(math.log(up), mean.mean, words, mean.deviation or 0.0)]))
        sent.append(up)
    if not sent:
        return ""
    what = f"Perplexity at sparsity {target} against bytes uploaded per client, {WHAT}, and so is that of bytes."
    return figure(curves([*found, _dense(study)], _ticks(sent), what), what + _bars(study))


def _ticks(sent: Sequence[float]) -> Mapping[str, float]:
    """Round numbers of bytes; at most six, which a phone has room for."""
    numbers = round_numbers(min(sent) / 1.1, max(sent) * 1.1)
    return {bytes_text(one): math.log(one) for one in numbers[:: -(-len(numbers) // 6)]}


def _dense(study: Study) -> Curve:
    return Curve("dense", "dense", level=study.dense.mean)


def _mean(study: Study, method: str, target: str) -> Spread | None:
    """The perplexity that is drawn; None where there is none that is finite."""
    mean = spread([cell.mean for cell in study.of(method, target)])
    return mean if math.isfinite(mean.mean) else None


def _words(method: str, target: str, mean: Spread) -> str:
    return f"{method}, sparsity {target}: {mean.text(2)}"


def _bars(study: Study) -> str:
    return BARS if len(study.seeds) > 1 else ""


def _looks(study: Study, target: str) -> list[tuple[str, str, int]]:
    """(method, class, mark), the same in all pictures, in the order in which the key has them: from worst to best."""
    numbers = {method: number for number, method in enumerate(sorted(study.methods, key=study.sends, reverse=True))}
    means = {method: _mean(study, method, target) for method in study.methods}
    height = {method: math.inf if mean is None else mean.mean for method, mean in means.items()}
    looks = []
    for method in sorted(study.methods, key=lambda method: -height[method]):
        turn, colour = divmod(numbers[method], COLOURS)  # the second of a colour has another mark than the first
        alone = "apart" if study.algorithms[method].apart else "pooled"
        looks.append((method, f"c{colour}" if study.sends(method) else alone, colour + turn))
    return looks
