"""Clients and evaluation in worker processes: the same bits as in one process, and an end of all when one fails."""

import os
import signal
import socket
import sys
import tempfile
import time
from concurrent.futures import wait
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedspallm_appfl.api import prepared
from fedspallm_appfl.cli import main
from fedspallm_appfl.cli.checked import well_formed
from fedspallm_appfl.errors import ConfigError, FederationError, PruningError
from fedspallm_appfl.estimates import processes
from fedspallm_appfl.estimates.job import Job
from fedspallm_appfl.recovery import training
from fedspallm_appfl.runs import experiment, serial
from fedspallm_appfl.runs.processes import ALONE, Workers, result
from fedspallm_appfl.runs.workers import _Desks, _listening
from fedspallm_appfl.settings import plugins
from helpers.experiments import UNEVEN, small_config
from helpers.knife import Cut
from helpers.paths import ROOT
from helpers.processes import LIMIT, finish, start
from helpers.tiny import events, save_tiny, tiny_config

RIA = {
    "plugins": [str(ROOT / "examples/plugins/ria.py")],
    "client_configs": {"train_configs": {"pruner": "ria"}},
}
KINDS = {
    "blocks and recovery": (
        "gram",
        {"gram": {"propagate": "pruned", "stride": 2}, "recovery": {"rounds": 2, "steps": 2, "rank": 2}},
    ),
    "secure sums": ("gram", {"server_configs": {"secure_sums": True}, "recovery": {"rounds": 1, "steps": 2}}),
    "own pruner": ("fedspallm", RIA),
}
FAILING = """
import fedspallm_appfl as fs

@fs.pruner("failing", needs=fs.InputNorms, keeps_weights=True)
def failing(weight, target, inputs):
    raise RuntimeError("no more memory")
"""


@pytest.fixture(scope="module")
def pair():
    with Workers(2) as both:
        yield both


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def conduct(file, among, **changed):
    config = prepared(well_formed(str(file), [f"{key}={value}" for key, value in changed.items()]), False)
    plugins.load(config.plugins)
    experiment.conduct(config, partial(serial.run, among=among), False, among=among)
    return Path(config.run_dir)


def configured(folder, model, kind):
    if kind == "uneven":
        folder.mkdir()
        return small_config(folder, 3, **{"server_configs": UNEVEN["server_configs"]}, clients=UNEVEN["clients"][:3])
    algorithm, changes = KINDS[kind]
    return tiny_config(folder, model, algorithm, **changes)


@pytest.mark.parametrize("kind", ["uneven", *KINDS])
def test_workers_give_the_bits_of_one_process(tmp_path, tiny_model, pair, kind, monkeypatch):
    file = configured(tmp_path / "of", tiny_model, kind)
    (tmp_path / "every_step.py").write_text("from fedspallm_appfl.recovery import training\ntraining.NEWS = 0\n")
    monkeypatch.setattr(training, "NEWS", training.NEWS)  # as it is again afterwards
    often = [str(tmp_path / "every_step.py")] if "recovery" in kind else []
    told = {"plugins": often} if often else {}
    alone, shared = (conduct(file, among, run_dir=tmp_path / str(among.count), **told) for among in (ALONE, pair))
    for name in ("model/model.safetensors", "manifest.json"):
        assert (alone / name).read_bytes() == (shared / name).read_bytes()
    for kind in ("evaluation", "measured"):
        here, there = ([event | {"time": 0} for event in events(run, kind)] for run in (alone, shared))
        assert sorted(map(str, here)) == sorted(map(str, there))
    assert [place["rank"] for place in events(shared, "place")] == [1, 2]
    for run in (alone, shared) if often else ():
        assert sorted((one["turn"], one["step"], one["of"]) for one in events(run, "step")) == [
            (turn, step, 2) for turn in (0, 1) for step in (0, 1) for _ in events(run, "start")[0]["clients"]
        ]


def test_a_client_that_fails_in_a_worker_ends_the_run_or_is_left_out(tmp_path, tiny_model, pair):
    (tmp_path / "failing.py").write_text(FAILING)
    changes = {"plugins": [str(tmp_path / "failing.py")]}
    file = tiny_config(tmp_path / "of", tiny_model, "fedspallm", 3, **changes)
    with pytest.raises(PruningError, match="client bible, block 0, self_attn.q_proj: .* no more memory"):
        conduct(file, pair, **{"clients.1.train_configs.pruner": "failing", "run_dir": tmp_path / "ends"})
    spared = {"server_configs.min_clients": 2, "clients.1.train_configs.pruner": "failing"}
    run = conduct(file, pair, run_dir=tmp_path / "spared", **spared)
    [absent] = events(run, "absent")
    assert absent["client"] == "bible" and "no more memory" in absent["why"]


OPENING = """
from pathlib import Path
from fedspallm_appfl.errors import DataError
from fedspallm_appfl.rounds.client import LocalClient

begin = LocalClient.__init__

def init(self, settings, *others):
    if settings.client_id == "bible" and Path(__file__).with_name("gone").exists():
        raise DataError("client bible: its text is gone")
    begin(self, settings, *others)

LocalClient.__init__ = init
"""


