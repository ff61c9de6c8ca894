"""Real Globus Compute: SDK, RabbitMQ, Redis and two endpoint daemons with HTEX engines, around a double of the service."""

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
import yaml
from globus_compute_sdk.sdk import executor as sdk_executor
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from fedspallm_appfl.cli import main
from fedspallm_appfl.estimates import over_globus as estimate_globus
from fedspallm_appfl.globus.server import communicator as globus_communicator
from helpers import processes
from helpers.alongside import alongside
from helpers.experiments import DOMAINS, UNEVEN, small_config
from helpers.globus_double.world import BIN, CREDENTIALS, NEWER, World, missing, newer_environment, wait_until
from helpers.paths import DEMO
from helpers.s3_double import BUCKET, keys, s3_service

pytestmark = [
    pytest.mark.globus,
    pytest.mark.skipif(bool(missing()), reason=f"not installed: {', '.join(missing())}"),
]
SITES = {"a": ("austen",), "b": ("bible", "csource")}
OUTSIDE = "00000000-0000-4000-8000-0000000000ff"  # an endpoint id that nobody has registered
LONG = {"windows": 90, "length": 256, "batch": 1}  # all of its text: some seconds of work


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two endpoints: one speaks for one client and runs our functions only, the other speaks for two."""
    folder = tmp_path_factory.mktemp("world")
    with World(folder) as world, pytest.MonkeyPatch.context() as patch:
        for key in (*CREDENTIALS, "GLOBUS_SDK_ENVIRONMENT", "GLOBUS_SDK_SERVICE_URL_AUTH", "NO_PROXY", "no_proxy"):
            patch.setenv(key, world.environment[key])
        patch.setenv("GLOBUS_COMPUTE_USER_DIR", str(folder / "server"))
        world.endpoint_of = {}
        with contextlib.redirect_stdout(io.StringIO()) as told:
            assert main(["functions"]) == 0
        world.functions = yaml.safe_load(told.getvalue())
        for name, clients in SITES.items():
            start_site(world, name, clients, functions=world.functions["allowed_functions"] if name == "a" else ())
        (folder / "store").mkdir()
        yield world


@pytest.fixture(autouse=True)
def all_servers_run(world):
    """What one test has broken fails the next ones at once, not each at its limit."""
    world.check()


def start_site(world, name, clients, *lines, **options):
    """Start an endpoint that speaks for clients; further lines of shell come before its worker."""
    texts = {client: {"text": str(DEMO / "text" / client / "calib.txt")} for client in clients}
    site = world.folder / f"site-{name}.yaml"
    site.write_text(yaml.safe_dump({"clients": texts}))
    endpoint = world.start_endpoint(name, "\n".join((f"export FEDSPALLM_SITE={site}", *lines)), **options)
    world.endpoint_of |= dict.fromkeys(clients, endpoint)


def ask_redis(world, *words):
    code, out, err = processes.run("redis-cli", "-p", world.redis_port, *words)
    assert code == 0, err
    return out


@pytest.fixture
def store(world):
    """Settings of a data store that all sites reach, and what is left in it."""
    folder = world.folder / "store"

    def settings(connector):
        return {"store": {"connector": connector, "folder": str(folder), "port": world.redis_port}}

    yield settings
    assert ask_redis(world, "KEYS", "*").split() == ["somebody-elses"]
    assert list(folder.iterdir()) == []


def write_config(world, folder, count=3, **changes):
    """A configuration as the server's side writes it, without any path of a client."""
    file = small_config(folder, count, **changes)
    config = yaml.safe_load(file.read_text())
    for client in config["clients"]:
        client["endpoint_id"] = world.endpoint_of[client["client_id"]]
        client["data"].pop("text")
    config["server_configs"] |= world.functions["server_configs"]
    file.write_text(yaml.safe_dump(config))
    return file


def start(world, *words, folder=BIN):
    """Start the command line in a process of its own."""
    return processes.start(folder / "python", "-m", "fedspallm_appfl", *words, env=world.environment_of(folder))


@pytest.fixture
def fedspallm(world, capsys):
    """The command line in this process, which has imported APPFL already; gives exit code, output and error output."""

    def fedspallm(*words):
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return fedspallm


def same_bits(a, b):
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (a, b))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def submissions(world):
    """(status, bytes) of every submission of tasks so far."""
    return [(status, size) for _, path, status, size in world.ask("/seen")["requests"] if path.endswith("/submit")]


def answered(world):
    """How many tasks have been answered so far."""
    return sum(task["state"] != "sent" for task in world.ask("/seen")["tasks"].values())


def events(folder):
    log = folder / "metrics.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def uploads(folder):
    return [event for event in events(folder) if event["event"] == "upload"]


