"""Show the progress of a run: a bar on a terminal, or one plain line per upload (batch logs, pipes)."""

import statistics
import time
from types import TracebackType
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fedspallm_appfl.events import Event
from fedspallm_appfl.reports.targets import choice_line
from fedspallm_appfl.reports.terminal import ConsoleTable
from fedspallm_appfl.reports.watching.pace import Pace

_Self = TypeVar("_Self", bound="_Shown")


class _Shown:
    """A progress bar that exists while the work runs."""

    _bar: Progress

    def __enter__(self: _Self) -> _Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


class RunProgress(_Shown):
    """A listener of events.

    The time left of pruning, and then of recovery, is estimated from the uploads of each.
    """

    def __init__(self, console: Console, rounds: int, clients: int, recovery: int = 0) -> None:
        self._console = console
        self._rounds = rounds
        self._clients = clients
        self._recovery = recovery
        self._pace = Pace(rounds, clients, recovery)
        self._bursts = False
        self._places: list[Event] = []
        self._bar = _bar(console, "{task.percentage:3.0f} %")
        self._task: TaskID | None = None

    def __call__(self, event: Event) -> None:
        """Take one event."""
        if event["event"] == "place":
            self._places.append(event)
            if sum(len(place["clients"]) for place in self._places) == self._clients:
                self._console.print(_placement(self._places))
        elif event["event"] == "upload":
            self._upload(event)
        elif event["event"] == "sent":
            self._bursts = True
            self._waits(f"{self._round(event)}  waiting for {', '.join(event['clients'])}")
        elif event["event"] == "waiting":
            self._waits(
                f"{self._round(event)}  still waiting for {', '.join(event['clients'])} after {duration(event['seconds'])}"
            )
        elif event["event"] == "answer":
            self._waits(
                f"{self._round(event)}  client {event['client']} has answered after {duration(event['seconds'])}"
            )
        elif event["event"] == "resumed":
            self._pace.begin()
            self._waits("going on where the run was cut off")
        elif event["event"] == "pruned":
            self._waits("the pruned model is written")
        elif event["event"] == "training":
            self._waits(
                f"{self._turn(event['turn'])}  training by {', '.join(event['clients'])}, each of which sends its changes "
                "afterwards"
            )
        elif event["event"] == "step":
            self._waits(f"{self._turn(event['turn'])}  client {event['client']}  step {event['step']} of {event['of']}")
        elif event["event"] == "allocating":
            self._waits(f"allocation: {event['what']}")
        elif event["event"] == "allocation":
            self._console.print(choice_line(event), highlight=False, markup=False)
        elif event["event"] == "notice":
            self._console.print(event["text"], highlight=False, markup=False)
        elif event["event"] == "absent":
            self._console.print(_absence(event), highlight=False, markup=False)
        elif event["event"] == "evaluation":
            done, total = event["of"]
            mean = statistics.geometric_mean(event["perplexity"].values())
            self._say(f"perplexity of {event['method']}  {mean:.2f}", done, total)

    def _round(self, event: Event) -> str:
        if self._recovery and event.get("counted"):
            exchange, exchanges = event["counted"]
            turn = exchange - (exchanges - self._recovery)  # recovery comes last
            if turn >= 0:
                return self._turn(turn)
        return f"round {event['round'] + 1}/{self._rounds}"

    def _turn(self, turn: int) -> str:
        return f"round {turn + 1}/{self._recovery} of recovery"

    def _waits(self, what: str) -> None:
        """Show an event that is not an upload."""
        if not self._console.is_terminal:
            self._console.print(what, highlight=False, markup=False)
        elif self._task is None:
            self._task = self._bar.add_task(escape(what), total=None)
        else:
            self._bar.update(self._task, description=escape(what))

    def _upload(self, event: Event) -> None:
        if event["counted"] is None:
            if self._console.is_terminal:
                self._waits(f"{self._round(event)}  client {event['client']}  keys of secure sums")
            return
        self._pace.take(event)
        what = f"{self._round(event)}  client {event['client']}  "
        what += (
            f"block {event['blocks']}" if event["blocks"] else f"message {event['message'] + 1}, no block of its own"
        )
        self._say(what, self._pace.done, self._pace.total, self._time_left(), quiet=not event["blocks"])

    def _time_left(self) -> str:
        """In words; nothing where all messages of an exchange arrive at once, whose pace means nothing."""
        seconds = self._pace.seconds_left
        if self._bursts or seconds is None:
            return ""
        return f"  {duration(seconds)} of {'recovery' if self._pace.recovers else 'pruning'} left"

    def _say(self, what: str, done: int, total: int, after: str = "", quiet: bool = False) -> None:
        """Move the bar; without one, print a line if there is news."""
        if not self._console.is_terminal:
            if not quiet:
                self._console.print(f"{what}  {done}/{total}{after}", highlight=False, markup=False)
            return
        if self._task is None:
            self._task = self._bar.add_task(what, total=total)
        self._bar.update(self._task, description=escape(what), completed=done, total=total)


class StudyProgress(_Shown):
    """One line per cell of a study, and on a terminal a bar with the time left."""

    def __init__(self, console: Console, cells: int) -> None:
        self._console = console
        self._cells = cells
        self._done = 0
        self._bar = _bar(console, "{task.completed}/{task.total}")
        self._task = self._bar.add_task("dense", total=cells)

    def begins(self, what: str) -> None:
        """A cell starts."""
        self._bar.update(self._task, description=escape(what))

    def ends(self, what: str, result: str, began: float) -> None:
        """A cell is finished that had started then, by the monotonic clock."""
        self._done += 1
        self._bar.update(self._task, completed=self._done)
        line = f"{self._done}/{self._cells}  {what}  {result}  {time.monotonic() - began:.1f} s"
        self._console.print(line, highlight=False, markup=False)


def _bar(console: Console, amount: str) -> Progress:
    """A bar that is gone at the end, with what is done in the words of `amount`; nothing without a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn(amount),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _absence(event: Event) -> str:
    """Why a round continues without a client, with the remote traceback if there is one."""
    where = "".join(f", {what} {event[what]}" for what in ("host", "blocks") if event[what])
    stack = f"\n{event['traceback'].rstrip()}" if event["traceback"] else ""
    return f"round {event['round'] + 1} continues without client {event['client']}{where}: {event['why']}{stack}"


def duration(seconds: float) -> str:
    """Seconds for people: 7500 -> "2 h 5 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _placement(places: list[Event]) -> ConsoleTable:
    """Where clients run; shows processes if there are several, and the GPU binding if a GPU is used."""
    columns = {"host": "host", "clients": "clients", "device": "device", "threads": "threads"}
    if any(place["rank"] for place in places):
        columns = {"rank": "process"} | columns
    if any(place["device"].startswith("cuda") for place in places):
        columns |= {"bound": "CUDA_VISIBLE_DEVICES"}
    table = ConsoleTable(*columns.values(), title="Placement", title_justify="left")
    for place in places:
        shown = place | {"clients": ", ".join(place["clients"]), "bound": place["bound"] or "-"}
        table.add_row(*(escape(str(shown[key])) for key in columns))
    return table


def console(**kwargs: Any) -> Console:
    """The console of the command line; lines are not wrapped if the output is not a terminal."""
    made = Console(**kwargs)
    return made if made.is_terminal else Console(**kwargs, soft_wrap=True, width=200)
