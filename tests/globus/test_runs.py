"""Runs over Globus Compute without its services: real serializer, real process-pool engine, the Executor's bad habits."""

import base64
import functools
import json
import os
import random
import re
import shutil
import tempfile
import time
import uuid
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from globus_compute_sdk.errors import DeserializationError, TaskExecutionFailed
from globus_compute_sdk.sdk.asynchronous.compute_future import ComputeFuture
from globus_compute_sdk.serialize import DillDataBase64
from pika.exceptions import AMQPConnectionError
from safetensors.torch import load_file, save_file

from fedspallm_appfl.cli import main
from fedspallm_appfl.errors import ConfigError, FederationError
from fedspallm_appfl.globus.server import communicator as globus_communicator
from fedspallm_appfl.globus.server import preflight as globus_preflight
from fedspallm_appfl.globus.server import run as globus
from fedspallm_appfl.globus.server.communicator import GlobusServer, Outcome, Task
from fedspallm_appfl.globus.site import worker as globus_worker
from fedspallm_appfl.globus.site.site_file import SENDINGS
from fedspallm_appfl.globus.site.site_file import Site as SiteFile
from fedspallm_appfl.rounds.client import OWN_FOLDER, LocalClient
from fedspallm_appfl.rounds.hidden.client import Hiding
from fedspallm_appfl.secure.identity import Identity
from fedspallm_appfl.settings.reading import load_config
from fedspallm_appfl.settings.schema import ClientSettings, OwnData, Recovery
from fedspallm_appfl.validation.rules import prepared_for_globus
from fedspallm_appfl.wire.as_bytes import from_bytes, to_bytes
from helpers.experiments import DOMAINS, first_pages, small_config, uneven
from helpers.globus_double.executor import Site
from helpers.knife import Knife
from helpers.paths import DEMO
from helpers.s3_double import BUCKET, keys, s3_service
from helpers.tiny import events, run, save_tiny

ENDPOINTS = {name: f"00000000-0000-4000-8000-00000000000{number}" for number, name in enumerate("abc", 1)}
CHOSEN = {"method": "fisher", "windows": 4, "length": 64, "width": "0.2"}  # targets of matrices
TWO = {"device": "auto", "devices": ["cpu", "cpu"]}  # of each client
JSON_ONLY = ["globus_compute_sdk.serialize.JSONData", "globus_compute_sdk.serialize.PureSourceTextInspect"]


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    """Endpoints that read nothing but JSON and function text; the site file is written before the worker starts."""
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDSPALLM_SITE", str(folder / "site.yaml"))
        patch.setenv("TMPDIR", str(folder / "temporary"))
        (folder / "temporary").mkdir()
        patch.setattr(tempfile, "tempdir", None)  # the worker looks anew
        made = Site(folder, JSON_ONLY)
        made.file = folder / "site.yaml"
        yield made
        made.close()


@pytest.fixture
def site(endpoint, monkeypatch):
    endpoint.sent, endpoint.silent, endpoint.offline, endpoint.refusals = [], set(), set(), []
    monkeypatch.setattr(globus_communicator, "logged_in", endpoint.client)
    monkeypatch.setattr(globus_communicator, "Executor", endpoint.executor)
    write_site(endpoint, DOMAINS[:3])
    return endpoint


def write_site(site, clients, **more):
    texts = {name: {"text": str(first_pages(name))} for name in clients}
    site.file.write_text(yaml.safe_dump({"clients": texts, **more}))


def write_config(folder, count=3, **changes):
    """Clients with endpoints and, for runs on this machine, with their texts; they measure nothing unless asked."""
    file = small_config(folder, count, first_pages, **{"evaluation": {"own_windows": 0}, **changes})
    config = yaml.safe_load(file.read_text())
    endpoints = (*ENDPOINTS.values(), str(uuid.uuid4()))
    for client, endpoint in zip(config["clients"], endpoints, strict=False):
        client["endpoint_id"] = endpoint
    file.write_text(yaml.safe_dump(config))
    return file


def over_globus(config, *overrides):
    return main(["run", str(config), "--launcher", "globus", *overrides])


def weights(folder):
    """The tensors of all models of a run."""
    files = sorted(folder.rglob("model.safetensors"))
    return {(str(file.relative_to(folder)), name): one for file in files for name, one in load_file(file).items()}


def same_bits(a, b):
    one, other = weights(a), weights(b)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one) and len(one) > 0


@pytest.fixture(scope="module")
def s3():
    with s3_service() as url:
        yield url


