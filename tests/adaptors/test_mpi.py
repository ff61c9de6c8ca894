"""Real MPI processes: the same bits as in one process, and an end at once when a rank fails."""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedspallm_appfl.cli import main
from fedspallm_appfl.runs import mpi
from helpers.experiments import UNEVEN, merge, small_config
from helpers.paths import DEMO, ROOT, TESTS
from helpers.processes import ENVIRONMENT, end, fedspallm, finish, mpiexec, start, without_mpiexec
from helpers.tiny import events, linears, save_tiny, tiny_config, weights

pytestmark = [pytest.mark.mpi, without_mpiexec]
WHOLE_GRAMS = {"precision": "fp32", "propagate": "pruned", "target": "dense"}
RECOVERY = {"rounds": 2, "steps": 2}
TWO = {"device": "auto", "devices": ["cpu", "cpu"]}
SPLIT = {"client_configs": {"comm_configs": {"compression": "zstd", "max_message_bytes": 9000}}}
CHOSEN = {"allocation": {"method": "fisher", "windows": 4, "length": 32, "width": "0.2"}}
ALGORITHMS = {  # four clients with unequal windows, two to a rank, that take part in some blocks of two rounds
    "gram": ("gram", {"gram": {"precision": "int8"}, "recovery": RECOVERY}, "cumulative"),
    "gram sweep": ("gram", {"gram": WHOLE_GRAMS}, "latest"),
    "gram blocks": (
        "gram",
        {
            "gram": {"propagate": "pruned", "stride": 2},
            "recovery": {**RECOVERY, "rank": 2},
            "client_configs": {"train_configs": TWO},
        },
        "latest",
    ),
    "consensus": ("consensus", {**SPLIT, **CHOSEN, "recovery": {**RECOVERY, "scope": "blockwise"}}, "latest"),
    "own pruner": (
        "fedspallm",
        {"plugins": [str(ROOT / "examples/plugins/ria.py")], "client_configs": {"train_configs": {"pruner": "ria"}}},
        "latest",
    ),
}
ALONE = "one client a rank"


def uneven(folder, count):
    """Everything that could depend on the layout of ranks, with messages smaller than a block and one block open."""
    changes = {"client_configs": {"comm_configs": {"max_message_bytes": 140_000}}}
    merge(changes, {"server_configs": {**UNEVEN["server_configs"], "scheduler_kwargs": {"max_open_blocks": 1}}})
    return small_config(folder, count, **changes, clients=UNEVEN["clients"][:count])


def partly(folder, model, name):
    """Four clients, two of which take part in some blocks of each round only."""
    algorithm, settings, fold = ALGORITHMS[name]
    server = {"num_global_epochs": 2, "aggregator_kwargs": {"fold": fold}, "device": "cpu"}
    config = tiny_config(folder, model, algorithm, 4, **settings, server_configs=server)
    shares = [f"clients.{client}.train_configs.resource_share={share}" for client, share in ((1, 0.67), (2, 0.34))]
    return config, shares


