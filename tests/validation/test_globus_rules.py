"""What a run over Globus Compute asks of a configuration, of an endpoint, and of the installed SDK."""

import importlib
import io
import shutil
import sys

import pytest
from globus_compute_sdk.serialize.facade import parse_allowlist
from rich.console import Console
from safetensors.torch import load_file, save_file

from fedspallm_appfl import __version__
from fedspallm_appfl.adaptors import registration
from fedspallm_appfl.errors import FederationError
from fedspallm_appfl.estimates import over_globus as estimate_globus
from fedspallm_appfl.globus.server import preflight as globus_preflight
from fedspallm_appfl.globus.server.preflight import Cell
from fedspallm_appfl.globus.site.site_file import load_site
from fedspallm_appfl.models.storage.checkpoint import config_hash, model_hash, weights_hash
from fedspallm_appfl.settings import yaml_text as yaml_io
from fedspallm_appfl.settings.reading import load_config
from fedspallm_appfl.texts.checks import look_at
from fedspallm_appfl.validation.rules import check, check_for_globus, check_on_this_machine, prepared_for_globus
from helpers.paths import DEMO, ROOT

SERVER, STORE = "server_configs", "client_configs.comm_configs.store"
ENDPOINTS = [f"clients.{n}.endpoint_id=00000000-0000-4000-8000-00000000000{n}" for n in range(4)]


def demo(*overrides):
    config, problems = load_config(ROOT / "configs" / "demo.yaml", [*ENDPOINTS, *overrides])
    assert problems == []
    return config


@pytest.mark.parametrize(
    ("override", "why"),
    [
        (f"{SERVER}.min_clients=0", f"{SERVER}.min_clients: at least 1, got 0"),
        (f"{SERVER}.min_clients=5", f"{SERVER}.min_clients: at most 4, got 5"),
        (f"{SERVER}.round_deadline=0", f"{SERVER}.round_deadline: seconds, greater than 0"),
        (f"{SERVER}.round_deadline=.nan", f"{SERVER}.round_deadline: seconds, greater than 0"),
        (f"{SERVER}.preflight_deadline=-1", f"{SERVER}.preflight_deadline: seconds, greater than 0"),
        (
            "clients.1.endpoint_id=mine",
            "clients.1.endpoint_id: the UUID that globus-compute-endpoint list shows; got 'mine'",
        ),
        (f"{SERVER}.functions.prune={ENDPOINTS[0][-36:]}", f"{SERVER}.functions: the two UUIDs"),
        (f"{STORE}.connector=ftp", f"{STORE}.connector: one of none, file, redis, s3, endpoint; got 'ftp'"),
        (f"{STORE}.connector=s3", f"{STORE}.bucket: name an S3 bucket"),
        (f"{STORE}={{connector: s3, bucket: a/b}}", f"{STORE}.bucket: name an S3 bucket"),
        (f"{STORE}={{connector: s3, bucket: abc, url: minio:9000}}", f"{STORE}.url: http:// or https://"),
        (f"{STORE}={{connector: s3, bucket: abc, url: 'https://me:secret@host'}}", f"{STORE}.url: http:// or https://"),
        (f"{STORE}.connector=endpoint", f"{STORE}.endpoints: the UUIDs"),
        (f"{STORE}={{connector: endpoint, endpoints: [mine]}}", "at each site; got ['mine']"),
        (f"{STORE}.connector=file", f"{STORE}.folder: name a folder"),
        (f"{STORE}={{connector: file, folder: exchange}}", "from the root; got 'exchange'"),
        (f"{STORE}={{connector: s3, bucket: abc, url: 'https://KEY:SECRET'}}", f"{STORE}.url: http:// or https://"),
        (f"{STORE}={{connector: redis, port: 0}}", f"{STORE}.port: at least 1, got 0"),
        ("clients.1.comm_configs.store.folder=x", "clients.1.comm_configs.store: the same for every client"),
    ],
)
def test_a_wrong_value_is_named(override, why):
    problems = check(demo(override))
    assert len(problems) == 1 and why in problems[0]