def write_uneven(folder, **comm):
    shared = {"comm_configs": {"max_message_bytes": 140_000, **comm}, "train_configs": TWO}
    return write_config(folder, **uneven(first_pages), client_configs=shared, evaluation={})


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The same experiment without Globus Compute."""
    return run(write_uneven(tmp_path_factory.mktemp("one")))


@pytest.mark.parametrize("connector", ["none", "file", "s3"])
def test_globus_gives_the_bits_of_one_process(tmp_path, site, capsys, monkeypatch, one_process, s3, connector):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "server")  # after the site's worker has started: it has no credentials
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "stays-here")
    store = tmp_path / "store"
    store.mkdir()
    config = write_uneven(tmp_path, store={"connector": connector, "folder": str(store), "bucket": BUCKET, "url": s3})
    assert over_globus(config) == 0, capsys.readouterr().err
    assert same_bits(one_process, tmp_path / "run")
    assert (one_process / "manifest.json").read_text() == (tmp_path / "run" / "manifest.json").read_text()
    assert list(store.iterdir()) == keys(s3) == []
    sizes = [len(text) for _, text in site.sent]
    assert max(sizes) > 10**6 if connector == "none" else max(sizes) < 3 * 10**4
    assert not any("stays-here" in text for _, text in site.sent)
    here, there = (measured(folder) for folder in (tmp_path / "run", one_process))
    assert here == there and len(here) == 3


def measured(folder):
    """Client -> its sums; the bytes that went down differ by the compression."""
    return {
        event["client"]: {key: event[key] for key in ("tokens", "dense", "pruned")}
        for event in events(folder, "measured")
    }


def test_a_site_can_forbid_to_measure_and_the_run_goes_on(tmp_path, site, capsys):
    write_site(site, DOMAINS[:3], evaluation=False)
    config = write_config(tmp_path, evaluation={})
    assert over_globus(config) == 0, capsys.readouterr().err
    assert measured(tmp_path / "run") == {}
    report = (tmp_path / "run" / "report.md").read_text("utf-8")
    assert f"- {DOMAINS[0]}: client {DOMAINS[0]}: this site does not measure models on its text" in report


def test_each_measures_its_own_model_where_each_has_one(tmp_path, site, capsys):
    config = write_config(tmp_path, algorithm="standalone", evaluation={})
    assert over_globus(config) == 0, capsys.readouterr().err
    run(config, f"run_dir={tmp_path / 'here'}")
    assert measured(tmp_path / "run") == measured(tmp_path / "here")


@pytest.mark.parametrize("algorithm", ["consensus", "gram", "standalone"])
def test_another_algorithm_gives_the_bits_of_one_process_too(tmp_path, site, capsys, algorithm):
    """With targets that the server chose and a round of recovery in one of them, to which sites have to consent."""
    stages = {"allocation": CHOSEN, "recovery": {"rounds": 1, "steps": 2, "batch": 3}} if algorithm == "gram" else {}
    config = write_config(tmp_path, algorithm=algorithm, **stages)
    if stages:
        assert over_globus(config) == 2
        assert "austen: this site does not send recovery; set recovery.rounds to 0" in capsys.readouterr().err
        write_site(site, DOMAINS[:3], may_send=["grams", "recovery"])
    assert over_globus(config, f"run_dir={tmp_path / 'globus'}") == 0, capsys.readouterr().err
    assert not list((site.file.parent / "temporary").glob("fedspallm-*"))  # its worker will end without cleaning up
    assert main(["run", str(config)]) == 0
    assert same_bits(tmp_path / "run", tmp_path / "globus")


def test_a_model_that_was_pruned_before_is_recovered_with_the_bits_of_one_process(tmp_path, site, capsys):
    """Sites have the dense model; the pruned one comes from the server."""
    write_site(site, DOMAINS[:3], may_send=["recovery"])
    config = write_config(tmp_path, model={"path": str(save_tiny(tmp_path / "dense"))})
    pruned = run(config)
    command = ["recover", str(pruned), str(config), "recovery.steps=2", "recovery.batch=3", "recovery.rank=2"]
    assert main([*command, f"run_dir={tmp_path / 'here'}"]) == 0
    assert main([*command, f"run_dir={tmp_path / 'globus'}", "--launcher", "globus"]) == 0, capsys.readouterr().err
    assert same_bits(tmp_path / "here", tmp_path / "globus") and not same_bits(pruned, tmp_path / "here")


@pytest.mark.parametrize(
    ("algorithm", "forgets", "signed"),
    [("consensus", False, False), ("gram", False, True), ("consensus", True, True), ("gram", True, False)],
)
def test_secure_sums_give_the_bits_of_one_process_whoever_gets_the_next_task(
    tmp_path, monkeypatch, over_wire, algorithm, forgets, signed
):
    class ForgetfulWire(Wire):
        def exchanged(self, request):
            if forgets:
                globus_worker._sweeping.clear()
            return globus_worker.run_exchange(request)

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "secrets"))
    (tmp_path / "secrets").mkdir()
    after = {"recovery": {"rounds": 1, "steps": 2, "batch": 3, "rank": 2}} if algorithm == "gram" else {}
    file = write_config(tmp_path, algorithm=algorithm, server_configs={"secure_sums": True}, **after)
    if signed:
        sign(tmp_path, file)
    _, aggregator = over_wire(ForgetfulWire(), file)
    assert main(["run", str(file)]) == 0
    alone = load_file(tmp_path / "run" / "model" / "model.safetensors")
    done = aggregator.global_model.done
    for block in done.blocks():
        for name, packed in done.get(block).items():
            assert torch.equal(packed.unpack_weight(), alone[f"model.layers.{block}.{name}.weight"])
    assert not list((tmp_path / "secrets").glob("fedspallm-secrets-*"))
    assert not globus_worker._sweeping


@pytest.mark.parametrize("stage", ["_advertise", "_share", "mask", "_open"])
def test_a_client_of_secure_sums_falls_out_over_the_wire_as_in_one_process(tmp_path, monkeypatch, over_wire, stage):
    class DirectWire(Wire):
        def exchanged(self, request):
            return globus_worker.run_exchange(request)

    honest = getattr(Hiding, stage)

    def fails(self, *given):
        if self._name == "sqldocs":
            raise RuntimeError("gone")
        return honest(self, *given)

    monkeypatch.setattr(Hiding, stage, fails)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "secrets"))
    (tmp_path / "secrets").mkdir()
    server = {"secure_sums": True}  # `min_clients` would end an exchange before all have answered
    file = write_config(tmp_path, 4, algorithm="gram", server_configs=server)
    log, aggregator = over_wire(DirectWire(), file)
    [absent] = [event for event in log if event["event"] == "absent"]
    assert (absent["client"], absent["why"]) == ("sqldocs", "RuntimeError: gone")
    assert main(["run", str(file), "server_configs.min_clients=3"]) == 0
    alone = load_file(tmp_path / "run" / "model" / "model.safetensors")
    done = aggregator.global_model.done
    for block in done.blocks():
        for name, packed in done.get(block).items():
            assert torch.equal(packed.unpack_weight(), alone[f"model.layers.{block}.{name}.weight"])


def test_secrets_of_a_round_that_never_ended_go_after_a_week(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    old, new = tmp_path / "fedspallm-secrets-old", tmp_path / "fedspallm-secrets-new"
    killed = tmp_path / f"{OWN_FOLDER}of-a-killed-task"
    for folder in (old, new, killed):
        folder.mkdir()
    for folder in (old, killed):
        os.utime(folder, (0, time.time() - 8 * 24 * 3600))
    globus_worker._forget_old_files()
    assert [folder.name for folder in tmp_path.iterdir()] == [new.name]


def sign(folder, file):
    """Give the clients of a configuration identities, in the site file and, for runs on this machine, in it."""
    config, names = yaml.safe_load(file.read_text()), DOMAINS[:3]
    made = {name: Identity.make() for name in names}
    for client, (name, identity) in zip(config["clients"], made.items(), strict=True):
        identity.save(folder / f"{name}.key")
        client["identity"] = str(folder / f"{name}.key")
    (folder / "roster.yaml").write_text(yaml.safe_dump({name: one.public for name, one in made.items()}))
    config["server_configs"]["roster"] = str(folder / "roster.yaml")
    file.write_text(yaml.safe_dump(config))
    here = yaml.safe_load((folder / "site.yaml").read_text())
    for name in names:
        here["clients"][name]["identity"] = f"{name}.key"
    (folder / "site.yaml").write_text(yaml.safe_dump({**here, "roster": "roster.yaml", "secure_sums": "required"}))


SWEEPS = {"by input": {"target": "dense"}, "by block": {"stride": 1}}


def write_sweep(folder, sweep):
    """Two rounds of an exchange for each input, or each, of three narrow blocks; one client skips some."""
    model = {"path": str(save_tiny(folder / "tiny")), "dtype": "float32"}
    gram = {"propagate": "pruned", **SWEEPS[sweep]}
    file = write_config(folder, model=model, algorithm="gram", gram=gram, server_configs={"num_global_epochs": 2})
    config = yaml.safe_load(file.read_text())
    config["clients"][1]["train_configs"] = {"resource_share": 0.4}
    file.write_text(yaml.safe_dump(config))
    return file


@pytest.mark.parametrize(("sweep", "exchanges"), [("by input", 12), ("by block", 3)])
def test_a_sweep_goes_on_from_task_to_task(tmp_path, site, capsys, sweep, exchanges):
    config = write_sweep(tmp_path, sweep)
    write_site(site, DOMAINS[:3], may_send=["grams", "token_counts"])
    assert over_globus(config, f"run_dir={tmp_path / 'globus'}") == 0, capsys.readouterr().err
    assert main(["run", str(config)]) == 0
    assert same_bits(tmp_path / "run", tmp_path / "globus")
    assert len(site.sent) == 3 + 2 * exchanges * 3


@pytest.mark.parametrize(("sweep", "begun"), [("by input", 1), ("by input", 5), ("by block", 2)])
def test_a_worker_that_has_forgotten_where_a_sweep_stood_begins_it_anew(tmp_path, monkeypatch, over_wire, sweep, begun):
    class ForgetfulWire(Wire):
        def exchanged(self, request):
            if begun > 1 and request["instructions"]["exchange"] % 3 == 2:
                globus_worker._sweeping.pop(request["client"], None)
            return globus_worker.run_exchange(request)

    made = []
    make = globus_worker._agent
    monkeypatch.setattr(globus_worker, "_agent", lambda *of: made.append(of[0].client_id) or make(*of))
    config = write_sweep(tmp_path, sweep)
    _, aggregator = over_wire(ForgetfulWire(), config)
    assert main(["run", str(config)]) == 0
    alone = load_file(tmp_path / "run" / "model" / "model.safetensors")
    done = aggregator.global_model.done
    for block in range(3):
        for name, packed in done.get(block).items():
            assert torch.equal(packed.unpack_weight(), alone[f"model.layers.{block}.{name}.weight"])
    assert len(made) == 2 * 3 * begun
    assert not globus_worker._sweeping


def test_nothing_of_the_text_travels_and_no_pickle(tmp_path, site):
    config = write_config(tmp_path)
    assert over_globus(config) == 0
    words = first_pages("austen").read_text()[1000:1040]
    assert len(site.sent) == 6  # three looks and three tasks
    for _, text in site.sent:
        assert "calib.txt" not in text and words not in text
        function = text.split("\n", 1)[1]
        assert function.startswith(("st\nlook_around:", "st\nprune:"))
        assert "\n11\n" in text  # JSON; dill would be 00
    assert "calib.txt" not in (tmp_path / "run" / "config.yaml").read_text()
    assert "compression: zstd" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_failing_client_is_left_out_and_the_others_give_what_they_give_alone(tmp_path, site, capsys, monkeypatch):
    config = write_config(tmp_path)
    raw = yaml.safe_load(config.read_text())
    raw["clients"][2]["data"]["length"] = 100_000  # longer than its text
    config.write_text(yaml.safe_dump(raw))
    why = "client csource: 6 calibration windows of 100000 tokens were requested"
    assert over_globus(config, f"run_dir={tmp_path / 'globus'}") == 2
    err = capsys.readouterr().err
    assert "2 of 3 clients can take part, 3 are needed" in err
    assert f"client csource: text: {why}" in err
    monkeypatch.setattr(globus_preflight, "require", lambda findings, least: None)
    assert over_globus(config, f"run_dir={tmp_path / 'globus'}") == 0
    out = capsys.readouterr().out
    assert "round 1 continues without client csource" in out and why in out
    assert "Traceback (most recent call last)" in out and "calib.txt" not in out
    assert "clients left out, round 1: csource; why: report.md" in out
    assert main(["run", str(small_config(tmp_path, 2, first_pages))]) == 0
    assert same_bits(tmp_path / "run", tmp_path / "globus")
    report = (tmp_path / "globus" / "report.md").read_text()
    assert "| 1 | austen, bible |" in report and "**Clients left out, round 1: csource.**" in report
    assert why in report


def test_an_endpoint_that_is_down_is_named_and_a_quorum_does_without_it(tmp_path, site, capsys):
    site.offline = site.silent = {ENDPOINTS["b"]}
    config = write_config(tmp_path)
    assert main(["doctor", str(config)]) == 2
    out = capsys.readouterr().out
    assert "globus-compute-endpoint start NAME" in out and ENDPOINTS["b"] in out
    assert len(site.sent) == 2  # an endpoint that is known to be down is not asked
    quorum = ["server_configs.min_clients=2", f"run_dir={tmp_path / 'globus'}"]
    assert over_globus(config, *quorum) == 0
    assert "continues without client bible: it had not answered when enough others had" in capsys.readouterr().out


def test_a_submission_that_fails_ends_neither_the_run_nor_the_tasks_behind_it(tmp_path, site, capsys, monkeypatch):
    monkeypatch.setattr(globus_preflight, "look", lambda connection: {})
    monkeypatch.setattr(globus_preflight, "require", lambda findings, least: None)
    site.refusals = [OSError("service is not well")]
    config = write_config(tmp_path, server_configs={"num_global_epochs": 2})
    assert over_globus(config) == 0, capsys.readouterr().err
    lines = [line for line in capsys.readouterr().out.splitlines() if "continues without" in line]
    assert lines == ["round 1 continues without client austen: OSError: service is not well"]


def test_what_is_sent_is_what_was_there_when_it_was_sent(site):
    """APPFL changes one dict for the next client while the Executor has not serialized it yet."""
    server = GlobusServer(ENDPOINTS)
    shared = {}
    for name in ENDPOINTS:
        shared["client"] = name
        server.send_task_to_one_client(name, "prune", metadata=shared)
    until = time.monotonic() + 10
    while len(site.sent) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    assert [
        (endpoint, f'"client": "{name}"' in text) for name, (endpoint, text) in zip("abc", site.sent, strict=True)
    ] == [(ENDPOINTS[name], True) for name in "abc"]


def test_functions_are_registered_once_and_for_all_and_named_in_the_configuration(tmp_path, site, capsys):
    assert main(["functions"]) == 0
    told = list(yaml.safe_load_all(capsys.readouterr().out))[0]
    assert list(told["server_configs"]["functions"].values()) == told["allowed_functions"]
    site.functions = {}
    config = write_config(tmp_path, server_configs=told["server_configs"])
    assert main(["doctor", str(config)]) == 0
    assert site.functions == told["server_configs"]["functions"]


def test_what_a_site_does_not_send_it_is_not_asked_for(tmp_path, site, capsys):
    write_site(site, DOMAINS[:3], may_send=["masks"])
    config = write_config(tmp_path)
    assert main(["doctor", str(config)]) == 2
    assert "this site does not send weights" in " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    write_site(site, DOMAINS[:3])
    for asking in ("gram.first_input=private", "gram.propagate=pruned"):
        assert over_globus(config, "algorithm=gram", asking) == 2
        assert "client austen: this site does not send token_counts; use another algorithm" in capsys.readouterr().err
    assert over_globus(config, "algorithm=gram", "gram.min_tokens=1") == 2
    assert (
        "client austen: this site sends no statistics of fewer tokens than the width of an" in capsys.readouterr().err
    )
    write_site(site, DOMAINS[:3], may_send=["masks"])
    assert main(["doctor", str(config), "client_configs.train_configs.pruner=wanda"]) == 0


def test_a_site_counts_the_windows_of_the_steps_and_not_what_the_server_says_of_them():
    """A step of 128 windows asks for one batch, and the last batch of 129 windows has one window."""
    recovery = Recovery(rounds=1, steps=1, batch=128)
    settings = ClientSettings(client_id="a", data=OwnData(windows=129, length=128, batch=128), recovery=recovery)
    own = SiteFile(may_send=frozenset(SENDINGS), min_tokens=8192)
    with pytest.raises(ConfigError, match=r"client a: this site trains on no fewer tokens than 8192; .* take 128, "):
        globus_worker.require_consent(settings, own)
    settings.recovery = replace(recovery, steps=2)
    globus_worker.require_consent(settings, own)


def test_the_server_names_no_text(tmp_path, monkeypatch):
    """Not by a key either that a run over Globus Compute has no use for."""
    (tmp_path / "secret.txt").write_text("it " * 9999)
    (tmp_path / "site.yaml").write_text(f"clients: {{austen: {{text: {first_pages('austen')}}}}}")
    monkeypatch.setenv("FEDSPALLM_SITE", str(tmp_path / "site.yaml"))
    config = prepared_for_globus(load_config(write_config(tmp_path))[0])
    connection = globus.Connection(config, None, None, "run", globus.model_hash(DEMO / "model"))
    names = [f"austen.0.{number}" for number in range(8)]
    told = {"round": 0, "exchange": 0, "assign": {"austen": "0-7"}}
    asked = connection.request(config.clients[0], [], names) | {"down": [], "instructions": told}
    honest = globus_worker.run_exchange(json.loads(json.dumps(asked)))
    train = asked["config"]["train_configs"]
    train["data"] |= {"pool": [{"client_id": "austen", "text": str(tmp_path / "secret.txt"), "windows": 6}]}
    train["agreed"] = str(tmp_path / "written")
    bad = globus_worker.run_exchange(json.loads(json.dumps(asked)))
    assert [m["payload"] for m in bad["messages"]] == [m["payload"] for m in honest["messages"]]
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize(
    ("group", "key"), [("train_configs", "trainer"), ("train_configs", "loss_fn"), ("data_configs", "dataset")]
)
def test_a_server_sends_no_code_of_its_own(tmp_path, site, monkeypatch, group, key):
    """APPFL would run what it finds under these keys."""
    monkeypatch.setenv("HOME", str(tmp_path))  # where APPFL writes such code
    config = prepared_for_globus(load_config(write_config(tmp_path))[0])
    connection = globus.Connection(config, None, None, "run", globus.model_hash(DEMO / "model"))
    names = [f"austen.0.{number}" for number in range(8)]
    told = {"round": 0, "exchange": 0, "assign": {"austen": "0-7"}}
    asked = connection.request(config.clients[0], [], names) | {"down": [], "instructions": told}
    code = f"open({str(tmp_path / 'written')!r}, 'w').close()\n"
    asked["config"].setdefault(group, {}).update({f"{key}_source": code, f"{key}_name": "Mine"})
    (tmp_path / "mine.py").write_text(code)
    asked["config"]["train_configs"]["trainer"] = f"{tmp_path / 'mine.py'}:Mine"  # as runs on one machine may name it
    answer = globus_worker.run_exchange(json.loads(json.dumps(asked)))
    assert not (tmp_path / "written").exists()
    assert "messages" in answer


def test_a_task_asks_its_site_too(tmp_path, site, capsys, monkeypatch):
    """A server need not run the preflight."""
    write_site(site, DOMAINS[:3], may_send=["masks"])
    monkeypatch.setattr(globus_preflight, "require", lambda findings, least: None)
    assert over_globus(write_config(tmp_path)) == 2
    assert "client bible: this site does not send weights" in capsys.readouterr().out


def test_a_connection_that_was_lost_has_words_although_its_error_has_none(site):
    site.refusals = [AMQPConnectionError()]
    server = GlobusServer(ENDPOINTS)
    server.send_task_to_one_client("a", "prune", metadata={})
    assert "AMQPConnectionError" in server.recv_result_from_one_client(10).problem


def test_a_client_cannot_say_that_the_connection_was_lost(site):
    server = GlobusServer(ENDPOINTS)
    future = ComputeFuture("t")
    future.set_exception(TaskExecutionFailed("RuntimeError: SDK thread quit unexpectedly."))
    server.executing_task_futs[future] = Task("a", "prune", {})
    assert "SDK thread quit" in server.recv_result_from_one_client(0.1).problem


def test_the_sdk_has_what_is_used_of_it_although_it_is_not_documented():
    executor = globus_communicator.sdk_executor
    assert isinstance(executor._RESULT_WATCHERS, dict)
    assert callable(executor.Executor._load_tasks_status) and callable(executor.Executor._get_result_watcher)
    assert callable(executor._ResultWatcher.watch_for_task_results)


@pytest.mark.parametrize("lost", [AMQPConnectionError(), RuntimeError("SDK thread quit unexpectedly.")])
def test_a_task_that_the_sdk_has_lost_sight_of_is_found_again(site, monkeypatch, lost):
    """Three looks: there is no connection, it still runs, it is done."""
    answers = [OSError("no route"), None, {"messages": []}]
    watched = []

    def load(futures, client):
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        if answer:
            futures["t"].set_result(answer)
        return [future for future in futures.values() if not future.done()]

    monkeypatch.setattr(globus_communicator, "LOOK_AGAIN", 0.0)
    monkeypatch.setattr(globus_communicator.sdk_executor.Executor, "_load_tasks_status", load)
    server = GlobusServer(ENDPOINTS)
    watcher = SimpleNamespace(watch_for_task_results=lambda executor, futures: watched.extend(futures))
    server.gce._get_result_watcher = lambda: watcher

    def lose():
        [future] = server.executing_task_futs
        future.set_exception(lost)
        assert server.recv_result_from_one_client(0.1) is None

    server.executing_task_futs[ComputeFuture("t")] = Task("a", "prune", {})
    lose()
    assert server.recv_result_from_one_client(0.1) is None  # no route
    assert server.recv_result_from_one_client(0.1) is None and len(watched) == 1
    assert server.busy() == {"a"}
    lose()
    assert server.recv_result_from_one_client(0.1).result == {"messages": []}
    assert server.busy() == set()


def test_a_connection_that_stays_lost_ends_the_run(site, monkeypatch):
    def load(futures, client):
        raise OSError("no route")

    monkeypatch.setattr(globus_communicator, "LOOK_AGAIN", 0.0)
    monkeypatch.setattr(globus_communicator.sdk_executor.Executor, "_load_tasks_status", load)
    server = GlobusServer(ENDPOINTS, patience=0.2)
    server.look_for("a", "prune", {}, "t")
    assert server.recv_result_from_one_client(0.0) is None
    time.sleep(0.25)
    with pytest.raises(
        FederationError, match=r"no connection .*connection_deadline is 0\.2; tasks are out at a and go on"
    ):
        server.recv_result_from_one_client(0.0)


def test_a_result_that_fell_between_two_connections_is_looked_up(site, monkeypatch):
    def load(futures, client):
        futures["t"].set_result({"messages": []})
        return []

    monkeypatch.setattr(globus_communicator, "LOOK_UP", -1.0)
    monkeypatch.setattr(globus_communicator.sdk_executor.Executor, "_load_tasks_status", load)
    server = GlobusServer(ENDPOINTS)
    server.executing_task_futs[ComputeFuture("t")] = Task("a", "prune", {})
    assert server.recv_result_from_one_client(0.1).result == {"messages": []}
    assert server.busy() == set()


def test_a_task_that_the_service_does_not_know_is_sent_again(site, monkeypatch):
    monkeypatch.setattr(globus_communicator.sdk_executor.Executor, "_load_tasks_status", lambda *_, **__: [])
    server = GlobusServer(ENDPOINTS)
    server.gce._get_result_watcher = lambda: SimpleNamespace(watch_for_task_results=lambda executor, futures: None)
    server.look_for("a", "look_around", {"client": "a"}, "t")
    server.recv_result_from_one_client(0.0)
    [task] = server.executing_task_futs.values()
    assert (task.client, task.kind, task.request, task.sent) == ("a", "look_around", {"client": "a"}, 1)


def test_a_result_that_is_no_json_is_not_read(site):
    with pytest.raises(DeserializationError, match="DillDataBase64 disabled"):
        GlobusServer(ENDPOINTS).gce.serializer.deserialize(DillDataBase64().serialize({"messages": []}))


@functools.cache
def _exchanged(request):
    return json.dumps(globus_worker.run_exchange(json.loads(request)))


@pytest.fixture
def over_wire(tmp_path, monkeypatch):
    """Run a federation over a wire; gives events and aggregator."""
    texts = {name: {"text": str(first_pages(name))} for name in DOMAINS}
    (tmp_path / "site.yaml").write_text(yaml.safe_dump({"clients": texts, "may_send": list(SENDINGS)}))
    monkeypatch.setenv("FEDSPALLM_SITE", str(tmp_path / "site.yaml"))

    def over_wire(wire, file, *overrides, state=None):
        config = prepared_for_globus(load_config(file, overrides)[0])
        dense = globus.model_hash(Path(config.model.path))
        store = globus.open_store(vars(config.client_configs.comm_configs.store), "run", create=True)
        events = []
        connection = globus.Connection(config, wire, store, "run", dense)
        state = state or tmp_path / f"state-{time.monotonic_ns()}"
        aggregator = globus.run(config, state, events.append, connection)
        return events, aggregator

    return over_wire


@pytest.fixture
def federation(tmp_path, over_wire):
    """The same with the fastest of pruners."""
    quick = "client_configs.train_configs.pruner=magnitude"
    return lambda wire, **changes: over_wire(wire, write_config(tmp_path, **changes), quick)


class Wire:
    """Runs tasks in this process, and lets a test change what comes back or when.

    Attributes:
        change: client -> function of a result; None as result never comes.
        held: clients whose results wait until they are taken out of it.
        offline: clients whose endpoints are down.
    """

    def __init__(self, change=None):
        self.change = change or {}
        self.held = set()
        self.offline = set()
        self.tasks = []
        self.asked = []

    def exchanged(self, request):
        """A task's result; the same task gives the same one, and most tests change what others have sent."""
        return json.loads(_exchanged(json.dumps(request)))

    def send_task_to_one_client(self, client, kind, *, metadata):
        request = json.loads(json.dumps(metadata))
        self.asked.append(client)
        result = self.exchanged(request)
        self.tasks.append((client, request, self.change.get(client, lambda result: result)(result)))

    def recv_result_from_one_client(self, timeout=None):
        for task in self.tasks:
            client, request, result = task
            if result is not None and client not in self.held:
                self.tasks.remove(task)
                return Outcome(client, request, result)
        time.sleep(min(timeout, 0.05))
        return None

    def busy(self):
        return {client for client, _, _ in self.tasks}

    def task_ids(self):
        return {client: f"task of {client}" for client in self.busy()}

    def status_of(self, client):
        return "offline" if client in self.offline else "online"

    def forget(self, client):
        self.tasks = [task for task in self.tasks if task[0] != client]

    def shutdown_all_clients(self):
        self.tasks = []


