"""A listener of events that hands their numbers to the trackers that a configuration names."""

from pathlib import Path

from fedspallm_appfl.errors import first_line, shortened
from fedspallm_appfl.events import Event, OnEvent
from fedspallm_appfl.reports.tracking.numbers import numbers
from fedspallm_appfl.reports.tracking.registry import TRACKERS, Tracker
from fedspallm_appfl.settings.schema import Config

FOLDER = "tracking"  # in the run directory


class Trackers:
    """The trackers of a run. One that fails is told of once, in an event, and gets nothing more: the run goes on."""

    def __init__(self) -> None:
        self._open: dict[str, Tracker] = {}
        self._tell: OnEvent

    def begin(self, config: Config, folder: Path, tell: OnEvent) -> None:
        """Open what `tracking` names.

        Args:
            config: the experiment.
            folder: the run directory.
            tell: takes the event of a tracker that fails.
        """
        self._tell = tell
        for name in config.tracking:
            place = folder / FOLDER / name
            try:
                place.mkdir(parents=True, exist_ok=True)
                self._open[name] = TRACKERS[name](place, folder.absolute().name, _facts(config))
            except Exception as error:  # noqa: BLE001 of whatever library
                self._failed(name, error)

    def __call__(self, event: Event) -> None:
        """Take one event; the last one of a run closes the trackers."""
        ends, values = event["event"] in ("end", "failed"), numbers(event)
        for name, tracker in list(self._open.items()):
            try:
                if values:
                    tracker.log(values, round(1000 * event["time"]))
                if ends:
                    tracker.close(event["event"] == "failed")
            except Exception as error:  # noqa: BLE001 of whatever library
                self._failed(name, error)
        if ends:
            self._open.clear()

    def _failed(self, name: str, error: Exception) -> None:
        self._open.pop(name, None)
        why = f"{type(error).__name__}: {shortened(first_line(error))}"
        self._tell({"event": "notice", "text": f"tracking: {name} failed and gets nothing more of this run ({why})"})


def _facts(config: Config) -> dict[str, str]:
    """What a tracker is told of a run beside its numbers; no text, host or path of a client."""
    train = config.client_configs.train_configs
    return {
        "model": Path(config.model.path).name,
        "algorithm": config.algorithm,
        "pruner": config.pruners(),
        "sparsity": str(train.sparsity),
        "seed": str(config.seed),
        "clients": str(len(config.clients)),
    }
