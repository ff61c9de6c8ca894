"""A short run of the fuzzer (`make fuzz`), and whether it would see a fault."""

import time

import pytest

from fedspallm_appfl.errors import ConfigError, UpdateError
from fedspallm_appfl.rounds.server import GlobalModel
from helpers.fuzz import files, harness, uploads
from helpers.fuzz.targets import attempts

TARGETS = dict(attempts())
DRAWN = ("text", "override")  # what is not changed is drawn too, and may be wrong


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_from_outside_breaks_a_rule(name):
    tally = harness.Tally()
    for seed in range(2 if name.startswith(("upload", "run directory")) else 6):
        harness.run_case(tally, name, TARGETS[name], seed)
    assert tally.faults == {}


@pytest.mark.parametrize("name", [name for name in TARGETS if name not in DRAWN and "upload " not in name])
def test_what_is_not_changed_is_taken(monkeypatch, name):
    """Else no case would come further than the first check; honest uploads are in every case."""
    for module in (files, uploads):
        monkeypatch.setattr(module, "changed", lambda value, dice: (value, ()))
    monkeypatch.setattr(files, "changed_text", lambda text, dice: text)
    monkeypatch.setattr(uploads, "flipped", lambda data, dice: data)
    tally = harness.Tally()
    harness.run_case(tally, name, TARGETS[name], 0)
    assert tally.counts == {"taken": 1}


def looked_at(attempt):
    tally = harness.Tally()
    harness.run_case(tally, "x", attempt, 0)
    return tally


def busy(dice):
    while True:
        pass


def large(dice):
    assert len(bytearray(b"x") * (harness.MOST_BYTES + 2**24))


def refused(dice):
    raise ConfigError("no")


def foreign(dice):
    raise KeyError("no")


def test_hangs_memory_and_foreign_errors_are_faults(monkeypatch):
    assert looked_at(refused).counts == {"refused": 1}
    assert looked_at(lambda dice: time.sleep(0)).counts == {"taken": 1}
    assert [place.split(" at ")[0] for place in looked_at(foreign).faults] == ["KeyError"]
    with monkeypatch.context() as patch:  # of the busy case alone: others take CPU time too
        patch.setattr(harness, "CPU_SECONDS", 0.2)
        assert [place.split(" at ")[0] for place in looked_at(busy).faults] == ["Hang"]
    if harness._peak(reset=True):
        assert list(looked_at(large).faults) == ["memory"]


@pytest.mark.parametrize("broken", ["names nobody", "takes all", "folds a part"])
def test_a_server_that_breaks_a_rule_is_seen(monkeypatch, broken):
    receive = GlobalModel.receive

    def worse(model, client, update, samples):
        try:
            return receive(model, client, update, samples)
        except UpdateError as error:
            if broken == "takes all":
                raise KeyError(client) from error
            if broken == "folds a part":
                model._received.add((client, 0, "q"))
                raise
            raise UpdateError("no") from error

    monkeypatch.setattr(GlobalModel, "receive", worse)
    name = "upload fedspallm weights sparsegpt"
    tally = harness.Tally()
    for seed in range(6):
        harness.run_case(tally, name, TARGETS[name], seed)
    assert tally.faults