class LastingWire(Wire):
    """The service and the sites, which outlive the server: tasks are found by their ids."""

    def __init__(self):
        super().__init__()
        self.out = {}  # id -> task

    def exchanged(self, request):
        return globus_worker.run_exchange(request)  # which places what the server will look for

    def send_task_to_one_client(self, client, kind, *, metadata):
        super().send_task_to_one_client(client, kind, metadata=metadata)
        self.out[f"task of {client}"] = self.tasks[-1]

    def look_for(self, client, kind, request, task_id):
        self.tasks.append(self.out[task_id])

    def restarted(self):
        """What a server that comes back begins with."""
        self.tasks = []
        return self


def test_a_server_that_comes_back_finds_its_tasks_and_ends_with_the_same_bits(over_wire, tmp_path, monkeypatch):
    store, state = tmp_path / "store", tmp_path / "state-of-one"
    store.mkdir()
    changes = {
        "algorithm": "consensus",
        "model": {"path": str(save_tiny(tmp_path / "model"))},
        "server_configs": {"num_global_epochs": 2, "scheduler_kwargs": {"max_open_blocks": 1}},
        "client_configs": {"comm_configs": {"store": {"connector": "file", "folder": str(store)}}},
    }
    file = write_config(tmp_path, **changes)
    knife, draw = Knife(monkeypatch.setattr), random.Random("consensus")
    expected = []
    knife.cut(None, lambda: expected.append(stored(over_wire(LastingWire(), file)[1])))
    moments, asked = knife.count, []
    for _ in range(3):
        wire = LastingWire()
        assert knife.cut(draw.randrange(1, moments), partial(over_wire, wire, file, state=state))
        assert stored(over_wire(wire.restarted(), file, state=state)[1]) == expected[0]
        assert uploads_in(store) == []
        asked.append(len(wire.asked))
        shutil.rmtree(state)
    exchanges = 2 * len(load_config(file)[0].clients) * 2
    assert min(asked) == exchanges  # somewhere nothing had to be asked for again
    assert max(asked) <= exchanges + 3


