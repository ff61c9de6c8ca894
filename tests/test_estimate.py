"""Predictions: by hand on four small matrices, in the right direction on every setting, and beside what is measured."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import yaml

from conftest import DEMO, ROOT
from experiments import UNEVEN, small_config
from families import FAMILIES, save_family, windows
from fedspallm_appfl import cli, config_rules, estimate
from fedspallm_appfl.blocks import Linear
from fedspallm_appfl.blockwise import _statistics, embed
from fedspallm_appfl.config import Client, Config, load_config
from fedspallm_appfl.errors import ConfigError
from fedspallm_appfl.estimate import Memory, ModelSizes
from fedspallm_appfl.lazy_model import LazyModel, Skeleton
from fedspallm_appfl.pruning import Settings
from fedspallm_appfl.sparsity import parse_target

LINEARS = (
    Linear("attention.q", (4, 4), False),
    Linear("attention.out", (4, 4), False),
    Linear("mlp.up", (8, 4), False),
    Linear("mlp.down", (4, 8), False),
)  # 96 entries
MODEL = ModelSizes(100, (104, 104), (LINEARS, LINEARS), 10, torch.float16, torch.float32)
PACKED = 2 * (2 + 8 * 2) + 2 * (4 + 16 * 2)  # half of each matrix in float16, and a bit an entry: 108


def client(name="a", **changes):
    made = Client(client_id=name)
    made.data.text = "text.txt"
    made.data.windows, made.data.length, made.data.batch = 6, 8, 2
    for group in (made.train_configs, made.data, made.comm_configs):
        for key, value in changes.items():
            if hasattr(group, key):
                setattr(group, key, value)
    return made


def experiment(count=2, **changes):
    config = Config(clients=[client(name, **changes) for name in "abcdefgh"[:count]])
    config.client_configs.train_configs = config.clients[0].train_configs
    config.client_configs.comm_configs = config.clients[0].comm_configs
    return config


def parts(memory):
    return {name: size for name, size in memory.parts.items() if size}


def test_a_client_by_hand():
    memory = estimate.client_memory(MODEL, client())
    assert parts(memory) == {
        "outer parts": 400,
        "activations": 6 * 8 * (4 * 4 + 8),
        "one block": 416,
        # Gram matrices of three inputs of 4 and one of 8, and 16 tokens with 2 x 8 + 4 x 4 floats each
        "forward passes": 4 * (3 * 16 + 64) + 16 * 4 * (2 * 8 + 4 * 4),
        "heap": int(0.15 * (400 + 1152 + 416 + 2496)),
    }
    assert memory.mapped == 104 * 2  # a block is larger than the outer parts
    assert memory.resident == memory.needed + memory.mapped == sum(memory.parts.values()) + 208


def test_pruning_by_hand():
    groups = [([linear], 4 * linear.shape[1] ** 2) for linear in LINEARS]
    # at `mlp.down`: its Gram matrix and its corners, 3 bytes for each of 64 entries that are done, 15 for each of its own
    assert estimate.pruning_bytes(groups, torch.float16, "sparsegpt", 3) == 256 + 512 + 3 * 64 + 15 * 32
    # float32 is read in place
    pair = [([LINEARS[0], LINEARS[1]], 0)]
    assert estimate.pruning_bytes(pair, torch.float16, "magnitude", 3) == 3 * 16 + 15 * 16
    assert estimate.pruning_bytes(pair, torch.float32, "magnitude", 1) == 1 * 16 + 11 * 16


def test_pruning_is_what_counts_where_few_tokens_run():
    memory = estimate.client_memory(MODEL, client(windows=1, length=2))
    assert parts(memory)["pruning a block"] == 256 + 512 + 3 * 64 + 15 * 32


def test_a_server_by_hand():
    memory = estimate.server_memory(experiment(), MODEL)
    assert parts(memory) == {
        "other open blocks": 9 * 96,
        "block to close": 9 * 96 + 6 * 16,  # its first matrix
        "uploads": PACKED,
        "heap": int(0.15 * (864 + 960 + PACKED)),
    }


def test_an_open_entry_takes_a_sum_votes_and_weights():
    assert estimate.sums_bytes(255, weighted=False) == 9
    assert estimate.sums_bytes(256, weighted=False) == 10
    assert estimate.sums_bytes(2, weighted=True) == 13


def test_matrices_of_one_client_are_closed_one_by_one():
    aggregation = estimate.aggregation_of(experiment())
    one = estimate.closing_bytes(LINEARS, torch.float16, 1, aggregation)
    assert one == PACKED - 36 + (9 + 6) * 32  # the others packed, and the last
    memory = estimate.server_memory(experiment(1), MODEL)
    assert memory.parts["other open blocks"] == 0


def test_the_evaluation_by_hand():
    config = experiment()
    config.evaluation.texts, config.evaluation.length, config.evaluation.batch = {"x": "x.txt"}, 8, 4
    memory = estimate.evaluation_memory(config, MODEL, {"x": 3, "y": 2})
    assert parts(memory)["windows of all texts"] == 5 * 8 * 24
    assert parts(memory)["a block, or logits"] == max(3 * 8 * 10 * 12, 416 + 24 * 96)
    config.evaluation.batch = 1
    small = estimate.evaluation_memory(config, MODEL, {"x": 3, "y": 2})
    assert small.parts["a block, or logits"] == 416 + 8 * 96


def test_clients_of_one_process_share_the_outer_parts_only():
    two, three = (estimate.serial_memory(experiment(count), MODEL).parts for count in (2, 3))
    alone = estimate.client_memory(MODEL, client()).parts
    assert two["outer parts"] == three["outer parts"] == alone["outer parts"]
    assert three["activations"] == 3 * alone["activations"]
    assert three["a client at work"] == alone["one block"] + alone["forward passes"]
    assert three["open blocks"] == two["open blocks"] == 9 * 96


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"windows": 6}, {"windows": 7}),
        ({"length": 8}, {"length": 9}),
        ({"batch": 1}, {"batch": 2}),
        ({"activations": "file"}, {"activations": "memory"}),
        ({"pruner": "wanda"}, {"pruner": "sparsegpt"}),
        ({"blocks_per_message": 1}, {"blocks_per_message": 2}),
        ({"pruner": "magnitude", "text": None}, {"pruner": "magnitude"}),
    ],
)
def test_a_client_takes_more_with_more_of_it(less, more):
    assert estimate.client_memory(MODEL, client(**less)).needed < estimate.client_memory(MODEL, client(**more)).needed


def test_a_batch_is_no_larger_than_all_windows():
    a, b = (estimate.client_memory(MODEL, client(batch=batch)) for batch in (6, 600))
    assert a == b


def test_hidden_states_in_a_file_are_mapped():
    memory, file = (estimate.client_memory(MODEL, client(activations=where)) for where in ("memory", "file"))
    assert file.mapped - memory.mapped == memory.parts["activations"]


@pytest.mark.parametrize(
    "change",
    [
        lambda config: setattr(config.server_configs.aggregator_kwargs, "weights", "sample_size"),
        lambda config: config.evaluation.compare.append("fedavg"),
        lambda config: setattr(config.client_configs.train_configs, "sparsity", "0.25"),
    ],
)
def test_a_server_takes_more_with_more_to_do(change):
    config = experiment()
    before = estimate.server_memory(config, MODEL).needed
    change(config)
    assert estimate.server_memory(config, MODEL).needed > before


def test_a_server_takes_less_with_fewer_open_blocks_and_uploads():
    config = experiment()
    some = estimate.server_memory(config, MODEL).needed
    assert some < estimate.server_memory(config, MODEL, together=2).needed
    config.server_configs.scheduler_kwargs.max_open_blocks = 0
    assert some > estimate.server_memory(config, MODEL).needed


def test_traffic_by_hand():
    config = experiment()
    config.server_configs.num_global_epochs = 2
    first, last = estimate.traffic(config, MODEL)
    assert (first.blocks, dict(first.up), dict(first.dense)) == (
        2,
        {"a": 2 * PACKED, "b": 2 * PACKED},
        {"a": 384, "b": 384},
    )
    assert (first.down, last.down) == (2 * PACKED, 0)


def test_a_pruner_that_keeps_weights_sends_masks_alone():
    [traffic] = estimate.traffic(experiment(pruner="wanda"), MODEL)
    assert dict(traffic.up) == {"a": 2 * 12, "b": 2 * 12}


@pytest.mark.parametrize(
    ("sparsity", "mask_only", "smaller"),
    [("0.5", False, 2.06), ("0.7", False, 3.24), ("0.7", True, 16 / 0.89), ("2:4", True, 16 / 0.65)],
)
def test_compression_is_expected_to_do_what_was_measured(sparsity, mask_only, smaller):
    target = parse_target(sparsity)
    packed = 1 / 8 + (0 if mask_only else 2 * (1 - (0.5 if sparsity == "2:4" else float(sparsity))))
    share = estimate.zstd_share(target, torch.float16, mask_only)
    assert 2 / (packed * share) == pytest.approx(smaller, rel=0.02)


def test_blocks_that_nobody_draws_are_named():
    config = experiment(1, resource_share=0.5)
    assert len(config_rules.uncovered(config, 4)) == 2
    config.server_configs.num_global_epochs = 50
    assert config_rules.uncovered(config, 4) == []


def test_messages_by_hand():
    config = experiment()
    assert estimate.messages(config, MODEL) == estimate.Messages(2, PACKED, 36)
    config.client_configs.comm_configs.max_message_bytes = 72
    assert estimate.messages(config, MODEL).largest == 72


def carried(config):
    return {one.name: (one.carries, one.why) for one in estimate.transports(config, MODEL)}


def test_a_message_that_cannot_be_carried_names_the_setting():
    config = experiment()
    assert carried(config)["serial"] == (True, "memory to memory")
    assert carried(config)["MPI"] == (True, "with any number of ranks")
    config.client_configs.comm_configs.max_message_bytes = 72  # two of the largest matrices
    assert carried(config)["MPI"] == (True, "with any number of ranks")
    config.client_configs.comm_configs.max_message_bytes = 40
    assert "2 client ranks or more" in carried(config)["MPI"][1]
    config.client_configs.comm_configs.max_message_bytes = 30
    for name in ("serial", "MPI"):
        carries, why = carried(config)[name]
        assert not carries
        assert "raise comm_configs.max_message_bytes" in why


def test_what_globus_compute_would_carry(monkeypatch):
    assert "the largest message has 0.0 MB" in carried(experiment())["Globus Compute"][1]
    monkeypatch.setattr(estimate, "GLOBUS_LIMIT", 50)
    assert "lower comm_configs.max_message_bytes" in carried(experiment())["Globus Compute"][1]
    monkeypatch.setattr(estimate, "GLOBUS_LIMIT", 20)
    assert "cannot be split" in carried(experiment())["Globus Compute"][1]


def test_a_pattern_must_fit():
    estimate.check_pattern(MODEL, parse_target("2:4"))
    with pytest.raises(ConfigError, match="attention.q: 4:8 needs rows that are a multiple of 8 long, got 4"):
        estimate.check_pattern(MODEL, parse_target("4:8"))


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_that_are_shared_are_those_that_a_forward_pass_shares(family, tmp_path):
    model = LazyModel(str(save_family(family, tmp_path)))
    state = embed(model, windows(2), 2)
    with model.block(0) as block, torch.no_grad():
        found = _statistics(model, block, 0, state, Settings("wanda", parse_target("0.5")))
    expected = {frozenset(names) for names, _ in found}
    guessed = estimate.shared_inputs(model.layout.blocks[0])
    assert {frozenset(linear.name for linear in group) for group in guessed} == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sizes_are_those_of_the_model(family, tmp_path):
    folder = str(save_family(family, tmp_path))
    sizes, model = ModelSizes.of(Skeleton(folder)), LazyModel(folder)
    entries = sum(parameter.numel() for parameter in model.model.parameters())  # what is tied counts once
    assert sizes.outer + sum(sizes.blocks) == entries
    assert sizes.outer == sum(p.numel() for p in model.model.parameters() if p.device.type != "meta")
    assert (sizes.hidden, sizes.vocabulary, len(sizes.blocks)) == (32, 96, 3)


def output(capsys, *words):
    code = cli.main(["estimate", *map(str, words)])
    return code, *capsys.readouterr()


def test_everything_is_said_of_the_demo_without_its_text(capsys):
    code, out, err = output(capsys, ROOT / "configs" / "demo.yaml", "clients.0.data.text=none.txt")
    assert (code, err) == (0, "")
    for words in ("nobody draws in 1 round: none", "1.6 MB", "2.9 MB", "MPI, server", "evaluation", "Python and its"):
        assert words in out
    assert max(map(len, out.splitlines())) <= 118


def test_settings_that_matter_are_named(capsys):
    words = (
        "train_configs.layer_sampling=uniform",
        "train_configs.resource_share=0.125",
        "comm_configs.compression=zstd",
    )
    settings = [f"client_configs.{word}" for word in words]
    _, out, _ = output(
        capsys, ROOT / "configs" / "demo.yaml", *settings, "clients.0.data.windows=64", "evaluation.compare=[]"
    )
    assert "raise train_configs.resource_share or server_configs.num_global_epochs" in out
    assert "expected of uniform sampling: 4.69 a round" in out
    assert "about, compressed" in out
    assert "MPI, bible, csource, sqldocs" in out


def test_an_evaluation_that_cannot_be_counted_is_left_out(capsys):
    words = (ROOT / "configs" / "demo.yaml", "evaluation.texts.austen=none.txt", "evaluation.windows=null")
    assert "without the evaluation: evaluation.texts cannot be read here" in output(capsys, *words)[1]


def test_problems_of_the_values_are_errors(capsys):
    code, out, err = output(capsys, ROOT / "configs" / "demo.yaml", "seed=-1")
    assert (code, out) == (2, "")
    assert "seed: at least 0, got -1" in err


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.name)
def test_every_shipped_configuration_is_estimated_or_its_model_is_asked_for(file, capsys):
    code, out, err = output(capsys, file)
    if code:
        assert "download it first, then give the folder in `model.path`" in err
    else:
        assert "Memory" in out


def test_bytes_are_those_of_a_run(tmp_path):
    """Uploads and what comes down, on two rounds with unequal shares: the very bytes."""
    from rich.console import Console

    from fedspallm_appfl import experiment as whole
    from fedspallm_appfl.launch import serial

    config, _ = load_config(small_config(tmp_path, **UNEVEN))
    predicted = estimate.traffic(config, ModelSizes.of(Skeleton(config.model.path), config.model.dtype))
    whole.run(config, serial.run, Console(quiet=True))
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for number, traffic in enumerate(predicted):
        sent = dict.fromkeys(traffic.up, 0)
        for event in events:
            if event["event"] == "upload" and event["round"] == number:
                sent[event["client"]] += event["bytes"]
        assert sent == traffic.up
    assert [event["bytes_down"] for event in events if event["event"] == "round"] == [one.down for one in predicted]


MEASURE = """
import ctypes, gc, os, sys
from pathlib import Path
import torch
from transformers.models.llama import modeling_llama
from fedspallm_appfl.appfl_adaptors import registration
registration.register()
from fedspallm_appfl.appfl_adaptors import agents, trainer
from fedspallm_appfl.config import load_config
from fedspallm_appfl.launch import serial

