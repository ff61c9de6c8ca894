"""`train_configs.devices`: whole runs whose clients deal their batches among two devices, and what is refused."""

from io import StringIO

import pytest
import torch
from rich.console import Console

import fedspallm_appfl as fs
from fedspallm_appfl.estimates import processes
from fedspallm_appfl.estimates.job import Job
from fedspallm_appfl.estimates.memory import ON_GPU, client_memory, further_device
from fedspallm_appfl.estimates.tables import tables
from fedspallm_appfl.globus.site import inspection
from fedspallm_appfl.globus.site.site_file import Site
from fedspallm_appfl.reports.parts import bytes_text
from fedspallm_appfl.settings.reading import load_config
from fedspallm_appfl.settings.rules import check
from fedspallm_appfl.settings.schema import ClientSettings
from helpers.experiments import DOMAINS, first_pages
from helpers.tiny import save_tiny, tiny_config

HOW = {"windows": 6, "length": 24, "batch": 2, "threads": 1, "overwrite": True, "sparsity": "2:4"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"), torch.float32)


def config_with(folder, model, devices, **train):
    shared = {"train_configs": {"device": "auto", "devices": devices, **train}}
    return load_config(tiny_config(folder, model, "fedspallm", client_configs=shared))[0]


@pytest.mark.parametrize("algorithm", ["fedspallm", "gram"])
def test_a_run_with_two_devices_prunes_exactly_and_twice_the_same(algorithm, model, tmp_path):
    texts = {name: first_pages(name) for name in DOMAINS[:2]}
    settings = HOW | {"algorithm": algorithm, "devices": ["cpu", "cpu"], "workers": 1}
    if algorithm == "gram":
        settings |= {"gram": {"first_input": "private"}}
    first, second = (fs.prune(model, texts, tmp_path / name, **settings) for name in "ab")
    assert (first.model / "model.safetensors").read_bytes() == (second.model / "model.safetensors").read_bytes()
    assert {one.sparsity for one in first.matrices} == {0.5}
    assert "cpu, cpu" in (tmp_path / "a" / "report.md").read_text()


@pytest.mark.parametrize(
    ("devices", "train", "says"),
    [
        (["cuda:0", "cuda:0"], {}, "each GPU once, and no CPU beside them; got cuda:0, cuda:0"),
        (["cuda:0", "cpu"], {}, "each GPU once, and no CPU beside them; got cuda:0, cpu"),
        (["cuda:0", "auto"], {}, "cuda:N with the number of each GPU, or cpu; got 'auto'"),
        (["cuda:0", "cuda:00"], {}, "cuda:N with the number of each GPU, or cpu; got 'cuda:00'"),
        (["cuda:0", "cuda:1"], {"device": "cuda:0"}, "take the place of train_configs.device, got cuda:0 there"),
    ],
)
def test_devices_that_do_not_go_together_are_refused(devices, train, says, model, tmp_path):
    assert any(says in problem for problem in check(config_with(tmp_path, model, devices, **train)))


def test_each_device_needs_a_batch(model, tmp_path):
    """Six windows in batches of four are two batches, seven and eight too, nine are three."""
    problems = check(config_with(tmp_path, model, ["cuda:0", "cuda:1", "cuda:2"]))
    assert problems[0].startswith(
        "clients.0.train_configs.devices: each needs a batch, got 3 and 6 windows in batches of 4;"
    )
    assert all("each needs a batch" in problem for problem in problems) and len(problems) == 3
    assert not check(config_with(tmp_path, model, ["cuda:0", "cuda:1"]))


def test_several_processes_do_not_share_the_devices_of_a_client(model, tmp_path):
    config = tiny_config(tmp_path, model, "fedspallm", workers="2")
    both = ["client_configs.train_configs.device=auto", "client_configs.train_configs.devices=[cpu, cpu]"]
    problems = check(load_config(config, both)[0])
    assert any("has them to itself, got workers: 2; set workers to 1" in problem for problem in problems)


def test_an_estimate_counts_a_block_its_statistics_and_a_pass_on_each_further_device(model, tmp_path):
    def needed(devices):
        job = Job.of(config_with(tmp_path / str(devices), model, ["cpu"] * devices))
        return client_memory(job, job.clients[0]).parts

    assert "further devices" not in needed(1)
    two, four = needed(2), needed(4)
    assert two["further devices"] > two["one block"]
    assert four["further devices"] == 3 * two["further devices"]


def test_an_estimate_tells_first_and_further_gpus_apart(model, tmp_path):
    job = Job.of(config_with(tmp_path, model, ["cuda:0", "cuda:1"]))
    parts, further = client_memory(job, job.clients[0]).parts, further_device(job, job.clients[0])
    assert "further devices" not in parts
    assert further["one block"] == parts["one block"]
    console = Console(width=200, record=True, file=StringIO())
    console.print(tables(job))
    first = sum(size for part, size in parts.items() if part in ON_GPU)
    name, more = job.clients[0].client_id, bytes_text(sum(further.values()))
    says = f"first GPU of {name}: {bytes_text(first)}; each further one: {more}"
    assert says in console.export_text()


def test_a_site_shows_the_memory_of_each_gpu_of_a_client(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", {"cuda:0": (1e9, 8e9), "cuda:1": (2e9, 8e9)}.__getitem__)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device[-1]}")
    settings = ClientSettings(client_id="a", devices=["cuda:0", "cuda:1"])
    assert inspection._look_at_gpu({}, settings, Site()) == "card 0, 1.0 of 8.0 GB free; card 1, 2.0 of 8.0 GB free"


def test_a_client_with_several_devices_has_the_run_to_itself(model, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "WORTH", 1.0)
    monkeypatch.setattr(processes, "cores", lambda: 64)
    assert processes.settled(config_with(tmp_path, model, [])).workers != "1"
    assert processes.settled(config_with(tmp_path, model, ["cpu", "cpu"])).workers == "1"