def test_a_site_writes_down_what_left_and_serves_what_it_has_approved(federation, tmp_path, capsys):
    """A run that nobody has approved, then approved, then the same with other windows."""
    file = tmp_path / "site.yaml"
    site = yaml.safe_load(file.read_text()) | {"audit": "audit.jsonl", "approved": "approved.txt"}
    file.write_text(yaml.safe_dump(site))
    with pytest.raises(FederationError, match=r"serves only configurations that it has approved, and \w{16} is not"):
        federation(LastingWire())
    assert main(["site", str(file)]) == 0
    names = re.findall(r"(\w{16})\s+client (\w+): fedspallm with magnitude", capsys.readouterr().out)
    assert sorted(client for _, client in names) == sorted(DOMAINS[:3])
    for name, _ in names:
        assert main(["site", str(file), "--approve", name]) == 0
    assert main(["site", str(file), "--approve", "0" * 16]) == 2
    (tmp_path / "audit.jsonl").unlink()
    _, aggregator = federation(LastingWire())
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert sorted(line["client"] for line in lines) == sorted(DOMAINS[:3])
    assert {line["configuration"] for line in lines} == {name for name, _ in names}
    for line in lines:
        assert (line["run"], line["function"], line["tokens"], line["error"]) == ("run", "prune", 6 * 64, "")
        assert len(line["left"]) == 8 and all(len(one["sha256"]) == 64 for one in line["left"])
    assert sum(one["bytes"] for line in lines for one in line["left"]) > 3 * 1_449_984 / 8  # masks
    with pytest.raises(FederationError, match="has approved"):
        federation(LastingWire(), client_configs={"data": {"windows": 5}})
    last = json.loads((tmp_path / "audit.jsonl").read_text().splitlines()[-1])
    assert last["left"] == [] and "has approved" in last["error"]
    file.write_text(yaml.safe_dump(site | {"audit": "no/where/audit.jsonl"}))
    with pytest.raises(FederationError, match="a file that the site file names cannot be written"):
        federation(LastingWire())


