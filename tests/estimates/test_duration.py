"""Seconds that follow from steps that were timed: by hand, with steps that take what is said here."""

import dataclasses

import pytest
import torch

from fedspallm_appfl.estimates import duration
from fedspallm_appfl.estimates.duration import Machine, _beyond, _grown, _passes, _shares_before, _timed
from fedspallm_appfl.estimates.job import Job
from fedspallm_appfl.estimates.tables import _time
from fedspallm_appfl.settings.reading import load_config
from helpers.outlines import MODEL, client, experiment, job
from helpers.paths import ROOT


@pytest.fixture
def steady(monkeypatch):
    """A machine whose every step takes a second, so that a pass takes 1 / tokens of it and rates are operations."""
    monkeypatch.setattr(Machine, "_seconds", lambda machine, step: (step(), 1.0)[1])


def demo(*settings):
    return Job.of(load_config(ROOT / "configs" / "demo.yaml", ["evaluation.compare=[]", *settings])[0])


@pytest.mark.parametrize("seconds", [lambda side: 3e-9 * side**2, lambda side: 2e-9 * side**2 + 5e-12 * side**3])
def test_squares_and_cubes_are_continued(seconds):
    timed = {side: seconds(side) for side in (64, 128, 256)}
    for side in (64, 128, 256, 1024, 4096):
        assert _grown(timed, side) == pytest.approx(seconds(side))


def test_between_two_sides_time_grows_by_a_power():
    timed = {64: 1.0, 128: 8.0, 256: 16.0}
    assert _grown(timed, 64 * 2**0.5) == pytest.approx(8**0.5)
    assert _grown(timed, 32) == 1.0


def test_noise_cannot_make_larger_matrices_faster_or_grow_beyond_cubes():
    assert _beyond({64: 4.0, 128: 1.0}, (64, 128), 256) == pytest.approx(4.0)
    assert _beyond({64: 0.001, 128: 1.0}, (64, 128), 256) == pytest.approx(8.0)


def test_linears_that_run_before_an_input_by_hand():
    assert _shares_before(job(experiment()), 0) == [0, 16 / 96, 32 / 96, 64 / 96]


@pytest.mark.parametrize(
    ("settings", "at_last", "amid", "unassigned"),
    [
        ({}, 64 / 96, 1 + 64 / 96, 1),
        ({"pruner": "wanda"}, 64 / 96, 1 + 64 / 96, 1),
        ({"pruner": "magnitude"}, 0, 1, 1),
        ({"algorithm": "gram"}, 64 / 96, 1, 1),
        ({"algorithm": "gram", "propagate": "pruned"}, 112 / 96, 1 + 112 / 96, 1),
        ({"algorithm": "gram", "propagate": "pruned", "target": "dense"}, 224 / 96, 2 + 224 / 96, 2),
        ({"algorithm": "gram", "propagate": "pruned", "stride": 1}, 64 / 96, 1 + 64 / 96, 1),
        ({"algorithm": "gram", "propagate": "pruned", "stride": 2}, 64 / 96, 1, 1),
    ],
)
def test_passes_by_hand(settings, at_last, amid, unassigned):
    """The last assigned block, one before it, and one that is not assigned."""
    made, one = job(experiment(**settings)), client(**settings)
    found = [_passes(made, one, 0, blocks) for blocks in ({0}, {0, 1}, {1})]
    assert found == pytest.approx([at_last, amid, unassigned])


def test_time_grows_with_windows_rounds_and_blocks(steady):
    def seconds(*settings):
        return duration.durations(demo(*settings)).clients["austen"]

    once = seconds()
    assert seconds("server_configs.num_global_epochs=3") == pytest.approx(3 * once)
    assert once < seconds("client_configs.data.windows=64") < 2 * once  # pruning takes what it took
    share = ("client_configs.train_configs.resource_share=0.5", "client_configs.train_configs.layer_sampling=uniform")
    assert seconds(*share) < once


def test_the_server_prunes_only_what_is_gathered(steady):
    found = duration.durations(demo())
    assert found.server == 0
    gathered = duration.durations(demo("algorithm=gram"))
    assert gathered.server > 0
    assert all(gathered.clients[name] < found.clients[name] for name in found.clients)


def test_clients_of_the_same_pruner_share_what_is_timed(steady, monkeypatch):
    made = []
    monkeypatch.setattr(Machine, "_widest", property(lambda machine: made.append(machine) or 64))
    opened = demo("clients.0.train_configs.resource_share=0.5", "clients.1.train_configs.pruner=wanda")
    duration.durations(opened)
    assert len(set(map(id, made))) == 2


def test_a_step_that_sleeps_has_not_worked():
    assert _timed(lambda: __import__("time").sleep(0.2)) < 0.1


def test_a_pass_without_weights_runs_in_the_models_arithmetic():
    opened = demo()
    for dtype in (torch.float32, torch.bfloat16):
        outline = dataclasses.replace(opened.model, arithmetic=dtype)
        assert duration._Pass(Job(opened.config, outline), 2, 8)._state.hidden[0].dtype == dtype


@pytest.mark.parametrize("server", [0.0, 4000.0])
def test_what_is_said_of_it_fits_a_line(server):
    found = duration.Durations({"a": 5000.0, "b": 5000.0}, server)
    [line] = _time(job(experiment(), MODEL), found)
    assert "rounds on this CPU: 83 min a client, 2 h 47 min for all" in line
    assert ("67 min for the server" in line) == bool(server)
    assert line.endswith("runs took 0.5 to 2 times that")
    assert len(line) <= (109 if server else 102)
