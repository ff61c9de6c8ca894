"""A picture of a run at work, for a terminal of 80 columns and more."""

from collections.abc import Mapping
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from fedspallm_appfl.reports.parts import bytes_text
from fedspallm_appfl.reports.progress import duration
from fedspallm_appfl.reports.watching.watched import Client, Watched

BAR = 30  # characters
AROUND = 12  # lines of the picture beside those of clients
FEWEST = 3  # clients that are shown in the lowest terminal


@dataclass(frozen=True)
class Picture:
    """What there is to see of a run.

    Attributes:
        title: what run it is.
        run: what its events say.
        silence: seconds since its last event, of a run at work.
        remark: what has to be said beside it; may be empty.
    """

    title: str
    run: Watched
    silence: float = 0.0
    remark: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """As many clients as the terminal has room for."""
        room = max(FEWEST, console.height - AROUND) if console.is_terminal else len(self.run.clients)
        yield Group(*self._parts(room))

    def _parts(self, room: int) -> list[RenderableType]:
        run = self.run
        parts: list[RenderableType] = [Text(self.title, "bold", no_wrap=True, overflow="ellipsis"), self._stage()]
        if run.pace.total:
            parts.append(_bar(run))
        if run.clients:
            parts += [
                Text(self._times()),
                _clients(run.clients, None if run.over else run.seconds + self.silence, room),
            ]
        parts += [Text(line) for line in quality(run)]
        if remark := run.failed or self.remark:
            parts.append(Text(remark, "bold red" if run.failed else ""))
        return parts

    def _stage(self) -> Text:
        which = (
            f"round {self.run.round + 1} of {self.run.rounds}, " if self.run.rounds > 1 and not self.run.over else ""
        )
        return Text(which + self.run.stage, "green" if self.run.ended else "red" if self.run.failed else "cyan")

    def _times(self) -> str:
        run, left = self.run, self.run.seconds_left
        words = f"{duration(run.seconds + self.silence)} of work"
        if left is not None:
            words += (
                f", {duration(max(0.0, left - self.silence))} of {'recovery' if run.pace.recovers else 'pruning'} left"
            )
        return words


def _bar(run: Watched) -> Table:
    """How much has been sent, and how many blocks are closed."""
    row, pace = Table.grid(padding=(0, 2)), run.pace
    of = f" of {run.blocks}" if run.blocks else ""
    bar = ProgressBar(total=pace.total, completed=pace.done, width=BAR)
    row.add_row(bar, f"{pace.done}/{pace.total} messages", f"{len(run.closed)}{of} blocks closed")
    return row


def _clients(clients: Mapping[str, Client], now: float | None, room: int) -> RenderableType:
    """A row each; where there is not room for all, those that were heard of least lately."""
    table = Table(
        Column("client", no_wrap=True, overflow="ellipsis", max_width=24),
        Column("state", no_wrap=True, min_width=21),
        Column("blocks", justify="right"),
        Column("sent", justify="right", no_wrap=True),
        Column("last heard", justify="right", no_wrap=True),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    shown = set(clients)
    if len(clients) > room:
        shown = set(sorted(clients, key=lambda name: clients[name].heard or 0.0)[: room - 1])
    for name, one in clients.items():
        if name in shown:
            row = (one.state, str(len(one.blocks)), bytes_text(one.nbytes), _heard(one.heard, now))
            table.add_row(Text(name), *row, style="red" if one.state == "left out" else None)
    if len(shown) < len(clients):
        table.add_row(f"and {len(clients) - len(shown)} more")
    return table


def _heard(at: float | None, now: float | None) -> str:
    """When a client was heard of last: so long ago, or in a run that is over so long after its start."""
    if at is None:
        return "-"
    return f"at {duration(at)}" if now is None else f"{duration(max(0.0, now - at))} ago"


def quality(run: Watched) -> list[str]:
    """Perplexities that are known, a line for each kind of text."""
    lines = []
    if known := run.perplexity:
        lines.append("perplexity  " + ", ".join(f"{method} {value:.2f}" for method, value in known.items()))
    if own := run.own_perplexity:
        lines.append(f"perplexity on the clients' own text  dense {own[0]:.2f}, pruned {own[1]:.2f}")
    return lines