def test_nothing_leaves_that_was_made_of_fewer_tokens_than_a_site_asks_for(over_wire, tmp_path):
    file = tmp_path / "site.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"min_tokens": 6 * 64 + 1}))
    for pruner in ("sparsegpt", "wanda"):
        with pytest.raises(FederationError, match=r"made of fewer tokens than 385, and its windows have 384"):
            over_wire(Wire(), write_config(tmp_path), f"client_configs.train_configs.pruner={pruner}")


def uploads_in(folder):
    """What clients have placed and nobody has removed."""
    return [file.name for file in folder.iterdir() if not file.name.startswith(("run", "down."))]


def absences(events):
    return {(event["round"], event["client"]): event["why"] for event in events if event["event"] == "absent"}


def stored(aggregator):
    done = aggregator.global_model.done
    return {
        (block, name, part): getattr(packed, part).view(torch.uint8).tolist()
        for block in done.blocks()
        for name, packed in done.get(block).items()
        for part in ("mask", "values")
    }


def with_messages(change):
    def changed(result):
        change(result["messages"])
        return result

    return changed


def payload_of(message):
    return from_bytes(base64.b64decode(message["payload"]["inline"]), "test")


def repacked(message, payload):
    message["payload"] = {"inline": base64.b64encode(to_bytes(payload)).decode()}