def columns(table):
    """The text of each column of a table, folded lines joined."""
    rows = [line.strip("│┃").replace("┃", "│").split("│") for line in table.splitlines() if line.startswith(("│", "┃"))]
    return [" ".join(" ".join(cells).split()) for cells in zip(*rows, strict=True)]


def test_a_site_can_list_its_endpoints(world):
    """The ids that it tells the server's operator."""
    code, out, err = processes.run(BIN / "globus-compute-endpoint", "list", env=world.environment)
    assert code == 0, err
    assert world.endpoint_of["austen"] in out


def test_the_doctor_names_what_each_site_lacks(world, tmp_path, fedspallm):
    config = write_config(world, tmp_path)
    code, out, err = fedspallm("doctor", config)
    assert code == 0, out + err
    assert "Preflight" in out and "no:" not in out
    assert " ".join(columns(out)).count("windows wanted, enough") == 3
    raw = yaml.safe_load(config.read_text())
    raw["clients"][0]["client_id"] = "stranger"
    raw["clients"][1]["data"]["length"] = 10**5
    raw["clients"][2]["endpoint_id"] = OUTSIDE
    config.write_text(yaml.safe_dump(raw))
    code, out, err = fedspallm("doctor", config)
    assert code == 2, out + err
    client, endpoint, *_, text, store = columns(out)
    assert client == "client stranger bible csource"
    assert f"endpoint_id {OUTSIDE} is unknown; globus-compute-endpoint list shows the right one" in endpoint
    assert "no: client stranger: the site file of this endpoint lists austen" in text
    assert "no: client bible: 6 calibration windows of 100000 tokens" in text
    assert "calib.txt" not in out


def test_an_endpoint_runs_no_function_that_its_site_does_not_know(world, tmp_path, fedspallm):
    registered_anew = [f"server_configs.functions.{name}=null" for name in ("look_around", "prune")]
    code, out, err = fedspallm("doctor", write_config(world, tmp_path, 2), *registered_anew)
    assert code == 2, out + err
    endpoint = columns(out)[1]
    assert "not permitted" in endpoint and "set server_configs.functions" in endpoint and "online" in endpoint


def test_a_bucket_needs_no_account_at_a_site(world, tmp_path, fedspallm, monkeypatch):
    with s3_service() as url:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "server")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        where = {"store": {"connector": "s3", "bucket": BUCKET, "url": url}}
        config = write_config(world, tmp_path, 2, client_configs={"comm_configs": where})
        code, out, err = fedspallm("run", config, "--launcher", "globus", f"run_dir={tmp_path / 'globus'}")
        assert code == 0, out + err
        assert keys(url) == []
    assert fedspallm("run", small_config(tmp_path, 2))[0] == 0
    assert same_bits(tmp_path / "run", tmp_path / "globus")
    assert all(size < 3 * 10**4 for _, size in submissions(world)[-4:])


@pytest.mark.parametrize("connector", ["none", "file", "redis"])
def test_two_rounds_give_the_bits_of_one_process(world, tmp_path, store, fedspallm, connector):
    """The workers live on from one connector to the next."""
    ask_redis(world, "SET", "somebody-elses", "1")
    before = len(submissions(world))
    config = write_config(world, tmp_path, **UNEVEN, client_configs={"comm_configs": store(connector)})
    code, out, err = fedspallm("run", config, "--launcher", "globus", f"run_dir={tmp_path / 'globus'}")
    assert code == 0, out + err
    assert fedspallm("run", small_config(tmp_path, **UNEVEN))[0] == 0
    assert same_bits(tmp_path / "run", tmp_path / "globus")
    sizes = [size for _, size in submissions(world)[before:]]
    assert len(sizes) == 3 + 2 * 3 + 3  # the preflight, two rounds, and measuring on the clients' own text
    assert max(sizes) > 10**6 if connector == "none" else max(sizes) < 10**4


@pytest.fixture(scope="module")
def large_model(tmp_path_factory):
    """A model whose packed blocks exceed what a task of Globus Compute carries."""
    folder = tmp_path_factory.mktemp("large")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (DEMO / "model" / name).exists():
            shutil.copy(DEMO / "model" / name, folder)
    vocabulary = json.loads((DEMO / "model" / "config.json").read_text())["vocab_size"]
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 3, "num_attention_heads": 8}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **sizes)).half().save_pretrained(folder)
    return folder