def test_every_client_needs_an_endpoint_over_globus_and_a_text_on_this_machine():
    config = demo("clients.2.endpoint_id=null", "clients.1.data.text=null")
    assert check(config) == []
    [problem] = check_for_globus(config)
    assert problem.startswith("clients.2.endpoint_id: client 'csource' has no endpoint")
    [problem] = check_on_this_machine(config)
    assert problem.startswith("clients.1.data.text: client 'bible' has no private text here")
    assert not config.over_globus() and demo().over_globus()


def test_the_example_is_one_that_works(monkeypatch):
    folder = ROOT / "examples" / "globus"
    config, problems = load_config(folder / "server.yaml")
    assert problems + check(config) + list(check_for_globus(config)) == []
    assert list(estimate_globus.check_sizes(config)) == []
    monkeypatch.setenv("FEDSPALLM_SITE", str(folder / "site.yaml"))
    assert look_at(load_site(config.clients[0].client_id).text, None)
    engine = yaml_io.load((folder / "user_config_template.yaml.j2").read_text())["engine"]
    allowed = parse_allowlist(engine["allowed_serializers"])
    assert {one.__name__ for one in allowed} == {"PureSourceTextInspect", "JSONData"}
    assert "export FEDSPALLM_SITE=" in engine["provider"]["worker_init"]


def test_an_algorithm_that_makes_no_sense_over_globus_is_refused():
    assert list(check_for_globus(demo("algorithm=standalone"))) == []
    [problem] = check_for_globus(demo("algorithm=centralized"))
    assert problem.startswith("algorithm: centralized has the text of all clients in one place")


def test_a_prepared_configuration_names_no_text_and_compresses():
    config = prepared_for_globus(demo(f"{STORE}.connector=redis"))
    groups = [config.client_configs, *config.clients]
    assert {group.data.text for group in groups} == {None}
    assert {group.comm_configs.compression for group in groups} == {"zstd"}
    assert {group.comm_configs.max_message_bytes for group in groups} == {2**29 - 2**20}
    assert (
        prepared_for_globus(demo("client_configs.comm_configs.compression=none")).clients[0].comm_configs.compression
        == "none"
    )