def as_one(folder):
    """In a model of one block there is nothing to sweep over, and the sum of all statistics is that of all the text."""
    model = save_tiny(folder / "model", torch.float32, blocks=1)
    gram = {"precision": "fp32", "first_input": "private"}
    return tiny_config(folder / "four", model, "gram", 4, gram=gram), tiny_config(
        folder / "one", model, "centralized", 4
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs in three ranks, a job for all of them, as each job takes long to start; and in five, two of which fold.

    Returns:
        Name -> words of the command line; each has its results in `mpi` and `folded` beside its configuration; and what the
        first job said.
    """
    folder, model = tmp_path_factory.mktemp("runs"), save_tiny(tmp_path_factory.mktemp("model"))
    commands = {}
    (folder / ALONE).mkdir()
    commands[ALONE] = [str(uneven(folder / ALONE, 2))]
    for name in ALGORITHMS:
        config, overrides = partly(folder / name, model, name)
        commands[name] = [str(config), *overrides]
    commands["four"] = [str(as_one(folder)[0])]
    apart = tiny_config(
        folder / "apart", folder / "model", "standalone", 4
    )  # of one block: a fold rank has nothing to do
    commands["apart"] = [str(apart)]

    def job(name, *more):
        words = [[*words, *more, f"run_dir={Path(words[0]).with_name(name)}"] for words in commands.values()]
        (folder / name).with_suffix(".json").write_text(
            json.dumps([["run", *one, "--launcher", "mpi"] for one in words])
        )
        return sys.executable, "-m", "helpers.mpi_commands", folder / f"{name}.json"

    environment = ENVIRONMENT | {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    }
    code, out, err = finish(mpiexec(3, *job("mpi"), env=environment))
    assert code == 0, err
    code, _, err = finish(mpiexec(5, *job("folded", "server_configs.fold_ranks=2"), env=environment))
    assert code == 0, err
    return commands, out


def same_files(serial, over_mpi, *names):
    return all((serial / name).read_bytes() == (over_mpi / name).read_bytes() for name in names)


def same_statistics(serial, over_mpi):
    for file in (serial / "statistics").glob("*"):
        one, other = load_file(file), load_file(over_mpi / "statistics" / file.name)
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", [ALONE, *ALGORITHMS])
def test_mpi_gives_the_bits_of_one_process(runs, name):
    config, *overrides = runs[0][name]
    serial = Path(config).with_name("run")
    assert main(["run", config, *overrides]) == 0
    over_mpi, folded = serial.with_name("mpi"), serial.with_name("folded")
    for other in (over_mpi, folded):
        assert same_files(serial, other, "model/model.safetensors", "manifest.json")
        same_statistics(serial, other)
        assert what_happened(serial, "measured") == what_happened(other, "measured") != {}
    assert what_happened(over_mpi, "upload") == what_happened(folded, "upload") != {}
    steps = (
        [(turn, step) for turn in (0, 1) for step in (0, 1) for _ in range(4)]
        if name in ("gram", "gram blocks")
        else []
    )
    for other in (over_mpi, folded):
        assert sorted((one["turn"], one["step"]) for one in events(other, "step")) == steps


def test_models_of_single_clients_are_those_of_one_process(runs):
    serial = Path(runs[0]["apart"][0]).with_name("run")
    assert main(["run", *runs[0]["apart"]]) == 0
    models = sorted(file.relative_to(serial) for file in (serial / "models").rglob("*.safetensors"))
    assert len(models) == 4
    for other in ("mpi", "folded"):
        assert same_files(serial, serial.with_name(other), *models)


def what_happened(folder, kind):
    """What clients sent or measured, without what depends on the clock or the machine."""
    drop = {"time", "seconds", "host", "notes"}
    return {
        (one["client"], one.get("round"), one.get("exchange"), one.get("message")): {
            key: value for key, value in one.items() if key not in drop
        }
        for one in events(folder, kind)
    }


def test_the_server_says_what_it_does_in_plain_text(runs):
    out = runs[1]
    assert out.startswith("fedspallm-appfl ")
    assert "\n2 clients, 2 rounds, FedSpaLLM with sparsegpt" in out and "prunes 56 matrices" in out
    assert out.count("Placement") == len(runs[0]) and "\x1b" not in out


def test_four_clients_over_mpi_are_as_good_as_one_with_all_the_text(runs, tmp_path):
    alone = as_one(tmp_path)[1]
    assert main(["run", str(alone)]) == 0
    four = Path(runs[0]["four"][0]).with_name("mpi")
    together, apart = linears(weights(alone.with_name("run"))), linears(weights(four))
    for name, tensor in together.items():
        assert torch.equal(apart[name] != 0, tensor != 0)
        assert torch.allclose(apart[name], tensor, rtol=1e-4, atol=1e-5)


def ranks_of(config):
    """Process ids of the ranks that run a configuration."""
    lines = {
        entry.name: (entry / "cmdline").read_bytes()
        for entry in Path("/proc").glob("[0-9]*")
        if (entry / "cmdline").exists()
    }
    return [
        int(pid)
        for pid, line in lines.items()
        if f"fedspallm_appfl\0run\0{config}".encode() in line and b"-n\0" not in line
    ]


def test_a_killed_rank_ends_the_job(tmp_path):
    config = small_config(tmp_path, 2, client_configs={"data": {"windows": 60, "length": 256, "batch": 1}})
    job = fedspallm(3, config)
    metrics = tmp_path / "run" / "metrics.jsonl"
    until = time.monotonic() + 120
    while not (metrics.exists() and '"upload"' in metrics.read_text()):
        assert time.monotonic() < until and job.poll() is None, end(job)
        time.sleep(0.2)
    os.kill(max(ranks_of(config)), signal.SIGKILL)
    code, _, err = finish(job, 60)
    assert code != 0
    assert not ranks_of(config)


def test_a_failing_client_ends_the_job_with_its_reason(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(DEMO / "model", model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    code, _, err = finish(fedspallm(3, small_config(tmp_path, 2, model={"path": str(model)})))
    assert code != 0
    assert "block 3, mlp.down_proj: its inputs hold NaN or infinity" in err


class ServerRank:
    """MPI as rank 0 of some sees it, as far as it comes before something is wrong."""

    def __init__(self, ranks):
        self.ranks = ranks
        self.aborted = []
        self.Get_rank, self.Get_size, self.Abort = (lambda: 0), (lambda: ranks), self.aborted.append


@pytest.mark.parametrize(
    ("ranks", "overrides", "words"),
    [
        (5, [], "2 clients can use 1 to 2 client ranks, got 5 ranks in all"),
        (
            2,
            ["algorithm=centralized"],
            "centralized pools the text of all clients in one process; run it without --launcher mpi",
        ),
    ],
)
def test_what_cannot_be_run_so_is_explained_and_ends_the_job(tmp_path, monkeypatch, capsys, ranks, overrides, words):
    rank = ServerRank(ranks)
    monkeypatch.setattr(mpi, "communicator", lambda: rank)
    before = signal.getsignal(signal.SIGTERM)
    try:
        main(["run", str(small_config(tmp_path, 2)), "--launcher", "mpi", *overrides])
    finally:
        signal.signal(signal.SIGTERM, before)
    err = capsys.readouterr().err
    assert err.startswith("rank 0: error: ") and err.count(words) == 1
    assert rank.aborted == [2]
    assert not (tmp_path / "run").exists()


def test_a_bad_configuration_is_reported_once(tmp_path):
    code, _, err = finish(fedspallm(2, small_config(tmp_path, 2), "client_configs.train_configs.sparsity=1.5"))
    assert code != 0
    assert err.count("sparsity is a share in [0, 1), got 1.5") == 1


def knife(moment, *words, ranks=0):
    """Start a command whose server is killed at a moment."""
    environment = ENVIRONMENT | {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    }
    command = (sys.executable, "-m", "helpers.knife", moment, *words, *(["--launcher", "mpi"] if ranks else []))
    return finish(mpiexec(ranks, *command, env=environment) if ranks else start(*command, env=environment))


KILLS = int(os.environ.get("FEDSPALLM_KILLS", "1"))  # `make kills` has twenty


@pytest.mark.timeout(600 + 200 * KILLS)
def test_a_job_that_was_killed_goes_on_with_other_ranks_and_ends_with_the_same_bits(tmp_path):
    """Killed by kill -9 in three ranks or as one process, and then gone on with in two ranks, three, or as one process."""
    settings = {"num_global_epochs": 2, "aggregator_kwargs": {"fold": "cumulative"}}
    changes = {"server_configs": settings, "recovery": RECOVERY, "checkpoint_every": 1e-6}
    config = tiny_config(tmp_path, save_tiny(tmp_path / "model"), "fedspallm", 4, **changes)
    code, _, err = knife(0, "run", config, f"run_dir={tmp_path / 'whole'}")
    assert code == 0, err
    moments, draw = int(err.split()[-1]), random.Random(0)
    for number in range(KILLS):
        for ranks, later in ((3, 2), (0, 3)) if KILLS > 1 else ((3, 2),):
            folder = tmp_path / f"{number}-{ranks}"
            # In ranks the server writes alone; and a run has a few moments more or less, as hidden states take their time.
            at = draw.randrange(1, moments // 3 if ranks else 9 * moments // 10)
            code, _, err = knife(at, "run", config, f"run_dir={folder}", ranks=ranks)
            assert code, err
            code, out, err = knife(0, "run", config, "--resume", f"run_dir={folder}", ranks=later)
            assert code == 0, err
            assert same_files(tmp_path / "whole", folder, "model/model.safetensors", "manifest.json")
            assert not (folder / "state").exists() and not (folder / ".lock").exists()


def test_a_client_that_fails_is_left_out_and_the_others_go_on(tmp_path):
    """One of two clients of a rank fails in each round, then both."""
    model, least = save_tiny(tmp_path / "model"), {"min_clients": 2, "num_global_epochs": 2}
    each = {"comm_configs": {"blocks_per_message": 1}}
    pruner = tmp_path / "pruner.py"
    pruner.write_text(FAILING)
    changes = {"server_configs": least, "client_configs": each, "plugins": [str(pruner)]}
    job, runs = [], {}
    for failing in (["austen"], ["austen", "bible"]):
        config = tiny_config(tmp_path / str(len(failing)), model, "fedspallm", 4, **changes)
        names = [f"clients.{number}.train_configs.pruner=failing" for number in range(len(failing))]
        runs[tuple(failing)] = config.parent / "run"
        job.append(["run", str(config), "--launcher", "mpi", *names])
    (tmp_path / "job.json").write_text(json.dumps(job))
    environment = ENVIRONMENT | {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    }
    code, _, err = finish(
        mpiexec(3, sys.executable, "-m", "helpers.mpi_commands", tmp_path / "job.json", env=environment)
    )
    assert code == 0, err
    for failing, run in runs.items():
        absent = [(event["round"], event["client"]) for event in events(run, "absent")]
        assert sorted(absent) == [(index, name) for index in range(2) for name in failing]
        last = [event["clients"] for event in events(run, "block") if event["block"] == 2]
        assert last == [sorted({"austen", "bible", "csource", "sqldocs"} - set(failing))] * 2


def test_clients_of_secure_sums_fall_out_at_each_stage_as_in_one_process(tmp_path):
    """A quarter of the clients, before keys, shares, words, or opening; the same bits as in one process."""
    model, secure = save_tiny(tmp_path / "model"), {"secure_sums": True, "min_clients": 3}
    stages = [("gram", stage) for stage in ("_advertise", "_share", "mask", "_open")] + [("consensus", "mask")]
    folders, job = [], {"serial": [], "mpi": []}
    for number, (algorithm, stage) in enumerate(stages):
        folder = tmp_path / str(number)
        (tmp_path / f"{number}.py").write_text(FALLS_OUT.format(stage=stage))
        changes = {"server_configs": secure, "plugins": [str(tmp_path / f"{number}.py")]}
        config = tiny_config(folder, model, algorithm, 4, **changes)
        for launcher, commands in job.items():
            commands.append(["run", str(config), "--launcher", launcher, f"run_dir={folder / launcher}"])
        folders.append(folder)
    environment = ENVIRONMENT | {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    }
    for launcher, commands in job.items():
        (tmp_path / f"{launcher}.json").write_text(json.dumps(commands))
        command = (*HELPER, tmp_path / f"{launcher}.json")
        started = mpiexec(3, *command, env=environment) if launcher == "mpi" else start(*command, env=environment)
        code, _, err = finish(started)
        assert code == 0, err
    for folder in folders:
        assert same_files(folder / "serial", folder / "mpi", "model/model.safetensors", "manifest.json")
        for launcher in job:
            assert [event["client"] for event in events(folder / launcher, "absent")] == ["sqldocs"]


HELPER = (sys.executable, "-m", "helpers.mpi_commands")
FAILING = """
import torch

import fedspallm_appfl as fs

calls = []

@fs.pruner("failing", needs=fs.InputNorms, keeps_weights=True)
def failing(weight, target, inputs):
    calls.append(weight.shape)
    if len(calls) > 7:  # after a block
        calls.clear()
        raise RuntimeError("no more memory")
    return ~fs.select(weight.abs(), target, per_row=False)
"""
FALLS_OUT = """
from fedspallm_appfl.rounds.hidden.client import Hiding

for name in ("_advertise", "_share", "mask", "_open"):  # what another plugin has changed in this process
    honest = getattr(Hiding, "honest" + name, getattr(Hiding, name))
    setattr(Hiding, "honest" + name, honest)
    setattr(Hiding, name, honest)

def fails(self, *given):
    if self._name == "sqldocs":
        raise RuntimeError("gone")
    return getattr(self, "honest{stage}")(*given)

Hiding.{stage} = fails
"""
