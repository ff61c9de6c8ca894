"""What reports are made of, tables and words, as Markdown and as HTML, so that report.md and report.html say the same."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from textwrap import dedent

MARKED = re.compile(r"`([^`]*)`|\*\*([^*]+)\*\*")


@dataclass(frozen=True)
class Table:
    """A table; all columns except the first are right-aligned.

    Attributes:
        head: names of the columns.
        rows: cells, as many in each row.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """The table in Markdown."""
        lines = [self.head, ["---"] + ["---:"] * (len(self.head) - 1), *self.rows]
        return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)

    def html(self) -> str:
        """The table in HTML; what is wider than a screen scrolls by itself."""
        head = "".join(f'<th scope="col">{escape(name)}</th>' for name in self.head)
        inner = f"<thead><tr>{head}</tr></thead><tbody>{''.join(map(_row, self.rows))}</tbody>"
        return f'<div class="wide"><table>{inner}</table></div>'


Part = str | Table  # words are a heading `## `, code that is indented, a list of `- `, or a paragraph


def bytes_text(count: float) -> str:
    """Bytes as readable text: 1234567 -> "1.2 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return Table(head, rows).markdown()


def html(part: Part) -> str:
    """A part in HTML; everything that it says is escaped."""
    if isinstance(part, Table):
        return part.html()
    if part.startswith("## "):
        return f"<h2>{marked(part[3:])}</h2>"
    if part.startswith("    "):
        return f"<pre>{escape(dedent(part))}</pre>"
    if part.startswith("- "):
        return f"<ul>{''.join(f'<li>{marked(line[2:])}</li>' for line in part.splitlines())}</ul>"
    return f"<p>{marked(part)}</p>"


def sections(parts: Iterable[Part]) -> list[tuple[str, list[Part]]]:
    """Title -> what follows it; what stands before the first title has none."""
    found: list[tuple[str, list[Part]]] = [("", [])]
    for part in parts:
        if isinstance(part, str) and part.startswith("## "):
            found.append((part[3:], []))
        else:
            found[-1][1].append(part)
    return found


def marked(words: str) -> str:
    """Words with `code` and **bold** ones."""
    pieces, last = [], 0
    for found in MARKED.finditer(words):
        code, bold = found.groups()
        tag, inner = ("code", code) if bold is None else ("strong", bold)
        pieces += [escape(words[last : found.start()]), f"<{tag}>{escape(inner)}</{tag}>"]
        last = found.end()
    return "".join([*pieces, escape(words[last:])])


def _cell(words: str) -> str:
    """Text as a cell of a table in Markdown."""
    return " ".join(words.replace("|", "\\|").split())


def _row(cells: Sequence[str]) -> str:
    first, *others = map(escape, cells)
    return f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in others)}</tr>'
