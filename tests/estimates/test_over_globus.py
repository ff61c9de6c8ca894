"""Predictions of runs over Globus Compute: by hand on four small matrices, and beside tasks that were run."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import yaml

from fedspallm_appfl.cli import main
from fedspallm_appfl.estimates import memory as estimate_memory
from fedspallm_appfl.estimates import over_globus as estimate_globus
from fedspallm_appfl.estimates.job import Job
from fedspallm_appfl.estimates.tables import LOWER
from fedspallm_appfl.globus.server import run as globus
from fedspallm_appfl.globus.server.communicator import Outcome
from fedspallm_appfl.globus.site import worker as globus_worker
from fedspallm_appfl.globus.site.site_file import SENDINGS
from fedspallm_appfl.globus.store import places
from fedspallm_appfl.globus.store.data_store import MARK, DataStore, open_store
from fedspallm_appfl.models.storage.checkpoint import model_hash
from fedspallm_appfl.rounds.participants import draws
from fedspallm_appfl.settings.reading import load_config
from fedspallm_appfl.validation.rules import prepared_for_globus
from fedspallm_appfl.wire.as_bytes import from_bytes
from fedspallm_appfl.wire.update import update_nbytes
from helpers.experiments import DOMAINS, first_pages
from helpers.measured import FREED_AT_ONCE, save_measured
from helpers.outlines import MASKS, PACKED, client, experiment, job
from helpers.paths import DEMO, ROOT
from helpers.tiny import save_tiny, tiny_config

SERVER = ROOT / "examples" / "globus" / "server.yaml"


def of_turns(config, field):
    return [getattr(turn, field) for turn in estimate_globus.turns(job(config))]


def with_rounds(rounds, **changes):
    config = experiment(**changes)
    config.server_configs.num_global_epochs = rounds
    return config


def test_one_round_by_hand():
    [turn] = estimate_globus.turns(job(experiment()))
    assert dataclasses.astuple(turn) == (0, 0, 0, {"a": 2 * PACKED, "b": 2 * PACKED}, 0, 4 * PACKED)


def test_every_task_loads_what_went_down_before_it():
    """Masks of both blocks, then weights beside them; each round replaces what the one before sent."""
    config = with_rounds(2, algorithm="consensus")
    masks, weights = 2 * MASKS, 2 * PACKED
    assert of_turns(config, "down") == [0, masks, masks + weights, masks + weights]
    assert of_turns(config, "made") == [masks, weights, masks, 0]
    assert [one.down for one in estimate_globus.traffic(job(config))] == [masks, 2 * (masks + weights)]


def test_a_payload_stays_until_all_of_it_came_again():
    """A client prunes one of two blocks a round; in two messages each would be replaced, in one they stay together."""
    config = with_rounds(4, count=1, resource_share=0.5, layer_sampling="uniform")
    drawn = [set(blocks) for assigned in draws(config, 2) for blocks in assigned.values()]
    assert drawn[0] == drawn[1] != drawn[2]
    assert of_turns(config, "down") == [0, PACKED, PACKED, 2 * PACKED]


def test_the_store_may_hold_what_late_clients_have_sent_before():
    """Values of the first round are larger than the masks of the second."""
    config = with_rounds(2, algorithm="consensus")
    masks, weights = 2 * MASKS, 2 * PACKED
    values = weights - masks
    later = masks + weights + 2 * values
    assert of_turns(config, "stored") == [2 * masks, masks + 2 * values, later, later]


@pytest.mark.parametrize(
    ("count", "delay", "words"),
    [(4, (0, 0), "the 4 of an exchange leave at once"), (8, (16, 20), "the last of 8 after 16 to 20 s")],
)
def test_a_submission_waits_for_those_before_it(count, delay, words):
    from fedspallm_appfl.estimates.tables import _submissions

    tasks = estimate_globus.tasks(job(with_rounds(3, count=count, algorithm="consensus")))
    assert (tasks.exchange, tasks.round, tasks.all, tasks.delay) == (count, 2 * count, 6 * count, delay)
    assert words in _submissions(tasks)


def test_a_worker_by_hand():
    """On a GPU all that a client makes lies there; its main memory has messages, and what came down."""
    config = with_rounds(2)
    config.client_configs.comm_configs.store.connector = "redis"
    alone = estimate_memory.client_memory(job(config), client())
    worker = estimate_globus.worker_memory(job(config), client())
    assert worker.on_cpu.needed == alone.needed
    assert sum(worker.gpu.values()) == sum(size for part, size in alone.parts.items() if part != "heap")
    assert worker.on_gpu.parts["what came down"] == 3 * 2 * PACKED
    config.client_configs.comm_configs.store.connector = "none"
    inline = estimate_globus.worker_memory(job(config), client())
    assert inline.on_cpu.parts["result of a task"] == round(4 / 3 * 2 * PACKED)


@pytest.mark.parametrize(("propagate", "together"), [("pruned", 2), ("dense", 1)])
def test_amid_a_sweep_a_worker_keeps_the_hidden_states_of_all_clients_of_its_endpoint(propagate, together):
    """Six windows of eight tokens each: four float32 and an id a token. Clients a and b share an endpoint."""
    config, states = with_rounds(2, count=3, algorithm="gram", propagate=propagate), 6 * 8 * (4 * 4 + 8)
    for one, number in zip(config.clients, "AaB", strict=True):
        one.endpoint_id = f"00000000-0000-4000-8000-00000000000{number}"
    workers = [estimate_globus.worker_memory(job(config), one) for one in config.clients]
    assert [worker.gpu["activations"] for worker in workers] == [together * states, together * states, states]
    assert workers[0].on_cpu.parts["activations"] == together * states


def test_amid_a_sweep_hidden_states_stay_while_what_came_down_is_read(monkeypatch):
    monkeypatch.setattr(estimate_globus, "READING", 10**6)  # so that reading is the worst moment
    config = with_rounds(2, algorithm="gram", propagate="pruned")
    parts = estimate_globus.worker_memory(job(config), config.clients[0]).on_cpu.parts
    assert parts.keys() == {"outer parts", "activations", "what came down", "heap"}


def test_a_site_may_give_text_to_a_client_that_needs_none():
    config = experiment(pruner="magnitude", text=None)
    worker, with_text = (estimate_globus.worker_memory(job(config), one) for one in (config.clients[0], client()))
    assert worker.gpu["activations"] == with_text.gpu["activations"]


@pytest.mark.parametrize("algorithm", ["fedspallm", "fedprllm", "fedavg", "consensus", "gram"])
@pytest.mark.parametrize("connector", ["none", "redis"])
def test_every_part_has_its_line_in_the_table(algorithm, connector):
    config = with_rounds(2, algorithm=algorithm)
    config.client_configs.comm_configs.store.connector = connector
    worker = estimate_globus.worker_memory(job(config), config.clients[0])
    server = estimate_globus.receiving_memory(job(config))
    for parts in (worker.on_cpu.parts, worker.on_gpu.parts, worker.gpu, server.parts):
        assert parts.keys() <= LOWER.keys()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], ["2 in all, one for each client and exchange; before them 2 more ask the sites", "7.0 MB fit"]),
        (["server_configs.num_global_epochs=3"], ["2 a round, 6 in all"]),
        (
            ["client_configs.comm_configs.store.connector=redis"],
            ["holds at most 3.3 MB, about 2.8 MB compressed, in Redis"],
        ),
        (["client_configs.train_configs.device=cuda"], ["each worker, GPU", "CUDA's own memory comes on top"]),
        (
            ["clients.0.train_configs.device=cpu"],
            ["worker of austen, CPU", "worker of bible, CPU", "worker of bible, GPU"],
        ),
        (["client_configs.data.activations=file"], ["hidden states of a client, in TMPDIR of its worker"]),
    ],
)
def test_a_configuration_for_globus_compute_is_told_of_tasks_and_workers(overrides, words, capsys):
    assert main(["estimate", str(SERVER), *overrides]) == 0
    out = capsys.readouterr().out
    for expected in words:
        assert expected in out
    assert "MPI" not in out and "serial" not in out
    assert ("each worker, CPU" in out) == ("device" not in str(overrides))


class Wire:
    """Runs the tasks of an exchange in this process, before any of them is read; keeps what they were asked."""

    def __init__(self, watch):
        self.requests = []
        self.done = []
        self.watch = watch

    def send_task_to_one_client(self, client, kind, *, metadata):
        request = json.loads(json.dumps(metadata))
        self.requests.append(request)
        self.watch.loaded.append(0)
        self.done.append(Outcome(client, request, globus_worker.run_exchange(request)))

    def recv_result_from_one_client(self, timeout=None):
        return self.done.pop(0)

    def busy(self):
        return {outcome.client for outcome in self.done}

    def task_ids(self):
        return {}

    def shutdown_all_clients(self):
        self.done = []


class Watch:
    """Bytes of tensors in the data store.

    Attributes:
        most: of all objects at a time.
        kept: name -> of everything that was ever there.
        loaded: of what each task has read.
    """

    def __init__(self, monkeypatch):
        self.sizes, self.most = {}, 0
        self.kept, self.loaded = {}, []
        put, get, evict = DataStore.put, DataStore.get, DataStore.evict

        def watched_put(store, name, data):
            if name != MARK:
                self.kept[name] = self.sizes[name] = update_nbytes(from_bytes(data, "test"))
                self.most = max(self.most, sum(self.sizes.values()))
            put(store, name, data)

        def watched_get(store, name, most=None):
            if name.startswith("down."):
                self.loaded[-1] += self.kept[name]
            return get(store, name, most)

        def watched_evict(store, name):
            self.sizes.pop(name, None)
            evict(store, name)

        monkeypatch.setattr(DataStore, "put", watched_put)
        monkeypatch.setattr(DataStore, "get", watched_get)
        monkeypatch.setattr(DataStore, "evict", watched_evict)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("algorithm", "changes"),
    [
        ("fedspallm", {}),
        ("fedspallm", {"shares": (0.34, 0.67), "rounds": 4}),
        ("fedspallm", {"shares": (0.34, 0.67), "rounds": 4, "max_message_bytes": 3500}),
        ("fedspallm", {"pruner": "wanda", "rounds": 2}),
        ("consensus", {"rounds": 2}),
        ("gram", {}),
        ("gram", {"propagate": "pruned", "rounds": 2, "shares": (0.34, 1.0)}),
        ("gram", {"propagate": "pruned", "stride": 2, "rounds": 2, "shares": (0.34, 1.0)}),
    ],
)
def test_what_tasks_load_and_send_is_what_was_predicted(algorithm, changes, tiny_model, tmp_path, monkeypatch):
    """To the byte: uploads, downloads, and the most that the data store ever held."""
    config = federation(tmp_path, tiny_model, algorithm, **changes)
    monkeypatch.setenv("FEDSPALLM_SITE", str(tmp_path / "site.yaml"))
    monkeypatch.setattr(places, "SMALL", 0)  # everything into the store
    watch, events = Watch(monkeypatch), []
    wire = Wire(watch)
    store = open_store(vars(config.client_configs.comm_configs.store), "run", create=True)
    connection = globus.Connection(config, wire, store, "run", model_hash(tiny_model))
    globus.run(config, tmp_path / "state", events.append, connection)

    of, clients = Job.of(config), len(config.clients)
    turns = estimate_globus.turns(of)
    assert len(wire.requests) == estimate_globus.tasks(of).all
    down = [sum(watch.kept[place["stored"]] for place in request["down"]) for request in wire.requests]
    assert down == [turn.down for turn in turns for _ in range(clients)]
    assert watch.loaded == [turn.loaded for turn in turns for _ in range(clients)]
    assert watch.most == max(turn.stored for turn in turns)
    uploads = [event for event in events if event["event"] == "upload"]
    exchanges = len(turns) // config.server_configs.num_global_epochs
    for number, turn in enumerate(turns):
        place = divmod(number, exchanges)
        mine = [event for event in uploads if (event["round"], event["exchange"]) == place]
        assert turn.up == {name: sum(e["bytes"] for e in mine if e["client"] == name) for name in turn.up}


def federation(
    folder, model, algorithm, shares=(1.0, 1.0), rounds=1, max_message_bytes=2**29, pruner="sparsegpt", **gram
):
    (folder / "store").mkdir()
    store = {"connector": "file", "folder": str(folder / "store")}
    changes = {
        "gram": gram,
        "evaluation": {"own_windows": 0},
        "server_configs": {"num_global_epochs": rounds},
        "client_configs": {
            "train_configs": {"pruner": pruner, "layer_sampling": "uniform"},
            "comm_configs": {"store": store, "compression": "none", "max_message_bytes": max_message_bytes},
        },
    }
    file = tiny_config(folder, model, algorithm, 2, **changes)
    config = prepared_for_globus(load_config(file)[0])
    for number, (one, share) in enumerate(zip(config.clients, shares, strict=True)):
        one.train_configs.resource_share = share
        one.endpoint_id = f"00000000-0000-4000-8000-00000000000{number}"
    texts = {name: {"text": str(first_pages(name, 10_000))} for name in DOMAINS[:2]}
    (folder / "site.yaml").write_text(yaml.safe_dump({"clients": texts, "may_send": list(SENDINGS)}))
    return config


MEASURE = """
import gc, json, sys
from pathlib import Path
import torch
from fedspallm_appfl.globus.site import worker as globus_worker
from fedspallm_appfl.devices import give_back

