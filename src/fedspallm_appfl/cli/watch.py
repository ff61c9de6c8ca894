"""`fedspallm watch`: a run at work, seen from another terminal. It reads the run directory and imports nothing heavy."""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedspallm_appfl.cli.arguments import command
from fedspallm_appfl.cli.checked import console
from fedspallm_appfl.errors import ConfigError, FedSpaLLMError, ModelError, first_line, quoted, shortened
from fedspallm_appfl.settings.paths import model_name

if TYPE_CHECKING:
    from rich.console import Console

    from fedspallm_appfl.reports.watching.picture import Picture

EVERY = 0.5  # seconds between two looks
PATIENCE = 10.0  # seconds without news after which a run that holds no lock was cut off


def add(verbs: Any) -> None:
    """Declare the verb."""
    parser = command(
        verbs,
        "watch",
        "Show a run at work: what its clients do, what they have sent, blocks that are closed, time left and quality.",
        "fedspallm watch runs/demo",
        "fedspallm watch runs/demo --once",
    )
    parser.add_argument("run", metavar="RUN_DIR", type=Path, help="run_dir of the run; it may begin later")
    parser.add_argument("--once", action="store_true", help="show how far it is now, and end")
    parser.set_defaults(work=work)


def work(args: argparse.Namespace) -> int:
    """Do it; a run that has failed ends this with its message."""
    shown, seen = console(), _Seen(args.run)
    if args.once:
        seen.look()
        if not seen.run.clients:
            raise ConfigError(f"{shortened(args.run)} holds no run that has begun (no events in metrics.jsonl)")
        shown.print(seen.picture())
    elif shown.is_terminal:
        _redraw(seen, shown)
    else:
        _tell(seen, shown)
    if seen.why_over:
        raise FedSpaLLMError(seen.why_over)
    return 0


class _Seen:
    """A run directory, looked at now and then.

    Attributes:
        run: what the events have said.
        anew: whether another run has begun in it at the last look.
    """

    def __init__(self, folder: Path) -> None:
        from fedspallm_appfl.reports.watching.following import Followed
        from fedspallm_appfl.reports.watching.watched import Watched

        self._folder, self._new = folder, Watched
        self._file = Followed(folder / "metrics.jsonl")
        self.run = Watched()
        self._config: dict[str, Any] = {}
        self.anew = self._cut_off = False

    def look(self) -> "list[dict[str, Any]]":
        """Read on; returns what is new."""
        from fedspallm_appfl.runs.run_dir import at_work

        self.anew, news = self._file.news()
        if self.anew or (news and not self.run.clients):
            self._config = _configuration(self._folder)
            self.run = self._new(self.recovery)
        for event in news:
            try:
                self.run.take(event)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise ModelError(
                    f"{self._folder / 'metrics.jsonl'} holds an event {quoted(event['event'])} that is not of this version "
                    f"({type(error).__name__}: {shortened(first_line(error))}); watch it with the version that runs it"
                ) from error
        rests = bool(self.run.clients) and not self.run.over and self.silence > PATIENCE
        self._cut_off = rests and not at_work(self._folder)
        if self._cut_off:
            self.run.stage = "cut off"
        return news

    @property
    def recovery(self) -> int:
        """Rounds of recovery."""
        found = self._config.get("recovery")
        rounds = found.get("rounds") if isinstance(found, dict) else 0
        return rounds if type(rounds) is int else 0

    @property
    def silence(self) -> float:
        """Seconds since the last event of a run at work."""
        return 0.0 if self.run.over else max(0.0, time.time() - self._file.written)

    @property
    def why_over(self) -> str:
        """Why the run has ended without a result; empty where it has not."""
        from fedspallm_appfl.runs.run_dir import is_cut_off

        again = f"fedspallm resume {self._folder} goes on with it"
        if self.run.failed is not None:
            how = f"; {again}" if is_cut_off(self._folder) else ""
            return f"the run in {self._folder} ended before its time: {self.run.failed}{how}"
        return f"the run in {self._folder} was cut off, nobody is at work there; {again}" if self._cut_off else ""

    @property
    def over(self) -> bool:
        """Whether nothing more is to be expected."""
        return self.run.over or self._cut_off

    def picture(self) -> "Picture":
        """What there is to see now."""
        from fedspallm_appfl.reports.watching.picture import Picture

        if not self.run.clients:
            return Picture(str(self._folder), self.run)
        result = f"report  {self._folder / 'report.html'}" if self.run.ended else ""
        silence = 0.0 if self._cut_off else self.silence
        return Picture(f"{self._folder}  {_described(self._config)}".rstrip(), self.run, silence, result)


def _redraw(seen: _Seen, shown: "Console") -> None:
    """One picture, which changes."""
    from rich.live import Live

    seen.look()
    with Live(seen.picture(), console=shown, auto_refresh=False, vertical_overflow="crop") as live:
        while not seen.over:
            time.sleep(EVERY)
            seen.look()
            live.update(seen.picture(), refresh=True)


def _tell(seen: _Seen, shown: "Console") -> None:
    """Lines, as the run itself prints them where its output is no terminal."""
    from fedspallm_appfl.reports.progress import RunProgress, duration
    from fedspallm_appfl.reports.watching.picture import quality

    listener: RunProgress | None = None
    told = False
    while not seen.over:
        news = seen.look()
        if not (told or seen.run.clients):
            shown.print("waiting for a run to begin there", highlight=False)
            told = True
        if seen.anew:
            shown.print("another run begins", highlight=False)
            listener = None
        if news and listener is None:
            listener = RunProgress(shown, seen.run.rounds, len(seen.run.clients), seen.recovery)
        if listener:
            for event in news:
                listener(event)
        if not seen.over:
            time.sleep(EVERY)
    if seen.run.ended:
        lines = [f"finished after {duration(seen.run.seconds)} of work", *quality(seen.run)]
        shown.print("\n".join(lines), highlight=False, markup=False)


def _configuration(folder: Path) -> dict[str, Any]:
    """What the run was begun with; nothing where it cannot be read now, as it says more and is not needed."""
    from yaml import YAMLError

    from fedspallm_appfl.settings import yaml_text

    try:
        found = yaml_text.load((folder / "config.yaml").read_text("utf-8"))
    except (OSError, ValueError, YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _described(config: dict[str, Any]) -> str:
    """Model, algorithm and target."""
    try:
        model, train = model_name(Path(config["model"]["path"])), config["client_configs"]["train_configs"]
        pruned = f"{config['algorithm']} with {train['pruner']}"
        made = "recovery of a pruned model" if (config.get("recovery") or {}).get("model") else pruned
        return f"{model}, {made}, sparsity {train['sparsity']}"
    except (KeyError, TypeError):  # of another version, or not whole
        return ""
