"""The scripts of examples/appfl, started as a user would: each writes the model that `fedspallm run` writes."""

import re
import shutil
import socket
import sys

import pytest
import torch
import transformers as t
import yaml
from safetensors.torch import load_file

from fedspallm_appfl.cli import main
from helpers.experiments import whole_text
from helpers.paths import DEMO, ROOT
from helpers.processes import finish, mpiexec, start, without_mpiexec

SERVER = ROOT / "examples" / "appfl" / "server.yaml"


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The tensors of a run in one process with the settings of the YAML files."""
    folder = tmp_path_factory.mktemp("serial")
    server, train = (yaml.safe_load(SERVER.read_text())[f"{side}_configs"] for side in ("server", "client"))
    train = train["train_configs"]
    config = {
        "run_dir": str(folder / "run"),
        "seed": train["seed"],
        "model": train["model"] | {"path": str(DEMO / "model")},
        "server_configs": {"num_global_epochs": server["num_global_epochs"], "device": "cpu"},
        "client_configs": {
            "train_configs": {key: train[key] for key in ("sparsity", "pruner", "device", "threads")},
            "data": train["data"],
            "comm_configs": train["comm"],
        },
        "clients": [
            {
                "client_id": client,
                "data": {"text": str(whole_text(name))},
                "train_configs": {"resource_share": server["aggregator_kwargs"]["roster"][client]},
            }
            for client, name in (("Client1", "austen"), ("Client2", "bible"))
        ],
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["run", str(folder / "config.yaml")]) == 0
    return load_file(folder / "run" / "model" / "model.safetensors")


@pytest.fixture
def checkout(tmp_path):
    """A folder where the paths of the YAML files lead somewhere, with the scripts and a free port in them."""
    shutil.copytree(ROOT / "examples" / "appfl", tmp_path / "examples" / "appfl")
    (tmp_path / "examples" / "demo").symlink_to(DEMO)
    (tmp_path / "src").symlink_to(ROOT / "src")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    for file in (tmp_path / "examples" / "appfl").glob("*.yaml"):
        text, replaced = re.subn("127.0.0.1:50051", f"127.0.0.1:{port}", file.read_text())
        assert replaced == 1
        file.write_text(text)
    return tmp_path


def check_model(folder, said, expected):
    """The model loads, has the bits that were expected, and is 2:4 sparse."""
    written = load_file(folder / "model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    model = t.AutoModelForCausalLM.from_pretrained(folder)
    pruned = {name: weight for name, weight in model.named_parameters() if "_proj" in name}
    assert len(pruned) == 56
    for name, weight in pruned.items():
        assert (weight.reshape(-1, 4) == 0).sum(1).min() >= 2
        assert f"0.5000  {name}" in said


@pytest.mark.mpi
@without_mpiexec
def test_over_mpi_it_writes_the_model_of_a_run(checkout, expected):
    code, out, err = finish(mpiexec(3, sys.executable, "-m", "mpi4py", "examples/appfl/run_mpi.py", cwd=checkout))
    assert code == 0, err
    check_model(checkout / "runs" / "appfl" / "model", out, expected)


@pytest.mark.slow
def test_over_grpc_it_writes_the_model_of_a_run(checkout, expected):
    script = sys.executable, "examples/appfl/run_grpc.py"
    clients = [start(*script, "client", number, cwd=checkout) for number in (2, 1)]  # they wait for the server
    server = start(*script, "server", cwd=checkout)
    try:
        for process in (*clients, server):
            code, out, err = finish(process)
            assert code == 0, err
        check_model(checkout / "runs" / "appfl" / "model", out, expected)
    finally:
        for process in (*clients, server):
            process.kill()