def other_round(messages):
    repacked(messages[0], payload_of(messages[0]) | {"round": 7})


def last_of_other_round(messages):
    """By then others have sent all of theirs and wait for the end of the round."""
    repacked(messages[-1], payload_of(messages[-1]) | {"round": 7})


def twice(messages):
    messages[1]["payload"] = messages[0]["payload"]


def half(messages):
    for message in messages[4:]:
        repacked(message, {})


def metadata(**more):
    return with_messages(lambda messages: messages[0]["metadata"].update(more))


def first_payload(place):
    return with_messages(lambda messages: messages[0].update(payload=place))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda result: [1], "it is not a dict"),
        (lambda result: {}, "it has no messages, expected 8"),
        (lambda result: {"messages": ["x"]}, "it has 1 messages, expected 8"),
        (lambda result: {"messages": ["x"] * 8}, "message 0 has no payload"),
        (lambda result: {"error": {"message": "\x1b[2Jgone", "traceback": 3}}, "[2Jgone"),
        (first_payload({}), "neither in the data store nor in the result"),
        (first_payload({"inline": "?"}), "neither in the data store nor in the result"),
        (first_payload({"stored": "../../secret"}), "neither in the data store nor in the result"),
        (first_payload({"inline": base64.b64encode(b"\xff" * 40).decode()}), "its description cannot be read"),
        (metadata(samples="6"), "message 0: "),
        (metadata(blocking=True), "message 0: "),
        (metadata(self=1), "message 0: "),
        (lambda result: {"error": {"message": "SDK thread quit unexpectedly."}}, "SDK thread quit"),
        (metadata(notes="[1]"), "message 0: "),
        (metadata(_chunk_idx=3), "says that it is 3 of 8"),
        (with_messages(lambda messages: messages.pop()), "it has 7 messages, expected 8"),
        (with_messages(other_round), "it is for round 7, this is round 0"),
        (with_messages(last_of_other_round), "it is for round 7, this is round 0"),
        (with_messages(twice), "was sent before"),
        (with_messages(half), "ended round 0 without block 4"),
    ],
)
def test_a_result_that_is_not_what_was_asked_for_is_refused_and_the_others_go_on(federation, change, why):
    events, aggregator = federation(Wire({"bible": change}))
    refused = absences(events)
    assert list(refused) == [(0, "bible")]
    assert why in refused[0, "bible"] and "\x1b" not in refused[0, "bible"]
    assert len(aggregator.global_model.done.blocks()) == 8


