"""One whole federated run in one process, for `scale` and `overhead`: `python -m benchmarks.federation ...`.

Arguments: model folder, clients, rounds, run folder. The last line is JSON: seconds and CPU seconds of all rounds without
setting up, the seconds of them that are work proper (pruning, aggregation, coding), and the peak MB of the process
during the rounds.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml

from benchmarks import memory
from benchmarks.models import DEMO
from fedspallm_appfl.adaptors import registration
from fedspallm_appfl.rounds.client import LocalClient
from fedspallm_appfl.rounds.pieces import Pieces
from fedspallm_appfl.rounds.server import GlobalModel
from fedspallm_appfl.runs import serial
from fedspallm_appfl.settings.reading import load_config
from fedspallm_appfl.settings.schema import Config

TEXTS = ("austen", "bible", "csource", "sqldocs")
OPENING = ((LocalClient, "__init__"),)
WORK = (
    (LocalClient, "next_message"),
    (LocalClient, "take"),
    (GlobalModel, "receive"),
    (GlobalModel, "changes"),
    (Pieces, "load"),
)


class Stopwatch:
    """Time spent inside some methods.

    Attributes:
        seconds: on the wall.
        cpu: CPU seconds of the process.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.cpu = 0.0

    @contextmanager
    def on(self, *methods: tuple[type, str]) -> Iterator[None]:
        """Count the calls of these methods, which must not call one another."""
        with ExitStack() as patches:
            for owner, name in methods:
                patches.enter_context(mock.patch.object(owner, name, self._timed(getattr(owner, name))))
            yield

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started, cpu = time.perf_counter(), time.process_time()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - started
                self.cpu += time.process_time() - cpu

        return timed


def configuration(model: Path, clients: int, rounds: int, folder: Path, **more: Any) -> Config:
    """Every client prunes all blocks on eight windows of one of the bundled texts; `more` are other keys."""
    raw = {
        "run_dir": str(folder / "run"),
        "model": {"path": str(model), "dtype": "float32"},
        "server_configs": {"num_clients": clients, "num_global_epochs": rounds},
        "client_configs": {
            "train_configs": {"threads": 1, "device": "cpu"},
            "data": {"windows": 8, "length": 64, "batch": 8},
        },
        "clients": [
            {"client_id": f"client-{n}", "data": {"text": str(DEMO / "text" / TEXTS[n % len(TEXTS)] / "calib.txt")}}
            for n in range(clients)
        ],
        **more,
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(raw))
    config, problems = load_config(file)
    if problems:
        raise ValueError("; ".join(problems))
    return config


def run(model: Path, clients: int, rounds: int, folder: Path) -> dict[str, float]:
    """Run it and measure from when all clients have their agents, the last thing before the rounds, to the end."""
    folder.mkdir(parents=True, exist_ok=True)
    config = configuration(model, clients, rounds, folder)
    registration.register()
    opening, work, before = Stopwatch(), Stopwatch(), {}

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "ready":
            memory.reset_peak()
            before.update(wall=time.perf_counter() - opening.seconds, cpu=time.process_time() - opening.cpu)

    with opening.on(*OPENING), work.on(*WORK):
        serial.run(config, folder / "state", on_event)
    return {
        "seconds": time.perf_counter() - before["wall"] - opening.seconds,
        "cpu": time.process_time() - before["cpu"] - opening.cpu,
        "work": work.seconds,
        "peak": memory.peak(),
    }


def main() -> None:
    model, clients, rounds, folder = sys.argv[1:]
    torch.set_num_threads(1)
    print(json.dumps(run(Path(model), int(clients), int(rounds), Path(folder))))


if __name__ == "__main__":
    main()
