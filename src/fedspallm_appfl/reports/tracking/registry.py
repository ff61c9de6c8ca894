"""The trackers that there are, each a small class, and its library, which is imported when a run begins."""

import os
import re
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

PROJECT = "fedspallm"  # of wandb, and the experiment of mlflow


class Tracker(Protocol):
    """Where the numbers of a run go. It is made with its folder, the name of the run and what is known of it."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take numbers; `step` is milliseconds of work."""

    def close(self, failed: bool) -> None:
        """The run has ended, well or not."""


class Tensorboard:
    """Files that `tensorboard --logdir` shows; a run that goes on adds one."""

    def __init__(self, folder: Path, name: str, facts: Mapping[str, str]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), flush_secs=10)
        for key, value in facts.items():
            self._writer.add_text(key, value)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take numbers."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        """Write what is left."""
        self._writer.close()


class Mlflow:
    """A run in the store that MLFLOW_TRACKING_URI names, or in a database in the folder."""

    def __init__(self, folder: Path, name: str, facts: Mapping[str, str]) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # a server that is away does not hold up the run
        import mlflow

        self._metric: Any = mlflow.entities.Metric
        there = os.environ.get("MLFLOW_TRACKING_URI")
        self._client: Any = mlflow.MlflowClient(there or f"sqlite:///{folder.absolute() / 'mlflow.db'}")
        self._run = _kept(folder, lambda: self._begun(name, facts, None if there else folder))
        self._client.update_run(self._run, status="RUNNING")

    def _begun(self, name: str, facts: Mapping[str, str], folder: Path | None) -> str:
        known = self._client.get_experiment_by_name(PROJECT)
        artifacts = (folder / "artifacts").absolute().as_uri() if folder else None
        experiment = known.experiment_id if known else self._client.create_experiment(PROJECT, artifacts)
        run = str(self._client.create_run(experiment, run_name=name).info.run_id)
        for key, value in facts.items():
            self._client.log_param(run, key, value)
        return run

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take numbers; mlflow allows fewer characters in their names."""
        now = int(1000 * time.time())
        found = [
            self._metric(re.sub(r"[^\w\-. /]", "_", name, flags=re.ASCII), value, now, step)
            for name, value in values.items()
        ]
        for first in range(0, len(found), 1000):  # it takes no more at once
            self._client.log_batch(self._run, metrics=found[first : first + 1000])

    def close(self, failed: bool) -> None:
        """Say how the run has ended."""
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


class Wandb:
    """Files for `wandb sync`, or a run at the service, where WANDB_MODE or WANDB_API_KEY is set."""

    def __init__(self, folder: Path, name: str, facts: Mapping[str, str]) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        mode: Any = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=name,
            config=dict(facts),
            dir=folder.parent,  # wandb adds its own folder
            id=_kept(folder, lambda: uuid.uuid4().hex[:8]),
            mode=mode,
            resume=None if mode == "offline" else "allow",
            reinit="create_new",
            settings=SETTINGS,
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take numbers."""
        self._run.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        """Send or write what is left."""
        self._run.finish(exit_code=int(failed))


SETTINGS = {  # of a run goes to wandb what it is told, nothing of the machine, the code and the terminal
    "silent": True,
    "console": "off",
    "init_timeout": 30,  # seconds; by itself it would wait for a service that is away without end
    "x_graphql_retry_max": 2,
    "x_file_stream_retry_max": 3,
    "x_file_transfer_retry_max": 3,
    "disable_code": True,
    "disable_git": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
}
TRACKERS: dict[str, Callable[[Path, str, Mapping[str, str]], Tracker]] = {
    "tensorboard": Tensorboard,
    "mlflow": Mlflow,
    "wandb": Wandb,
}


def _kept(folder: Path, make: Callable[[], str]) -> str:
    """The id of the run at the tracker: made once, and kept for when the run goes on."""
    file = folder / "run_id"
    if not file.is_file():
        file.write_text(make(), "utf-8")
    return file.read_text("utf-8")
