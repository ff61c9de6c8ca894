"""A run that is cut off at any moment and goes on ends with the model of one that was not."""

import errno
import os
import random
import sys
from functools import partial
from pathlib import Path

import pytest

from fedspallm_appfl import events
from fedspallm_appfl.api import prepared
from fedspallm_appfl.cli import main
from fedspallm_appfl.cli.checked import well_formed
from fedspallm_appfl.errors import ConfigError, ModelError
from fedspallm_appfl.recovery import training
from fedspallm_appfl.rounds import checkpoint
from fedspallm_appfl.rounds.folds.changes import DeltaFold
from fedspallm_appfl.rounds.hidden.folds import HiddenDeltas
from fedspallm_appfl.rounds.journal import Journal
from fedspallm_appfl.runs import experiment, rank, run_dir, serial
from helpers.experiments import DOMAINS, first_pages
from helpers.knife import Cut, Knife
from helpers.paths import TESTS
from helpers.processes import ENVIRONMENT, finish, start
from helpers.tiny import save_tiny, tiny_config

SHARES = [
    {"client_id": name, "data": {"text": str(first_pages(name))}, "train_configs": {"resource_share": share}}
    for name, share in zip(DOMAINS[:3], (1.0, 0.7, 0.4), strict=True)
]
ROUNDS = {"num_global_epochs": 2, "aggregator_kwargs": {"fold": "cumulative"}}
RECOVERY = {"rounds": 2, "steps": 2, "batch": 4}
CASES = {
    "rounds with sums kept": ("fedspallm", {"clients": SHARES, "server_configs": ROUNDS}),
    "two exchanges, then recovery": ("consensus", {"recovery": RECOVERY}),
    "sums kept of statistics": ("gram", {"server_configs": ROUNDS, "gram": {"precision": "fp32"}}),
    "a sweep": ("gram", {"gram": {"propagate": "pruned"}}),
    "a sweep by blocks": ("gram", {"gram": {"propagate": "pruned", "stride": 2}}),
    "models apart": ("standalone", {}),
    "secure sums": ("consensus", {"server_configs": {"secure_sums": True}, "recovery": {**RECOVERY, "rank": 2}}),
    "secure sums of statistics": ("gram", {"server_configs": {"secure_sums": True, "num_global_epochs": 2}}),
    "targets that are chosen": (
        "gram",
        {"allocation": {"method": "fisher", "windows": 4, "length": 32, "width": "0.2"}},
    ),
}


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def cut_off(*_):
    raise Cut


def go(file, resume=True):
    config = prepared(well_formed(str(file), []), False)
    experiment.conduct(config, serial.run, False, resume=resume)
    return config


def models(folder):
    files = [file for name in ("model", "models") for file in (folder / name).rglob("*.safetensors")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.mark.parametrize("case", CASES)
def test_it_ends_with_the_same_bits_wherever_it_was_cut_off(tmp_path, tiny_model, monkeypatch, case):
    algorithm, changes = CASES[case]
    texts = {"evaluation": {"texts": {"a": str(first_pages("bible"))}, "length": 24, "windows": 2}}
    shared = {"checkpoint_every": 1e-6} | texts | changes
    monkeypatch.setattr(checkpoint, "SHARE", 0)  # hidden states at every block: the moments are always the same
    knife, draw = Knife(monkeypatch.setattr), random.Random(case)
    whole = tiny_config(tmp_path / "whole", tiny_model, algorithm, **shared)
    knife.cut(None, lambda: go(whole))
    moments, expected = knife.count, models(whole.parent / "run")
    for number in range(2):
        file = tiny_config(tmp_path / str(number), tiny_model, algorithm, **shared)
        cut = [knife.cut(draw.randrange(1, moments), partial(go, file)) for _ in range(2)]  # the second may end first
        assert cut[0]
        assert (cut[1] and run_dir.is_cut_off(file.parent / "run")) or run_dir.finished(file.parent / "run")
        if not run_dir.finished(file.parent / "run"):
            go(file)
        assert models(file.parent / "run") == expected
        assert not (file.parent / "run" / "state").exists()
        log = events.EventLog(file.parent / "run" / "metrics.jsonl")
        blocks = [(event["round"], event["block"]) for event in log.of("block")]
        assert len(set(blocks)) == len(blocks)
        assert len(log.of("resumed")) >= 1
        assert {event["method"] for event in log.of("evaluation")} >= {"dense"}


@pytest.mark.parametrize(("hidden", "closing"), [(False, (DeltaFold, "close")), (True, (HiddenDeltas, "made"))])
def test_a_client_trains_once_in_a_round_of_recovery(tmp_path, tiny_model, monkeypatch, hidden, closing):
    """Also where a round of secure sums is begun anew, if the model that it begins with is the same."""
    changes = {"server_configs": {"secure_sums": hidden}, "recovery": {"rounds": 1, "steps": 2, "batch": 4}}
    file = tiny_config(tmp_path, tiny_model, "consensus", **changes)
    trained, train = [], training.train
    monkeypatch.setattr(training, "train", lambda *args: trained.append(args[4]) or train(*args))
    with monkeypatch.context() as patch:
        patch.setattr(*closing, cut_off)
        with pytest.raises(Cut):
            go(file)
    go(file)
    assert len(trained) == len(set(trained)) == 3


def test_another_configuration_or_version_does_not_go_on(tmp_path, tiny_model, monkeypatch):
    knife = Knife(monkeypatch.setattr)
    file = tiny_config(tmp_path, tiny_model, "fedspallm")
    assert knife.cut(40, lambda: go(file))
    with pytest.raises(
        ConfigError, match=r"exists and is not empty; give another run_dir, --resume to go on with it, or"
    ):
        go(file, resume=False)
    other = tiny_config(tmp_path, tiny_model, "fedspallm", seed=7)
    with pytest.raises(ConfigError, match=r"begun with another configuration.*: seed \(0 before, now 7\); use"):
        go(other)
    file = tiny_config(tmp_path, tiny_model, "fedspallm")
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "__version__", "99")
        for _ in range(2):
            with pytest.raises(ConfigError, match=r"begun by fedspallm_appfl 0.*, and this is 99"):
                go(file)
    go(file)  # with the version that began it
    other = tiny_config(tmp_path, tiny_model, "fedspallm", seed=7)
    with pytest.raises(ConfigError, match=r"begun with another configuration.*: seed \(0 before, now 7\)"):
        go(other)  # else the finished run would be taken for one with this seed


