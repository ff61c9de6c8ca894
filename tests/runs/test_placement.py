"""Which rank takes which clients, and which device each of them runs on."""

import ast
import os

import pytest
import torch

from fedspallm_appfl.devices import choose_device, choose_devices
from fedspallm_appfl.errors import ConfigError
from fedspallm_appfl.runs.placement import batches, describe
from fedspallm_appfl.settings.schema import Client, TrainConfigs
from helpers.paths import ROOT


@pytest.fixture
def gpus(monkeypatch):
    """Let the process see some GPUs."""
    return lambda count: monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("clients", "ranks", "expected"),
    [
        ("abcde", 3, ["ab", "cd", "e"]),
        ("abcde", 1, ["abcde"]),
        ("abcde", 5, ["a", "b", "c", "d", "e"]),
        ("abcde", 2, ["abc", "de"]),
        ("abcdef", 3, ["ab", "cd", "ef"]),
    ],
)
def test_clients_are_dealt_out_to_ranks_in_runs_of_neighbours(clients, ranks, expected):
    assert batches(list(clients), ranks) == list(map(list, expected))


def test_every_client_has_one_rank_and_no_rank_two_more_than_another():
    for count in range(1, 20):
        clients = list(map(str, range(count)))
        for ranks in range(1, count + 1):
            dealt = batches(clients, ranks)
            assert sum(dealt, []) == clients
            assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


@pytest.mark.parametrize("ranks", [0, 4, 9])
def test_a_number_of_ranks_that_clients_cannot_use_says_which_they_can(ranks):
    message = f"3 clients can use 1 to 3 client ranks, got {ranks + 1} ranks in all; start mpiexec with -n 2 to -n 4"
    with pytest.raises(ConfigError, match=message):
        batches(["a", "b", "c"], ranks)


@pytest.mark.parametrize(
    ("seen", "asked", "local_rank", "device"),
    [
        (0, "auto", 3, "cpu"),
        (1, "auto", 0, "cuda:0"),
        (1, "auto", 5, "cuda:0"),
        (4, "auto", 2, "cuda:2"),
        (4, "auto", 6, "cuda:2"),
        (4, "cuda", 3, "cuda:3"),
        (4, "cuda:1", 3, "cuda:1"),
        (4, "cpu", 3, "cpu"),
    ],
)
def test_the_place_on_the_node_chooses_among_the_gpus_that_are_seen(gpus, seen, asked, local_rank, device):
    gpus(seen)
    assert choose_device(asked, local_rank) == device


@pytest.mark.parametrize(
    ("seen", "asked", "message"),
    [
        (0, "cuda", "device cuda was asked for on .*, where no GPU can be seen; use auto"),
        (0, "cuda:0", "device cuda:0 was asked for on .*, where 0 GPUs can be seen"),
        (2, "cuda:2", "device cuda:2 was asked for on .*, where 2 GPUs can be seen"),
    ],
)
def test_a_gpu_that_is_not_seen_is_refused(gpus, seen, asked, message):
    gpus(seen)
    with pytest.raises(ConfigError, match=message):
        choose_device(asked, 0)


def test_a_client_on_the_cpu_does_not_wake_the_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: pytest.fail("looked for GPUs"))
    assert choose_device("cpu", 0) == "cpu"


def test_several_devices_are_those_that_were_named_if_they_can_be_seen(gpus):
    gpus(2)
    asked = TrainConfigs(devices=["cuda:1", "cuda:0"])
    assert choose_devices(asked, 0) == ["cuda:1", "cuda:0"]
    assert choose_devices(TrainConfigs(), 3) == ["cuda:1"]
    with pytest.raises(ConfigError, match="each GPU once, got auto, auto"):
        choose_devices(TrainConfigs(devices=["auto", "auto"]), 0)
    gpus(1)
    with pytest.raises(ConfigError, match=r"device cuda:1 was asked for on .*, where 1 GPUs can be seen"):
        choose_devices(asked, 0)


def test_ranks_of_a_node_do_not_name_the_same_gpus(gpus, monkeypatch):
    gpus(2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    both = TrainConfigs(devices=["cuda:0", "cuda:1"])
    with pytest.raises(
        ConfigError, match="another client rank of .* may use cuda:0, cuda:1 too; give each rank its own"
    ):
        choose_devices(both, 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert choose_devices(both, 1) == ["cuda:0", "cuda:1"]


def client(name, threads=None):
    return Client(client_id=name, train_configs=TrainConfigs(threads=threads))


def test_clients_with_one_device_and_one_number_of_threads_share_a_line(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    monkeypatch.setattr("socket.gethostname", lambda: "node7")
    one, both = ["cuda:0"], ["cuda:0", "cuda:1"]
    placed = [(client("a", 2), one), (client("b", 2), both), (client("c", 2), one), (client("d"), ["cpu"])]
    lines = describe(5, placed, 7)
    assert [(line.clients, line.device, line.threads) for line in lines] == [
        (("a", "c"), "cuda:0", 2),
        (("b",), "cuda:0, cuda:1", 2),
        (("d",), "cpu", 7),
    ]
    assert {(line.rank, line.host, line.bound) for line in lines} == {(5, "node7", "2,3")}


def test_what_a_scheduler_bound_stays_bound(gpus, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    gpus(1)
    before = dict(os.environ)
    assert choose_device("auto", 3) == "cuda:0"
    describe(0, [(client("a"), ["cuda:0"])], 1)
    assert dict(os.environ) == before


def writes_environment(node):
    if isinstance(node, ast.Subscript):
        return ast.unparse(node.value) == "os.environ" and not isinstance(node.ctx, ast.Load)
    writers = {f"os.environ.{name}" for name in ("update", "setdefault", "pop", "clear")} | {"os.putenv", "os.unsetenv"}
    return isinstance(node, ast.Call) and ast.unparse(node.func) in writers


def test_no_file_writes_cuda_visible_devices():
    files = (ROOT / "src").rglob("*.py")
    assert [
        f"{file.name}:{node.lineno}"
        for file in files
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if writes_environment(node) and "CUDA_VISIBLE_DEVICES" in ast.unparse(node)
    ] == []
