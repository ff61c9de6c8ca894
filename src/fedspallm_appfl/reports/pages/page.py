"""report.html: what report.md says, with pictures, in one file that needs no network."""

import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path

from fedspallm_appfl.events import EventLog
from fedspallm_appfl.models.storage.export import MatrixSparsity
from fedspallm_appfl.reports import outputs
from fedspallm_appfl.reports.own_text import ALL
from fedspallm_appfl.reports.pages.pictures import Bar, Cell, bars, columns, heat_map
from fedspallm_appfl.reports.parts import Table, bytes_text, html, sections
from fedspallm_appfl.reports.report import parts, traffic, working_seconds
from fedspallm_appfl.reports.result import Result, is_apart, label, mean
from fedspallm_appfl.rounds.participants import algorithm_of
from fedspallm_appfl.settings.schema import Config
from fedspallm_appfl.validation.words import headline, how, rounds_text
from fedspallm_appfl.wire.durable import write_text

STYLE = Path(__file__).with_name("page.css")
MOST = 24  # clients in a picture
EXPERT = re.compile(r"\.experts\.\d+\.")
UNPRUNED = ("dense", "before")  # rows of models as they were
Draw = Callable[[Config, Result, EventLog], list[str]]


def write_page(file: Path, config: Config, results: Result, log: EventLog) -> None:
    """Write report.html."""
    body = [_figures(config, results, log)]
    for name, of in sections(parts(config, results, log)):
        head = [f"<h2>{escape(name)}</h2>"] if name else []
        drawn = PICTURES.get(name, _nothing)(config, results, log)
        body.append("\n".join(["<section>", *head, *drawn, *map(html, of), "</section>"]))
    write_text(file, document(headline(config), body))


def document(title: str, body: Sequence[str]) -> str:
    """A page in HTML.

    Args:
        title: in words.
        body: pieces of HTML below it.
    """
    shown = escape(title)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{shown}</title>\n'
        f"<style>\n{STYLE.read_text('utf-8')}</style>\n</head>\n<body>\n<main>\n<h1>{shown}</h1>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def _nothing(config: Config, results: Result, log: EventLog) -> list[str]:
    return []


def _figures(config: Config, results: Result, log: EventLog) -> str:
    """The few numbers that people look for first."""
    up, down = traffic(log)
    pruned = [matrix for matrix in results.matrices if matrix.zeros]
    share = sum(matrix.zeros for matrix in pruned) / max(1, sum(matrix.entries for matrix in pruned))
    found = [
        ("Algorithm", how(config), f"{len(config.clients)} clients, {rounds_text(config)}"),
        ("Sparsity", f"{100 * share:.2f} %", f"of {len(pruned)} pruned matrices"),
        *_quality(results),
        ("Sent up", bytes_text(sum(up.values())), f"{bytes_text(sum(down.values()))} down"),
        ("Time", f"{log.seconds:.0f} s", f"{sum(working_seconds(log).values()):.0f} s at work at the clients"),
    ]
    tiles = "".join(
        f"<div><dt>{escape(name)}</dt><dd><strong>{escape(value)}</strong> <span>{escape(more)}</span></dd></div>"
        for name, value, more in found
    )
    return f"<dl>{tiles}</dl>"


def _quality(results: Result) -> list[tuple[str, str, str]]:
    """The last row next to those of the dense model and of clients by themselves, where they were measured."""
    perplexity = results.perplexity
    if not perplexity:
        everybody = [results.own[ALL]] if results.own else []
        return [
            ("Perplexity of own text", f"{one.pruned:.2f}", _beside("dense", one.pruned, one.dense))
            for one in everybody
        ]
    last = list(perplexity)[-1]
    own = mean(perplexity[last])
    beside = [name for name in perplexity if name != last and (name in UNPRUNED or is_apart(name))]
    words = [_beside(label(name), own, mean(perplexity[name])) for name in beside]
    return [("Perplexity", f"{own:.2f}", "; ".join(words))]


def _beside(name: str, own: float, other: float) -> str:
    return f"{name} {other:.2f} ({100 * (own / other - 1):+.1f}\N{NO-BREAK SPACE}%)"


def _perplexity(config: Config, results: Result, log: EventLog) -> list[str]:
    """Bars by text."""
    rows = results.perplexity
    last, texts = list(rows)[-1], list(next(iter(rows.values())))
    kinds = {"dense": "dense", last: "own"}
    by_text = {text: {method: row[text] for method, row in rows.items()} for text in texts}
    by_text |= {"geometric mean": {method: mean(row) for method, row in rows.items()}} if len(texts) > 1 else {}
    groups = {
        text: [Bar(label(method), value, f"{value:.2f}", kinds.get(method, "other")) for method, value in of.items()]
        for text, of in by_text.items()
    }
    what = f"Perplexity of {', '.join(map(label, rows))} by text; the table below has the numbers"
    return [figure(bars(groups, what), "Perplexity by text, less is better. Each text has a scale of its own, from 0.")]