def test_what_is_too_large_for_a_task_is_refused_before_and_at_the_site_and_goes_through_a_store(
    world, tmp_path, store, large_model, fedspallm, monkeypatch
):
    large = {"model": {"path": str(large_model), "dtype": "float32"}}
    run = ("run", write_config(world, tmp_path, 1, **large), "--launcher", "globus")
    before = len(submissions(world))
    code, _, err = fedspallm(*run)
    assert code == 2
    assert "what a client sends in an exchange may take 14.2 MB before compression, 7 MB fit" in err
    assert len(submissions(world)) == before  # nothing was sent
    with monkeypatch.context() as patch:
        patch.setattr(estimate_globus, "check_sizes", lambda config: [])
        code, out, err = fedspallm(*run)
    assert code == 2, out + err
    assert "Globus Compute allows 10000000; set client_configs.comm_configs.store" in err
    write_config(world, tmp_path, 1, **large, client_configs={"comm_configs": store("redis")})
    code, out, err = fedspallm(*run, "--overwrite")
    assert code == 0, out + err
    assert sum(upload["bytes"] for upload in uploads(tmp_path / "run")) > 10**7


def absences(folder):
    return [event for event in events(folder) if event["event"] == "absent"]


def test_a_client_whose_task_raises_is_named_with_its_traceback(world, tmp_path, fedspallm):
    config = write_config(world, tmp_path, server_configs={"min_clients": 2})
    raw = yaml.safe_load(config.read_text())
    raw["clients"][1]["data"]["length"] = 10**5  # at the same worker as the next client, and before it
    config.write_text(yaml.safe_dump(raw))
    code, out, err = fedspallm("run", config, "--launcher", "globus")
    assert code == 0, out + err
    assert (
        f"round 1 continues without client bible, host {socket.gethostname()}: client bible: 6 calibration windows"
        in out
    )
    assert 'site/worker.py", line' in out and "calib.txt" not in out
    assert "| 1 | austen, csource |" in (tmp_path / "run" / "report.md").read_text()


def test_an_endpoint_that_never_answers_is_done_without(world, tmp_path, fedspallm):
    config = write_config(world, tmp_path, server_configs={"min_clients": 2, "round_deadline": 120})
    raw = yaml.safe_load(config.read_text())
    raw["clients"][1]["endpoint_id"] = world.register_endpoint("nobody-starts-it")
    config.write_text(yaml.safe_dump(raw))
    code, out, err = fedspallm("run", config, "--launcher", "globus")
    assert code == 0, out + err
    assert "offline; at its site" in " ".join(columns(out[out.index("Preflight") :].split("round 1")[0]))
    assert [event["client"] for event in absences(tmp_path / "run")] == ["bible"]


def worker_of(site):
    """(process id, CPU ticks) of the worker of a site: of those in whose environment its file is named the busiest leaf."""
    times, parents = {}, set()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if f"{site}.yaml".encode() in (entry / "environ").read_bytes():
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                times[int(entry.name)] = int(fields[11]) + int(fields[12])
                parents.add(int(fields[1]))
    return max(((pid, times[pid]) for pid in times.keys() - parents), key=lambda worker: worker[1])


def wait_for(happened, process, seconds=200):
    until = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > until or process.poll() is not None:
            pytest.fail(f"it did not come to that; the process said {processes.end(process)}")
        time.sleep(0.05)


def long_for(config, index):
    raw = yaml.safe_load(config.read_text())
    raw["clients"][index]["data"] = LONG
    config.write_text(yaml.safe_dump(raw))


def test_a_worker_that_is_killed_costs_its_task_only(world, tmp_path):
    config = write_config(world, tmp_path)
    long_for(config, 1)
    before = len(submissions(world))
    job = start(world, "run", config, "--launcher", "globus")
    wait_for(lambda: len(submissions(world)) > before + 3, job)  # the preflight is over
    pid, ticks = worker_of("site-b")
    os.kill(pid, signal.SIGSTOP)  # until both tasks of the site have been sent
    wait_for(lambda: len(submissions(world)) == before + 3 + 3, job)
    os.kill(pid, signal.SIGCONT)
    wait_for(lambda: worker_of("site-b")[1] > ticks + 30, job)  # it prunes: one that is killed idle may hold a lock
    os.kill(pid, signal.SIGKILL)
    code, out, err = processes.finish(job)
    assert code == 0, out + err
    [absent] = absences(tmp_path / "run")
    assert absent["client"] == "bible"
    assert "WorkerLost" in absent["why"] + absent["traceback"]
    assert {upload["client"] for upload in uploads(tmp_path / "run")} == {"austen", "csource"}


def test_a_round_ends_at_its_deadline_and_the_process_ends_although_a_task_has_no_answer(world, tmp_path, store):
    ask_redis(world, "SET", "somebody-elses", "1")
    deadline = {"round_deadline": 20}
    config = write_config(world, tmp_path, 2, server_configs=deadline, client_configs={"comm_configs": store("file")})
    before = len(submissions(world))
    job = start(world, "run", config, "--launcher", "globus")
    wait_for(lambda: len(submissions(world)) > before + 2, job)  # the preflight is over
    pid, _ = worker_of("site-b")
    os.kill(pid, signal.SIGSTOP)
    try:
        code, out, err = processes.finish(job, 120)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert code == 0, out + err
    [absent] = absences(tmp_path / "run")
    assert (absent["client"], absent["why"]) == ("bible", "it had not answered in time")


