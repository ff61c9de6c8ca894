"""Real MPI processes: the same bits as in one process, and an end at once when a rank fails."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedspallm_appfl.cli import main
from helpers.experiments import UNEVEN, small_config
from helpers.paths import DEMO
from helpers.processes import fedspallm, finish, without_mpiexec
from helpers.tiny import linears, save_tiny, tiny_config, weights

pytestmark = [pytest.mark.mpi, without_mpiexec]


@pytest.mark.parametrize("ranks", [4, 3], ids=["one client a rank", "batched"])
def test_mpi_gives_the_bits_of_one_process(tmp_path, ranks):
    waiting = {"scheduler_kwargs": {"max_open_blocks": 1}}
    split = {"client_configs": {"comm_configs": {"max_message_bytes": 140_000}}}
    config = small_config(tmp_path, **{**UNEVEN, **split, "server_configs": {**UNEVEN["server_configs"], **waiting}})
    code, out, err = finish(fedspallm(ranks, config, f"run_dir={tmp_path / 'mpi'}"))
    assert code == 0, err
    assert "Placement" in out and "\x1b" not in out
    assert out.startswith("3 clients, 2 rounds, FedSpaLLM with sparsegpt") and "prunes 56 matrices" in out
    assert main(["run", str(config)]) == 0
    serial, mpi = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "mpi"))
    assert all(torch.equal(serial[name], mpi[name]) for name in serial)
    reports = [(tmp_path / name / "manifest.json").read_text() for name in ("run", "mpi")]
    assert reports[0] == reports[1]


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
        assert time.monotonic() < until and job.poll() is None
        time.sleep(0.2)
    os.kill(max(ranks_of(config)), signal.SIGKILL)
    started = time.monotonic()
    code, _, err = finish(job, 60)
    assert code != 0
    assert time.monotonic() - started < 30
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


@pytest.mark.parametrize(
    ("ranks", "words"), [(5, "2 clients can use 1 to 2 client ranks, got 4"), (1, "needs at least 2 ranks")]
)
def test_a_wrong_number_of_ranks_is_explained(tmp_path, ranks, words):
    code, _, err = finish(fedspallm(ranks, small_config(tmp_path, 2)))
    assert code != 0
    assert words in err
    assert not (tmp_path / "run").exists()


def test_a_bad_configuration_is_reported_once(tmp_path):
    code, _, err = finish(fedspallm(3, small_config(tmp_path, 2), "client_configs.train_configs.sparsity=1.5"))
    assert code != 0
    assert err.count("sparsity is a share in [0, 1), got 1.5") == 1


@pytest.mark.parametrize(
    ("algorithm", "ranks", "settings"),
    [
        ("gram", 3, {"gram": {"precision": "int8"}}),
        ("gram", 3, {"gram": {"precision": "fp32", "propagate": "pruned", "target": "dense"}}),
        ("consensus", 3, {"client_configs": {"comm_configs": {"compression": "zstd", "max_message_bytes": 9000}}}),
    ],
    ids=["gram", "gram sweep", "consensus"],
)
def test_every_algorithm_gives_the_bits_of_one_process(tmp_path, algorithm, ranks, settings):
    """Four clients with unequal windows, two to a rank, that take part in some blocks of two rounds."""
    config = tiny_config(tmp_path, save_tiny(tmp_path / "model"), algorithm, 4, **settings)
    overrides = [f"clients.{number}.train_configs.resource_share={share}" for number, share in ((1, 0.67), (2, 0.34))]
    fold = "latest" if algorithm == "consensus" or "propagate" in settings["gram"] else "cumulative"
    overrides.append(f"server_configs={{num_global_epochs: 2, aggregator_kwargs: {{fold: {fold}}}, device: cpu}}")
    code, _, err = finish(fedspallm(ranks, config, f"run_dir={tmp_path / 'mpi'}", *overrides))
    assert code == 0, err
    assert main(["run", str(config), *overrides]) == 0
    for name in ("model/model.safetensors", "manifest.json"):
        assert (tmp_path / "mpi" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    for file in (tmp_path / "run" / "statistics").glob("*"):
        one, other = load_file(file), load_file(tmp_path / "mpi" / "statistics" / file.name)
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_four_clients_over_mpi_are_as_good_as_one_with_all_the_text(tmp_path):
    """In a model of one block there is nothing to sweep over, and the sum of all statistics is that of all the text."""
    model = save_tiny(tmp_path / "model", torch.float32, blocks=1)
    gram = {"precision": "fp32", "first_input": "private"}
    config = tiny_config(tmp_path / "four", model, "gram", 4, gram=gram)
    code, _, err = finish(fedspallm(3, config))
    assert code == 0, err
    alone = tiny_config(tmp_path / "one", model, "centralized", 4)
    assert main(["run", str(alone)]) == 0
    together, apart = (linears(weights(tmp_path / name / "run")) for name in ("one", "four"))
    for name, tensor in together.items():
        assert torch.equal(apart[name] != 0, tensor != 0)
        assert torch.allclose(apart[name], tensor, rtol=1e-4, atol=1e-5)


def test_centralized_is_for_one_process(tmp_path):
    config = tiny_config(tmp_path, save_tiny(tmp_path / "model"), "centralized", 2)
    code, _, err = finish(fedspallm(2, config))
    assert code != 0
    assert err.count("centralized pools the text of all clients in one process; run it without --launcher mpi") == 1
    assert not (tmp_path / "run").exists()