def test_a_client_that_fails_in_the_middle_names_the_block_and_leaves_nothing_in_the_store(
    federation, tmp_path, monkeypatch
):
    (tmp_path / "store").mkdir()
    next_message, host, text = LocalClient.next_message, "elsewhere", first_pages("bible")

    def fail_late(self):
        if self.settings.client_id == "bible" and self._progress.next_message == 5:
            raise OSError(f"no room for {text}")
        return next_message(self)

    monkeypatch.setattr(LocalClient, "next_message", fail_late)
    monkeypatch.setattr(globus_worker.socket, "gethostname", lambda: host)
    store = {"connector": "file", "folder": str(tmp_path / "store")}
    events, _ = federation(Wire(), client_configs={"comm_configs": {"store": store}})
    [absent] = [event for event in events if event["event"] == "absent"]
    assert (absent["why"], absent["host"], absent["blocks"]) == ("OSError: no room for <private text>", host, "5")
    assert "fail_late" in absent["traceback"] and "calib" not in absent["traceback"]
    assert uploads_in(tmp_path / "store" / "run") == []


def test_a_site_with_another_model_is_refused(federation, tmp_path):
    shutil.copytree(DEMO / "model", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})

    class OtherModel(Wire):
        def send_task_to_one_client(self, client, kind, *, metadata):
            file = tmp_path / "site.yaml"
            site = yaml.safe_load(file.read_text()) | {"model": "model"}
            file.write_text(yaml.safe_dump(site if client == "bible" else {"clients": site["clients"]}))
            _exchanged.cache_clear()
            super().send_task_to_one_client(client, kind, metadata=metadata)

    events, _ = federation(OtherModel())
    [(where, why)] = absences(events).items()
    assert where == (0, "bible")
    assert "is not the server's, weights differ" in why and "name a copy of the server's model in the site file" in why