@pytest.fixture(scope="module")
def newer(world):
    """Programs of the newer SDK and endpoint, with an endpoint that speaks for a fourth client."""
    folder = newer_environment(world.folder / "newer")
    told = "python -c 'import globus_compute_sdk as sdk; print(sdk.__version__)'"
    line = f"{told} > {world.folder / 'version-of-workers'}"
    start_site(world, "newer", DOMAINS[3:], line, programs=folder, contact="tester@example.invalid")
    return folder


def first_and_last(config):
    raw = yaml.safe_load(config.read_text())
    raw["clients"] = [raw["clients"][0], raw["clients"][-1]]
    raw["server_configs"]["num_clients"] = 2
    config.write_text(yaml.safe_dump(raw))
    return config


def test_servers_and_endpoints_of_different_versions_give_the_bits_of_one_process(world, newer, tmp_path, fedspallm):
    """Two servers at a time, each with a client at an endpoint of either version."""
    version = "import globus_compute_sdk as sdk; print(sdk.__version__)"
    code, asked, err = processes.run(newer / "python", "-c", version)
    assert code == 0, err
    assert f"globus-compute-sdk=={asked}" in NEWER.read_text()
    run = ("run", first_and_last(write_config(world, tmp_path, 4)), "--launcher", "globus")
    newer_server = start(world, *run, f"run_dir={tmp_path / 'newer'}", folder=newer)
    code, out, err = fedspallm(*run, f"run_dir={tmp_path / 'pinned'}")
    assert code == 0, out + err
    code, out, err = processes.finish(newer_server)
    assert code == 0, out + err
    assert (world.folder / "version-of-workers").read_text() == asked
    assert fedspallm("run", first_and_last(small_config(tmp_path, 4)))[0] == 0
    assert same_bits(tmp_path / "run", tmp_path / "pinned")
    assert same_bits(tmp_path / "run", tmp_path / "newer")


def test_a_connection_that_is_lost_until_the_sdk_gives_up_costs_nothing(
    world, tmp_path, fedspallm, monkeypatch, caplog
):
    init = sdk_executor._ResultWatcher.__init__
    monkeypatch.setattr(init, "__defaults__", (0.5, 1, *init.__defaults__[2:]))  # one attempt instead of five
    monkeypatch.setattr(globus_communicator, "LOOK_AGAIN", 1.0)
    config = write_config(world, tmp_path)
    long_for(config, 0)
    before = len(submissions(world))

    def restart():
        wait_until(lambda: len(submissions(world)) == before + 3 + 3, "the round")
        world.restart_broker(lambda: wait_until(lambda: "connection to Globus Compute was lost" in caplog.text, "loss"))

    with alongside(restart):
        code, out, err = fedspallm("run", config, "--launcher", "globus")
    assert code == 0, out + err
    assert absences(tmp_path / "run") == []


def test_an_endpoint_that_is_stopped_and_started_between_two_rounds_takes_part_in_both(world, tmp_path):
    settings = {"num_global_epochs": 2, "round_deadline": 90}
    config = write_config(world, tmp_path, 2, server_configs=settings)
    before, answers = len(submissions(world)), answered(world)
    job = start(world, "run", config, "--launcher", "globus")
    wait_for(lambda: len(submissions(world)) > before + 2, job)  # the preflight is over
    pid, _ = worker_of("site-a")
    os.kill(pid, signal.SIGSTOP)  # so that the round does not end
    try:
        wait_for(lambda: answered(world) >= answers + 2 + 1, job)
        world.stop_endpoint("b")
        world.run_endpoint("b")
    finally:
        os.kill(pid, signal.SIGCONT)
    code, out, err = processes.finish(job)
    assert code == 0, out + err
    assert absences(tmp_path / "run") == []


def test_an_endpoint_that_dies_in_a_task_is_done_without(world, tmp_path):
    """Its task has no answer ever; in the second round the service knows that it is down."""
    settings = {"num_global_epochs": 2, "round_deadline": 25}
    config = write_config(world, tmp_path, 2, server_configs=settings)
    long_for(config, 1)
    before = len(submissions(world))
    job = start(world, "run", config, "--launcher", "globus")
    wait_for(lambda: len(submissions(world)) == before + 2 + 2, job)
    world.lose_endpoint("b")
    code, out, err = processes.finish(job)
    assert code == 0, out + err
    assert [event["client"] for event in absences(tmp_path / "run")] == ["bible", "bible"]
    assert [event["why"] for event in absences(tmp_path / "run")] == [
        "it had not answered in time",
        "its endpoint is offline",
    ]