def field(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name + ":")).split()[1])

torch.set_num_threads(1)
globus_worker.RESULT_LIMIT = 10**9
run_exchange = globus_worker.run_exchange
small, request = json.loads(Path(sys.argv[1]).read_text())
assert "messages" in run_exchange(small)  # code that is loaded late is not what is measured
gc.collect()
give_back()
before = field("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
result = run_exchange(request)
assert "messages" in result, result
print(field("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("connector", ["file", "none"])
def test_memory_of_a_worker_is_within_a_tenth_of_what_is_measured(connector, tmp_path, monkeypatch):
    """Results of any size are let through, so that they can be seen."""
    save_measured(tmp_path / "model")
    monkeypatch.setenv("FEDSPALLM_SITE", str(tmp_path / "site.yaml"))
    requests = []
    for model, data in ((DEMO / "model", {}), (tmp_path / "model", {"windows": 8, "length": 128, "batch": 4})):
        folder = tmp_path / f"{len(requests)}"
        folder.mkdir()
        config = federation(folder, model, "fedspallm")
        for owner in (config.client_configs, *config.clients):
            owner.comm_configs.store.connector = connector
            owner.data = dataclasses.replace(owner.data, **data)
        store = open_store(vars(config.client_configs.comm_configs.store), "run", create=True)
        connection = globus.Connection(config, None, store, "run", model_hash(model))
        told = {"round": 0, "exchange": 0, "assign": {config.clients[0].client_id: "0-1"}}
        names = [f"a.0.{message}" for message in range(9)]
        requests.append(connection.request(config.clients[0], [], names) | {"down": [], "instructions": told})
    (tmp_path / "site.yaml").write_text((folder / "site.yaml").read_text())
    (tmp_path / "requests.json").write_text(json.dumps(requests))
    line = [sys.executable, "-c", MEASURE, str(tmp_path / "requests.json")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, env={**os.environ, **FREED_AT_ONCE})
    assert done.returncode == 0, done.stderr[-2000:]
    predicted = estimate_globus.worker_memory(Job.of(config), config.clients[0]).on_cpu
    measured, asked = int(done.stdout.splitlines()[-1]), predicted.resident - predicted.parts["heap"]
    print(f"worker, {connector}: predicted {asked / 1e6:.0f}, measured {measured / 1e6:.0f} MB")
    assert asked == pytest.approx(measured, rel=0.1)
