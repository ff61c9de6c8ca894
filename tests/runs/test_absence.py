"""A client that fails ends the run, or is left out of the round where the configuration says how few may take part."""

import json
from dataclasses import replace

import pytest

from fedspallm_appfl.adaptors.aggregator import FedSpaLLMAggregator
from fedspallm_appfl.api import prepared
from fedspallm_appfl.cli.checked import well_formed
from fedspallm_appfl.errors import DataError, FederationError, PruningError, UpdateError
from fedspallm_appfl.rounds.client import LocalClient
from fedspallm_appfl.runs import experiment, serial
from helpers.tiny import events, save_tiny, tiny_config, weights


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def go(file, resume=False):
    experiment.conduct(prepared(well_formed(str(file), []), False), serial.run, False, resume=resume)
    return file.parent / "run"


def failing(monkeypatch, error, client="bible", round_index=0, number=1):
    """A client that raises at a message."""
    make = LocalClient.next_message

    def next_message(self):
        now = self._progress
        if (self.settings.client_id, now.round_index, now.next_message) == (client, round_index, number):
            raise error
        return make(self)

    monkeypatch.setattr(LocalClient, "next_message", next_message)


def absences(run):
    return {(event["round"], event["client"]): event["why"] for event in events(run, "absent")}


@pytest.mark.parametrize("error", [PruningError("client bible, block 1, up: no"), RuntimeError("out of memory")])
@pytest.mark.parametrize("algorithm", ["fedspallm", "consensus", "gram"])
def test_the_others_go_on_where_so_few_may_take_part(tmp_path, tiny_model, monkeypatch, algorithm, error):
    rounds = {"min_clients": 2, "num_global_epochs": 2}
    each = {"comm_configs": {"blocks_per_message": 1}}
    file = tiny_config(tmp_path, tiny_model, algorithm, 3, server_configs=rounds, client_configs=each)
    failing(monkeypatch, error)
    run = go(file)
    [(where, why)] = absences(run).items()
    assert where == (0, "bible") and str(error) in why
    senders = {event["block"]: event["clients"] for event in events(run, "block") if event["round"] == 0}
    assert "bible" in senders[0] and "bible" not in senders[2]  # what it had sent counts
    again = {event["block"]: event["clients"] for event in events(run, "block") if event["round"] == 1}
    assert again == dict.fromkeys(range(3), ["austen", "bible", "csource"])
    assert "bible" in (run / "report.md").read_text()
    assert json.loads((run / "manifest.json").read_text())["sparsity"] == pytest.approx(0.5, abs=1e-3)


def test_one_that_cannot_begin_is_as_if_it_were_not_there(tmp_path, tiny_model, monkeypatch):
    file = tiny_config(tmp_path / "three", tiny_model, "fedspallm", 3, server_configs={"min_clients": 2})
    failing(monkeypatch, PruningError("no"), client="csource", number=0)
    alone = go(tiny_config(tmp_path / "two", tiny_model, "fedspallm", 2))
    three, two = weights(go(file)), weights(alone)
    assert three.keys() == two.keys()
    assert all((three[name] == two[name]).all() for name in two)


def closed(monkeypatch, client, is_closed):
    """A client that cannot be opened while something holds."""
    begin = LocalClient.__init__

    def init(self, settings, *others):
        if settings.client_id == client and is_closed():
            raise DataError(f"client {client}: its text is gone")
        begin(self, settings, *others)

    monkeypatch.setattr(LocalClient, "__init__", init)


@pytest.mark.parametrize("alone", [True, False])
def test_one_that_missed_what_was_agreed_on_does_not_come_back_without_it(tmp_path, tiny_model, monkeypatch, alone):
    """In a process with others it finds what they have stored; by itself it waits until all of it is replaced."""
    rounds = {"min_clients": 2, "num_global_epochs": 3}
    file = tiny_config(tmp_path, tiny_model, "fedspallm", 3, server_configs=rounds)
    begun = []
    monkeypatch.setattr(LocalClient, "start_exchange", spied(LocalClient.start_exchange, begun))
    closed(monkeypatch, "bible", lambda: (1, "austen") not in begun)
    if alone:
        settings = serial.client_settings
        apart = lambda config, client, *others: replace(settings(config, client, *others), agreed=None)  # noqa: E731
        monkeypatch.setattr(serial, "client_settings", apart)
    why = absences(go(file))
    assert why[0, "bible"] == "client bible: its text is gone"
    assert (1, "bible") in why if alone else (1, "bible") not in why
    assert not alone or "could not be opened when the server sent what was agreed on of blocks 0-2" in why[1, "bible"]
    assert (2, "bible") not in why


def spied(start, begun):
    def start_exchange(self, round_index, *others):
        begun.append((round_index, self.settings.client_id))
        return start(self, round_index, *others)

    return start_exchange


def test_a_run_goes_on_without_one_that_cannot_be_opened_any_more(tmp_path, tiny_model, monkeypatch):
    rounds = {"min_clients": 2, "num_global_epochs": 2}
    file = tiny_config(tmp_path, tiny_model, "fedspallm", 3, server_configs=rounds)
    with monkeypatch.context() as patch:
        failing(patch, KeyboardInterrupt(), "csource", 1, 0)
        with pytest.raises(KeyboardInterrupt):
            go(file)
    closed(monkeypatch, "bible", lambda: True)
    run = go(file, resume=True)
    assert absences(run)[1, "bible"] == "client bible: its text is gone"
    assert {tuple(event["clients"]) for event in events(run, "block") if event["round"] == 1} == {("austen", "csource")}


def test_an_upload_that_is_refused_is_a_failure_of_its_client(tmp_path, tiny_model, monkeypatch):
    receive = FedSpaLLMAggregator.receive

    def refusing(self, client, update, metadata):
        if client == "austen" and metadata["_chunk_idx"] == 2:
            raise UpdateError("refused an update from client austen: no")
        return receive(self, client, update, metadata)

    monkeypatch.setattr(FedSpaLLMAggregator, "receive", refusing)
    run = go(tiny_config(tmp_path, tiny_model, "fedspallm", 3, server_configs={"min_clients": 1}))
    assert absences(run) == {(0, "austen"): "refused an update from client austen: no"}


@pytest.mark.parametrize(("least", "error"), [(None, PruningError), (3, FederationError)])
def test_it_ends_the_run_where_it_is_needed(tmp_path, tiny_model, monkeypatch, least, error):
    file = tiny_config(tmp_path, tiny_model, "fedspallm", 3, server_configs={"min_clients": least})
    failing(monkeypatch, PruningError("client bible, block 1, up: no"))
    with pytest.raises(error, match="client bible, block 1, up: no"):
        go(file)