def _sparsity(config: Config, results: Result, log: EventLog) -> list[str]:
    """Sparsity by block and matrix, and what clients agreed on by block."""
    blocks = [str(block) for block in sorted({matrix.block for matrix in results.matrices})]
    rows: dict[str, dict[str, Cell]] = {}
    for name, of in by_kind(results.matrices).items():
        for block, matrices in of.items():
            share = sum(one.zeros for one in matrices) / sum(one.entries for one in matrices)
            aim = ", ".join(dict.fromkeys(results.targets[one.name] for one in matrices if one.name in results.targets))
            words = f"block {block}, {name}: sparsity {share:.4f}" + (f", target {aim}" if aim else "")
            rows.setdefault(name, {})[str(block)] = Cell(share, words)
    shares = [cell.value for row in rows.values() for cell in row.values()]
    span = f"from {min(shares):.4f}, the lightest, to {max(shares):.4f}, the darkest"
    words = (
        f"Sparsity by matrix and block, {span}" if max(shares) > min(shares) else f"All have sparsity {shares[0]:.4f}"
    )
    table = Table(
        ["matrix", *blocks],
        [[name, *(f"{row[b].value:.4f}" if b in row else "-" for b in blocks)] for name, row in rows.items()],
    )
    aims = sorted(set(results.targets.values()))
    said = f" Targets: {', '.join(aims)}." if 0 < len(aims) <= 8 else ""
    return [
        figure(heat_map(rows, blocks, f"Heat map. {words}"), f"{words}. Columns are blocks.{said}", table),
        *_output_errors(log),
        *_agreement(config, results, log),
    ]


def _output_errors(log: EventLog) -> list[str]:
    """By block, how far pruning has moved what it gives; nothing where no client has noted it."""
    found = outputs.errors(log)
    if not found:
        return []
    means = {block: outputs.mean(found[block]) for block in sorted(found)}
    most = [max(found[block].values()) for block in means]
    what = "Output error by block, less is better"
    drawn = columns(
        [Bar(str(b), mean, f"{mean:.3g}", "own") for b, mean in means.items()], most, max(most) or 1.0, what
    )
    return [
        figure(
            drawn, f"{what}. Columns: mean over clients. Outlines: the largest of a client, at most {max(most):.3g}."
        )
    ]


def by_kind(matrices: Sequence[MatrixSparsity]) -> dict[str, dict[int, list[MatrixSparsity]]]:
    """Name of a matrix within its block -> block -> the matrix, or those of all experts."""
    found: dict[str, dict[int, list[MatrixSparsity]]] = {}
    for matrix in matrices:
        inner = matrix.name.removesuffix(".weight").partition(f".{matrix.block}.")[2] or matrix.name
        found.setdefault(EXPERT.sub(".experts.", inner), {}).setdefault(matrix.block, []).append(matrix)
    last = [name.rpartition(".")[2] for name in found]
    short = last if len(set(last)) == len(last) else list(found)
    return dict(zip(short, found.values(), strict=True))


def _agreement(config: Config, results: Result, log: EventLog) -> list[str]:
    """By block: what every client pruned, and how much of what a client pruned another one pruned too."""
    if not algorithm_of(config).votes or config.recovery.model:
        return []
    entries: dict[int, int] = {}
    for matrix in results.matrices:
        entries[matrix.block] = entries.get(matrix.block, 0) + matrix.entries
    found = {event["block"]: event for event in log.of("block")}
    facts = [found[block] for block in sorted(found) if found[block]["zeros"]]
    if not facts:
        return []
    all_of = [
        _share(event, event["zeros_before_expansion"], entries[event["block"]], "of the weights") for event in facts
    ]
    outer = [event["zeros"] / entries[event["block"]] for event in facts]
    what = "Share of the weights that every client pruned, before expansion, by block"
    made = [figure(columns(all_of, outer, max(outer), what), f"{what}. Outlines: share that is zero after it.")]
    pairs = [event for event in facts if event.get("zeros_of_one")]
    if pairs:
        both = [_share(event, event["zeros_of_two"], event["zeros_of_one"], "in common") for event in pairs]
        what = "Agreement of masks by block: of what a client pruned, the share that another one pruned too"
        table = Table(["block", "agreement"], [[bar.name, f"{bar.value:.4f}"] for bar in both])
        made.append(figure(columns(both, [1.0] * len(both), 1.0, what), f"{what}; mean over all pairs.", table))
    return made


def _share(event: Mapping[str, int], count: int, of: int, words: str) -> Bar:
    return Bar(str(event["block"]), count / of, f"{100 * count / of:.2f} % {words}", "own")


def _bytes(config: Config, results: Result, log: EventLog) -> list[str]:
    """Bytes by client."""
    up, down = traffic(log)
    sent = {"up": up, "down": down} if any(down.values()) else {"up": up}
    shown = {way: _largest(of, bytes_text) for way, of in sent.items()}
    caption = f"Bytes of tensors {' and '.join(sent)} by client{_most(len(up))}."
    return [figure(bars(shown, caption), caption)] if up else []


def _seconds(config: Config, results: Result, log: EventLog) -> list[str]:
    """Seconds by client."""
    spent = working_seconds(log)
    caption = f"Seconds at work by client{_most(len(spent))}."
    return [figure(bars({"": _largest(spent, lambda value: f"{value:.1f} s")}, caption), caption)] if spent else []


def _largest(values: Mapping[str, float], words: Callable[[float], str]) -> list[Bar]:
    """Bars of clients; of many those with the largest values."""
    chosen = values if len(values) <= MOST else sorted(values, key=lambda name: -values[name])[:MOST]
    return [Bar(name, values[name], words(values[name]), "own") for name in chosen]


def _most(count: int) -> str:
    return f"; the {MOST} largest of {count}" if count > MOST else ""


def figure(picture: str, caption: str, table: Table | None = None) -> str:
    """A picture with a caption, and its numbers to be unfolded where no table of the report has them."""
    numbers = f"<details><summary>Numbers</summary>{table.html()}</details>" if table else ""
    return f"<figure>{picture}<figcaption>{escape(caption)}</figcaption>{numbers}</figure>"


PICTURES: Mapping[str, Draw] = {
    "Perplexity": _perplexity,
    "Sparsity": _sparsity,
    "Bytes": _bytes,
    "Who took part": _seconds,
}