def field(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name + ":")).split()[1])

what, file, folder = sys.argv[1:]
config, _ = load_config(file)
torch.set_num_threads(1)
gc.collect()
before = field("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
if what == "serial":
    serial.run(config, Path(folder), lambda event: None)
else:
    one = config.clients[0]
    settings = agents.client_agent_config(config, one, "cpu", 2**29).train_configs
    client = trainer.client_settings(one.client_id, trainer.OmegaConf.to_container(settings, resolve=True))
    client = trainer.LocalClient(client)
    client.start_round(0, list(range(len(client.model.blocks))))
    while client.in_round:
        client.next_message()
print(field("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "pruner", "count"), [("client", "sparsegpt", 1), ("client", "wanda", 1), ("serial", "sparsegpt", 3)]
)
def test_memory_is_within_a_fifth_of_what_is_measured(what, pruner, count, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 2, "num_attention_heads": 16}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8000, max_position_embeddings=512, **size)).half()
    model.save_pretrained(tmp_path / "model")
    del model
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "model" / name, tmp_path / "model")
    file = small_config(tmp_path, count, model={"path": str(tmp_path / "model")})
    written = yaml.safe_load(file.read_text())
    written["client_configs"]["train_configs"]["pruner"] = pruner
    written["client_configs"]["data"] = {"windows": 16, "length": 256, "batch": 4}
    file.write_text(yaml.safe_dump(written))

    config, _ = load_config(file)
    sizes = ModelSizes.of(Skeleton(config.model.path), config.model.dtype)
    predicted: Memory = (
        estimate.serial_memory(config, sizes) if what == "serial" else estimate.client_memory(sizes, config.clients[0])
    )
    command = [sys.executable, "-c", MEASURE, what, str(file), str(tmp_path / "state")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    measured = int(done.stdout.splitlines()[-1])
    print(f"{what} {pruner}: predicted {predicted.resident / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB")
    assert predicted.resident == pytest.approx(measured, rel=0.2)