def test_a_run_goes_on_that_was_cut_off_while_it_wrote_what_was_pruned(tmp_path, tiny_model, monkeypatch):
    runs = [tiny_config(tmp_path / name, tiny_model, "gram", recovery=RECOVERY) for name in ("whole", "cut")]
    go(runs[0])
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "write_pruned", cut_off)
        with pytest.raises(Cut):
            go(runs[1])
    go(runs[1])
    whole, cut = (file.parent / "run" for file in runs)
    assert models(cut) == models(whole)
    assert {file.name for file in (cut / "statistics").iterdir()} == {
        file.name for file in (whole / "statistics").iterdir()
    }


def test_a_process_that_comes_when_all_rounds_are_done_ends():
    class Done:
        def get_global_model(self, **asked):
            return {}  # a payload without metadata

    rank.all_rounds(Done(), {}, sparing=False)


def test_a_signal_ends_it_as_ctrl_c_does_and_resume_goes_on(tmp_path, tiny_model, capsys):
    file = tiny_config(tmp_path, tiny_model, "fedspallm")
    folder = file.parent / "run"
    environment = ENVIRONMENT | {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    }
    for cut, *words in (("40:SIGTERM", "run", file), ("10:SIGUSR1", "resume", folder)):
        code, _, err = finish(start(sys.executable, "-m", "helpers.knife", cut, *words, env=environment))
        assert code == 143
        assert err.splitlines()[-3:-1] == [
            f"what was done stays in {folder}: fedspallm resume {folder} goes on with it; a run with another configuration "
            "begins anew, with --overwrite",
            f"ended by {cut.partition(':')[2]}",
        ]
        assert (folder / "state").is_dir() and not (folder / ".lock").exists()
    assert main(["resume", str(folder)]) == 0
    assert "The run was cut off and went on, 2 times." in (folder / "report.md").read_text()
    assert "going on where the run was cut off" in capsys.readouterr().out
    assert main(["resume", str(folder)]) == 0
    assert f"{folder} is finished" in capsys.readouterr().out.replace("\n", "")
    assert (folder / "model" / "model.safetensors").is_file()


def in_round_two(tmp_path, model, monkeypatch, algorithm="fedspallm"):
    """A run of two rounds that was cut off when one block of the second was finished."""
    file = tiny_config(tmp_path, model, algorithm, server_configs=ROUNDS)
    finish, done = Journal.finish, []

    def stops(self, block, record):
        finish(self, block, record)
        done.append(block)
        if len(done) == 4:
            raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "finish", stops)
        with pytest.raises(Cut):
            go(file)
    return file, file.parent / "run" / "state"


@pytest.mark.parametrize("lost", ["global/block-0002.safetensors", "sums", "position.json"])
def test_a_state_of_which_something_is_missing_is_named_and_not_gone_on_with(tmp_path, tiny_model, monkeypatch, lost):
    file, state = in_round_two(tmp_path, tiny_model, monkeypatch)
    place = state / lost
    for one in list(place.glob("0002*")) if place.is_dir() else [place]:
        one.unlink()
    with pytest.raises(ModelError, match=r"state is damaged: .*is missing.*; run the experiment again"):
        go(file)


def test_what_was_finished_is_forgotten_at_once(tmp_path, tiny_model, monkeypatch):
    whole = tiny_config(tmp_path / "whole", tiny_model, "fedspallm", server_configs=ROUNDS)
    go(whole)
    file, state = in_round_two(tmp_path / "cut", tiny_model, monkeypatch)
    left = state / "old" / "0000"
    left.mkdir(parents=True)
    (left / "global").mkdir()
    go(file)
    assert models(file.parent / "run") == models(whole.parent / "run")


def test_a_full_disk_is_said_in_a_line_and_the_run_goes_on_afterwards(tmp_path, tiny_model, monkeypatch, capsys):
    file = tiny_config(tmp_path, tiny_model, "fedspallm")
    write, count = Path.write_text, [0]

    def full(self, *args):
        count[0] += self.name.endswith(".partial")
        if count[0] == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        assert main(["run", str(file), "workers=1"]) == 2
    said = capsys.readouterr().err
    assert "cannot be written: No space left on device; make room, or make the folder writable\n" in said
    assert f"fedspallm resume {file.parent / 'run'} goes on with it" in said
    assert main(["resume", str(file.parent / "run")]) == 0
    assert run_dir.finished(file.parent / "run")


def test_a_finished_run_leaves_no_state_behind_once_it_was_asked_for_again(tmp_path, tiny_model):
    file = tiny_config(tmp_path, tiny_model, "fedspallm")
    go(file)
    (file.parent / "run" / "state" / "clients").mkdir(parents=True)
    assert main(["resume", str(file.parent / "run")]) == 0
    assert not (file.parent / "run" / "state").exists()
