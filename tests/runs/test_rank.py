"""Messages that are made while the one before is on its way: the same run, also where a client fails or is refused."""

import pytest
import torch

from fedspallm_appfl.adaptors import registration
from fedspallm_appfl.adaptors.aggregator import FedSpaLLMAggregator
from fedspallm_appfl.adaptors.desk import Desk
from fedspallm_appfl.api import prepared
from fedspallm_appfl.cli.checked import well_formed
from fedspallm_appfl.errors import PruningError, UpdateError
from fedspallm_appfl.rounds.client import LocalClient, forget
from fedspallm_appfl.rounds.participants import client_settings, participants
from fedspallm_appfl.runs import experiment
from fedspallm_appfl.runs.absence import spare, spares
from fedspallm_appfl.runs.rank import all_rounds
from helpers.tiny import events, save_tiny, tiny_config, weights

ROUNDS = {"min_clients": 1, "num_global_epochs": 2}
EACH = {"comm_configs": {"blocks_per_message": 1}}


class InMemory:
    """One process with all clients; the server takes a message before or after the clients made the next one."""

    def __init__(self, server, names, ahead, log, wire):
        self._server, self._names, self._ahead, self._log, self._wire = server, names, ahead, log, wire
        self._desk = Desk(server)

    def tell(self, event):
        self._server.aggregator.on_event(event)

    def get_global_model(self, **asked):
        payload, metadata = self._server.get_parameters(**{"_client_ids": self._names, **asked}, blocking=False)
        return (payload, metadata) if metadata else payload

    def exchange(self, messages, meanwhile):
        sent = list(messages)
        self._log.append("sent")
        self._wire.append([(client, without(told, "seconds", "host", "notes")) for client, _, told in sent])
        if self._ahead:
            meanwhile()
        for client, update, metadata in sent:
            self._desk.take(0, client, update, metadata)
        [(_, payload, answers)] = self._desk.answers([0])
        self._log.append("answered")
        status = {"status": "DONE" if self._server.training_finished() else "RUNNING"}
        return payload, {client: answer | status for client, answer in answers.items()}


def without(facts, *names):
    return {key: value for key, value in facts.items() if key not in names}


def run(folder, model, ahead, log, wire):
    def launch(config, state_dir, on_event, *_):
        agents_of = registration.agents()
        server = agents_of.server_agent(config, state_dir)
        server.aggregator.on_event = on_event
        spare(server, config)
        told = [client_settings(config, client, ["cpu"], 10**9, folder / "agreed") for client in participants(config)]
        agents = {settings.client_id: agents_of.client_agent(settings) for settings in told}
        all_rounds(InMemory(server, list(agents), ahead, log, wire), agents, spares(config))
        forget()
        return server.aggregator

    file = tiny_config(folder, model, "consensus", 2, server_configs=ROUNDS, client_configs=EACH)
    experiment.conduct(prepared(well_formed(str(file), []), False), launch, False)
    return folder / "run"


def said(run, kind):
    return [without(event, "time", "seconds", "host", "notes", "traceback") for event in events(run, kind)]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("trouble", ["none", "fails", "is refused", "is refused and fails"])
def test_what_is_made_ahead_changes_nothing(tmp_path, tiny_model, monkeypatch, trouble):
    """In the first round a client fails at its last message, is refused with its second, or both: then it was refused."""
    make, receive, log = LocalClient.next_message, FedSpaLLMAggregator.receive, []

    def next_message(self):
        now = self._progress
        where = self.settings.client_id, now.round_index, now.exchange, now.next_message
        log.append(where)
        if "fails" in trouble and where == ("austen", 0, 0, 2):
            raise PruningError("it failed")
        return make(self)

    def refusing(self, client, update, metadata):
        if "refused" in trouble and (client, self.round, metadata["_chunk_idx"]) == ("austen", 0, 1):
            raise UpdateError("it was refused")
        return receive(self, client, update, metadata)

    monkeypatch.setattr(LocalClient, "next_message", next_message)
    monkeypatch.setattr(FedSpaLLMAggregator, "receive", refusing)
    runs, logs, wires = [], [], ([], [])
    for ahead in (False, True):
        runs.append(run(tmp_path / str(ahead), tiny_model, ahead, log, wires[ahead]))
        logs.append(log[:])
        log.clear()
    assert wires[0] == wires[1]
    one, other = map(weights, runs)
    assert all(torch.equal(one[name], other[name]) for name in one)
    for kind in ("upload", "block", "absent"):
        assert said(runs[0], kind) == said(runs[1], kind)
    assert [event["why"] for event in events(runs[1], "absent")] == {
        "none": [],
        "fails": ["it failed"],
    }.get(trouble, ["it was refused"])
    made = [entry for entry in logs[1] if not isinstance(entry, str)]
    assert len(made) == len(set(made))  # one that failed is not asked again
    assert not on_its_way(logs[0])
    assert {number for *_, number in on_its_way(logs[1])} == {1, 2}  # none begins an exchange


def on_its_way(log):
    """What was made between a message and its answer."""
    found, between = [], False
    for entry in log:
        if isinstance(entry, str):
            between = entry == "sent"
        elif between:
            found.append(entry)
    return found