def test_what_travels_is_measured_before_it_is_sent(monkeypatch):
    """724,992 of 1,449,984 weights are kept in the demo's 56 matrices: two bytes each, and a bit for every weight."""
    config = demo(f"{SERVER}.num_global_epochs=2", "evaluation.compare=[]")
    size = 2 * 724_992 + 1_449_984 // 8
    assert list(estimate_globus.check_sizes(config)) == []
    monkeypatch.setattr(estimate_globus, "INLINE_LIMIT", size - 1)
    up, down = estimate_globus.check_sizes(config)
    assert "what a client sends in an exchange may take 1.6 MB before compression" in up
    assert "what is sent to a client may take 1.6 MB" in down
    monkeypatch.setattr(estimate_globus, "INLINE_LIMIT", size)
    assert list(estimate_globus.check_sizes(config)) == []
    monkeypatch.setattr(estimate_globus, "INLINE_LIMIT", 1_449_984 // 8)
    wanda = demo("client_configs.train_configs.pruner=wanda")
    assert list(estimate_globus.check_sizes(wanda)) == []
    monkeypatch.setattr(estimate_globus, "INLINE_LIMIT", 0)
    assert list(estimate_globus.check_sizes(demo(f"{STORE}.connector=redis"))) == []


def test_the_communicator_can_be_imported_without_the_login_manager_that_newer_sdks_lack(monkeypatch):
    importlib.import_module("globus_compute_sdk")  # 4.8 needs the module itself
    name = "globus_compute_sdk.sdk.login_manager"
    for module in [module for module in sys.modules if module.startswith((name, "appfl.comm.globus_compute"))]:
        monkeypatch.delitem(sys.modules, module)

    class Gone:
        """Says of the module what Python says where it does not exist."""

        def find_spec(self, wanted, path=None, target=None):
            if wanted == name:
                raise ModuleNotFoundError(f"No module named {wanted!r}", name=wanted)

    monkeypatch.setattr(sys, "meta_path", [Gone(), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("appfl.comm.globus_compute")
    monkeypatch.setitem(sys.modules, name, None)  # undone after the test
    del sys.modules[name]
    registration.guard_login_manager()
    assert importlib.import_module("appfl.comm.globus_compute").GlobusComputeServerCommunicator


def test_a_login_manager_that_is_there_is_left_alone():
    registration.guard_login_manager()
    assert importlib.import_module("globus_compute_sdk.sdk.login_manager").AuthorizerLoginManager is not None


def cells(result, **more):
    class Outcome:
        client, problem = "a", "TaskExecutionFailed: it broke"

    Outcome.result = result
    return {"endpoint": Cell(True, "online"), **globus_preflight._read(Outcome, None)}


INSTALLED = {"fedspallm-appfl": __version__, "appfl": "1.12.0", "torch": "0.1", "transformers": "0.2"}
FINE = {"ok": True, "says": "fine"}
CHECKS = {"GPU": FINE, "model": FINE, "text": FINE, "store": FINE}


def answer(**changes):
    return {"host": "node", "python": "3.11.7", "versions": INSTALLED, "checks": CHECKS, **changes}


@pytest.mark.parametrize(
    ("result", "column", "words"),
    [
        (None, "endpoint", "TaskExecutionFailed: it broke"),
        (answer(python="3.9.2"), "Python", "3.9.2, 3.10 or newer is needed; add to worker_init"),
        (answer(python=None), "Python", "3.10 or newer is needed"),
        (
            answer(versions={}),
            "packages",
            "not installed: fedspallm-appfl, appfl, torch, transformers; add to worker_init",
        ),
        (answer(versions={**INSTALLED, "fedspallm-appfl": "0.0.1"}), "packages", "0.0.1, the server has"),
        (answer(not_importable="no module zstandard"), "packages", "cannot be imported: no module zstandard"),
        (answer(checks={**CHECKS, "model": {"ok": False, "says": "weights differ"}}), "model", "weights differ"),
        (answer(checks={**CHECKS, "store": {"ok": 1, "says": "\x1b[31m?"}}), "store", "[31m?"),
        (answer(checks={}), "text", "FEDSPALLM_SITE must name the site file"),
        (answer(checks=3), "text", "FEDSPALLM_SITE must name the site file"),
    ],
)
def test_a_red_cell_says_what_to_change(result, column, words):
    found = cells(result)
    red = [name for name, cell in found.items() if not cell.ok]
    assert red == [column] and words in found[column].says
    assert "\x1b" not in found[column].says
    with pytest.raises(FederationError, match="0 of 1 clients can take part, 1 are needed"):
        globus_preflight.require({"a": found}, None)


def test_all_green_may_run_and_versions_that_differ_from_the_servers_show():
    found = cells(answer())
    globus_preflight.require({"a": found}, None)
    globus_preflight.require({"a": found, "b": {"endpoint": Cell(False, "offline")}}, 1)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(globus_preflight.table({"a": found}))
    text = console.export_text()
    assert "torch 0.1, here" in text and "no:" not in text


def test_a_model_is_told_from_another_of_the_same_shapes(tmp_path):
    shutil.copytree(DEMO / "model", tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace("{", '{"transformers_version": "9", "_name_or_path": "x",', 1))
    assert model_hash(tmp_path / "model") == model_hash(DEMO / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    assert config_hash(tmp_path / "model") == config_hash(DEMO / "model")
    assert weights_hash(tmp_path / "model") != weights_hash(DEMO / "model")
    config.write_text(config.read_text().replace("rms_norm_eps", "rms_norm_epsilon"))
    assert config_hash(tmp_path / "model") != config_hash(DEMO / "model")