def test_who_failed_before_anything_was_folded_leaves_no_trace(federation):
    _, without = federation(Wire({"csource": lambda result: {}}))
    _, aggregator = federation(Wire({"csource": first_payload({})}))
    assert stored(aggregator) == stored(without)


def test_a_round_ends_at_its_deadline_with_those_who_answered(federation):
    wire = Wire({"austen": lambda result: None})
    events, aggregator = federation(wire, server_configs={"round_deadline": 1.5, "num_global_epochs": 2})
    assert absences(events) == {
        (0, "austen"): "it had not answered in time",
        (1, "austen"): "it is still working on an earlier round",
    }
    assert aggregator.finished


def test_a_client_whose_endpoint_went_down_in_a_task_is_asked_again_once_it_is_up(federation):
    class Restarted(Wire):
        def forget(self, client):
            super().forget(client)
            self.offline, self.change = set(), {}

    wire = Restarted({"austen": lambda result: None})
    wire.offline = {"austen"}
    events, aggregator = federation(wire, server_configs={"round_deadline": 5, "num_global_epochs": 3})
    assert absences(events) == {(0, "austen"): "it had not answered in time", (1, "austen"): "its endpoint is offline"}
    assert wire.asked.count("austen") == 2
    assert aggregator.finished


def test_too_few_answers_by_the_deadline_end_the_run_with_all_reasons(federation):
    wire = Wire({"austen": lambda result: None, "bible": lambda result: {}})
    with pytest.raises(FederationError) as caught:
        federation(wire, server_configs={"round_deadline": 0.5, "min_clients": 2})
    for words in ("round 1: 1 of 3 clients have answered, at least 2", "bible: refused", "austen: no answer in time"):
        assert words in str(caught.value)


def test_a_late_answer_is_thrown_away_and_its_client_takes_part_again(federation, tmp_path):
    store = tmp_path / "store"
    store.mkdir()

    class LateWire(Wire):
        def send_task_to_one_client(self, client, kind, *, metadata):
            super().send_task_to_one_client(client, kind, metadata=metadata)
            if client == "csource":
                self.held = {"csource"} if self.asked.count("csource") == 1 else set()

        def busy(self):
            if self.asked.count("austen") == 2:  # the second round is on
                self.held = set()
            return super().busy()

    changes = {
        "server_configs": {"round_deadline": 1.0, "num_global_epochs": 3},
        "client_configs": {"comm_configs": {"store": {"connector": "file", "folder": str(store)}}},
    }
    wire = LateWire()
    wire.held = {"csource"}
    events, _ = federation(wire, **changes)
    assert set(absences(events)) <= {(0, "csource"), (1, "csource")}
    assert (0, "csource") in absences(events)
    assert not [why for why in absences(events).values() if "refused" in why]
    assert {event["round"] for event in events if event["event"] == "upload" and event["client"] == "csource"} >= {2}
    assert uploads_in(store / "run") == []


def test_what_went_down_is_told_again_until_it_is_replaced(tmp_path):
    """A client keeps nothing, so each task is told of all blocks that are agreed on, and of none twice."""

    class Places:
        def __init__(self):
            self.removed = set()

        def place(self, payload, name):
            return {"stored": name}

        def remove(self, names):
            self.removed |= names

    connection = Places()
    down = globus.Downlink(connection, ["weights", "masks", "weights"])
    down.add([{"blocks": {"0": {"q": 1, "up": 1}}}, {"blocks": {"1": {"q": 1}}}])
    down.add([{"blocks": {"2": {"q": 1}}}, {"blocks": {"0": {"q": 1}}}])
    assert [place["stored"] for place in down.places] == ["down.0", "down.1", "down.2", "down.3"]
    down.add([{"blocks": {"0": {"up": 1, "q": 1}}}, {}])
    assert [place["stored"] for place in down.places] == ["down.1", "down.2", "down.4"]
    assert connection.removed == {"down.0", "down.3"}
    down.add([{"exchange": 1, "blocks": {"0": {"up": 1, "q": 1}}}])  # of another kind: masks, say
    assert [place["stored"] for place in down.places] == ["down.1", "down.2", "down.4", "down.5"]
    down.add([{"exchange": 2, "blocks": {"0": {"up": 1, "q": 1}}}])  # of the same kind: recovered weights
    assert [place["stored"] for place in down.places] == ["down.1", "down.2", "down.5", "down.6"]
