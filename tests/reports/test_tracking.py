"""Trackers get the measurements of a run under the names of metrics.jsonl, and none of them can end it."""

import os
import sys
from pathlib import Path

import pytest

from fedspallm_appfl.errors import extra
from fedspallm_appfl.events import EventLog
from fedspallm_appfl.reports.tracking.numbers import numbers
from fedspallm_appfl.reports.tracking.observer import Trackers
from fedspallm_appfl.reports.tracking.registry import TRACKERS
from fedspallm_appfl.settings import rules, schema
from fedspallm_appfl.settings.schema import Client, Config
from helpers import tiny

EVENTS = [
    {"event": "upload", "client": "ann", "round": 0, "bytes": 7, "seconds": 0.5, "block_bytes": {"0": 7}},
    {"event": "block", "round": 0, "block": 0, "clients": ["ann"], "zeros": 12},
    {"event": "evaluation", "method": "dense", "of": [1, 1], "perplexity": {"law": 2.5, "a text: 2%": 8.0}},
]
NAMES = ["upload/bytes/ann", "upload/seconds/ann", "block/zeros", "evaluation/perplexity/law/dense"]
NAMES.append("evaluation/perplexity/a text: 2%/dense")


class Double:
    """Records what it gets, and fails at a name that it was told."""

    made: list["Double"] = []
    fails_at = ""

    def __init__(self, folder, name, facts):
        self.folder, self.name, self.facts, self.values, self.closed = folder, name, facts, {}, []
        Double.made.append(self)

    def log(self, values, step):
        if any(name.startswith(self.fails_at) for name in values if self.fails_at):
            raise OSError("the server is away\nand much advice")
        self.values |= {name: (value, step) for name, value in values.items()}

    def close(self, failed):
        self.closed.append(failed)


class Failing(Double):
    fails_at = "upload/bytes/bible"


class Unmade:
    def __init__(self, *told):
        raise RuntimeError("no login")


@pytest.fixture
def doubles(monkeypatch):
    """Doubles in the place of all libraries, which need not be installed."""
    monkeypatch.setattr(Double, "made", [])
    for name, double in (("tensorboard", Double), ("mlflow", Failing), ("wandb", Unmade)):
        monkeypatch.setitem(TRACKERS, name, double)
        monkeypatch.setitem(schema.TRACKERS, name, ())
    return Double.made


def test_trackers_get_a_run_and_one_that_fails_is_told_of_once(doubles, tmp_path, capsys):
    model = tiny.save_tiny(tmp_path / "model")
    file = tiny.tiny_config(tmp_path, model, "fedprllm", count=2, tracking=["tensorboard", "mlflow", "wandb"])
    folder = tiny.run(file, "workers=1", "client_configs.train_configs.pruner=magnitude")
    whole, failing = doubles
    log = EventLog(folder / "metrics.jsonl")
    expected = {
        name: (value, round(1000 * event["time"])) for event in log.events for name, value in numbers(event).items()
    }
    assert whole.values == expected and "upload/bytes/austen" in expected and "round/bytes_down" in expected
    assert (whole.folder, whole.name, whole.closed) == (folder / "tracking" / "tensorboard", "run", [False])
    facts = {"model": "model", "algorithm": "fedprllm", "pruner": "magnitude", "sparsity": "0.5"}
    assert whole.facts == facts | {"seed": "0", "clients": "2"}
    assert not any(name.endswith("bible") for name in failing.values) and failing.closed == []
    told = [event["text"] for event in log.of("notice")]
    assert told == [
        "tracking: wandb failed and gets nothing more of this run (RuntimeError: no login)",
        "tracking: mlflow failed and gets nothing more of this run (OSError: the server is away)",
    ]
    assert all(text in capsys.readouterr().out for text in told[:1])
    assert told[1] in (folder / "report.md").read_text("utf-8")


def test_an_unknown_tracker_and_one_that_is_not_installed_are_refused(monkeypatch):
    monkeypatch.setattr(rules, "find_spec", lambda name: None if name == "sqlalchemy" else name)
    config = Config(tracking=["tensorboard", "mlflow", "comet"])
    assert [problem for problem in rules.check(config) if problem.startswith("tracking")] == [
        f"tracking: mlflow needs sqlalchemy; leave it out, or {extra('mlflow')}",
        "tracking: one of tensorboard, mlflow, wandb; got 'comet'",
    ]


@pytest.fixture
def tracked(tmp_path, monkeypatch):
    """Hand events to a tracker twice, as a run that fails and goes on; gives its folder."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)

    def tracked(name):
        config = Config(tracking=[name], clients=[Client(client_id="ann")])
        told = []
        for begun, last in ((0.0, "failed"), (10.0, "end")):
            trackers = Trackers()
            trackers.begin(config, tmp_path / "run", told.append)
            for number, event in enumerate([*EVENTS, {"event": last}]):
                trackers({**event, "time": begun + number})
        assert told == []
        assert [one.name for one in tmp_path.iterdir()] == ["run"]
        return tmp_path / "run" / "tracking" / name

    return tracked


def test_tensorboard_shows_both_starts_as_one(tracked):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(tracked("tensorboard"))).Reload()
    assert sorted(read.Tags()["scalars"]) == sorted(NAMES)
    assert [(one.step, one.value) for one in read.Scalars("upload/bytes/ann")] == [(0, 7.0), (10_000, 7.0)]


def test_mlflow_has_one_run_with_both_starts(tracked):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    client = mlflow.MlflowClient(f"sqlite:///{tracked('mlflow') / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("fedspallm")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["algorithm"] == "fedspallm"
    assert sorted(run.data.metrics) == sorted(name.replace(":", "_").replace("%", "_") for name in NAMES)
    history = client.get_metric_history(run.info.run_id, "block/zeros")
    assert [(one.step, one.value) for one in history] == [(1000, 12.0), (11_000, 12.0)]


def test_wandb_writes_files_for_both_starts_under_one_id(tracked):
    wandb = pytest.importorskip("wandb")
    folder = tracked("wandb")
    wandb.teardown()  # its process writes the last bytes when it ends
    runs = sorted(folder.glob("offline-run-*/run-*.wandb"))
    name = (folder / "run_id").read_text()
    assert [file.name for file in runs] == [f"run-{name}.wandb"] * 2
    for file in runs:
        content = file.read_bytes()
        assert [one for one in NAMES if one.encode() not in content] == []
        assert not any(word in content for word in (Path(sys.executable).parent.as_posix().encode(), b"requirements"))