def test_a_run_goes_on_without_one_that_cannot_be_opened_any_more(tmp_path):
    """Others in its process send more blocks than may be open at a time."""
    (tmp_path / "opening.py").write_text(OPENING)
    rounds, each = {"min_clients": 2, "num_global_epochs": 2}, {"comm_configs": {"blocks_per_message": 1}}
    changes = {"server_configs": rounds, "client_configs": each, "plugins": [str(tmp_path / "opening.py")]}
    file = tiny_config(tmp_path / "of", save_tiny(tmp_path / "deep", blocks=5), "fedspallm", 4, **changes)
    config = prepared(well_formed(str(file), ["workers=2"]), False)

    def cut(event):
        if event["event"] == "upload" and event["round"] == 1:
            raise Cut

    with Workers(2) as both, pytest.raises(Cut):
        experiment.conduct(config, partial(serial.run, among=both), False, cut, among=both)
    (tmp_path / "gone").touch()
    with Workers(2) as both:
        experiment.conduct(config, partial(serial.run, among=both), False, resume=True, among=both)
    [absent] = events(Path(config.run_dir), "absent")
    assert (absent["round"], absent["client"], absent["why"]) == (1, "bible", "client bible: its text is gone")


def children(pid):
    """Process ids of all processes below one."""
    below = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, parent = status.parent.name, status.read_text().rpartition(")")[2].split()[1]
        except OSError:  # it has ended
            continue
        if parent == str(pid):
            below += [int(name), *children(name)]
    return below


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("sent", "code", "words"),
    [(signal.SIGKILL, -9, ""), (signal.SIGINT, 130, "goes on with it"), (None, 2, "ended from outside")],
)
def test_all_processes_end_with_the_run_and_the_run_with_one_of_them(tmp_path, sent, code, words):
    lasts = {"client_configs": {"data": {"windows": 8, "length": 128}}, "server_configs": {"num_global_epochs": 100}}
    run = start(sys.executable, "-m", "fedspallm_appfl", "run", small_config(tmp_path, 2, workers=2, **lasts))
    metrics, until = tmp_path / "run" / "metrics.jsonl", time.monotonic() + LIMIT
    while not (metrics.exists() and '"upload"' in metrics.read_text()):
        assert time.monotonic() < until and run.poll() is None, finish(run)
        time.sleep(0.1)
    below = children(run.pid)
    if sent is None:
        workers = [pid for pid in below if b"popen_loky" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(workers[-1], signal.SIGKILL)
    else:
        run.send_signal(sent)
    ended, _, err = finish(run, 60)
    assert ended == code and words in err, err
    until = time.monotonic() + 20
    while any(map(alive, below)):
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.parametrize("sent", [b"", b"\0\0", b"\0\0\0\x10half"])
def test_a_worker_that_is_killed_within_a_message_is_closed(sent):
    with _listening() as (listener, address), _Desks(SimpleNamespace(aggregator=None), listener) as desks:
        with socket.socket(socket.AF_UNIX) as worker:
            worker.connect(address)
            worker.send(sent)
            desks.take()
            assert desks.is_open
        desks.take()
        assert not desks.is_open


def test_a_task_returns_and_raises_as_here_and_gets_its_share_of_cores(pair):
    assert result(pair.submit(2, max, 3, 4), "a test") == 4
    with pytest.raises(ValueError, match="no luck"):
        result(pair.submit(2, int, "no luck"), "a test")
    with Workers(2) as both, pytest.raises(FederationError, match="while it worked for a test"):
        result(both.submit(1, os.abort), "a test")
    with Workers(2) as both:
        wait([both.submit(1, os.abort)])
        with pytest.raises(FederationError, match="ended from outside before it had work"):
            both.submit(1, max, 3, 4)


def test_auto_is_as_many_as_are_worth_their_start_and_fit(tmp_path, tiny_model, monkeypatch):
    config = prepared(well_formed(str(tiny_config(tmp_path, tiny_model, "fedspallm", 3)), []), False)
    job = Job.of(config)
    assert processes.settled(config).workers == "1"  # of so little work
    monkeypatch.setattr(processes, "WORTH", 1.0)
    monkeypatch.setattr(processes, "cores", lambda: 64)
    most = max(3, 2 * len(config.evaluation.texts))
    assert processes.settled(config).workers == str(most)
    monkeypatch.setattr(processes, "proc_bytes", lambda *_: int(3.5 * processes.PACKAGES / processes.SHARE))
    assert processes.settled(config).workers == "3"
    monkeypatch.setattr(processes, "proc_bytes", lambda *_: 0)
    assert processes.settled(config).workers == "1" and job.clients


def test_what_only_this_process_knows_is_not_sent_to_others(tmp_path, tiny_model, monkeypatch):
    config = prepared(well_formed(str(tiny_config(tmp_path, tiny_model, "fedspallm", 3)), ["workers=2"]), False)
    monkeypatch.setattr(plugins, "ADDED", {"mine"})
    with pytest.raises(ConfigError, match=r"workers: 2 processes cannot know mine"):
        processes.settled(config)


def test_a_folder_for_temporary_files_whose_name_leaves_no_room_for_a_socket(tmp_path, tiny_model, monkeypatch):
    long = tmp_path / ("long" * 30)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    file = tiny_config(tmp_path / "of", tiny_model, "fedspallm", 3)
    several, auto = (prepared(well_formed(str(file), [f"workers={workers}"]), False) for workers in ("2", "auto"))
    with pytest.raises(ConfigError, match=r"workers: 2 processes need a socket .*at most 75 bytes, got .*; set TMPDIR"):
        processes.settled(several)
    assert processes.settled(several, runs=2).workers == "2"  # each in one process
    monkeypatch.setattr(processes, "WORTH", 1.0)
    assert processes.settled(auto).workers == "1"


def test_a_wrong_number_is_refused(tmp_path, tiny_model, capsys):
    assert main(["validate", str(tiny_config(tmp_path, tiny_model, "fedspallm")), "workers=0"]) == 2
    assert "workers: auto, or a number of processes from 1 to 9999; got '0'" in capsys.readouterr().err
