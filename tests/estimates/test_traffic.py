"""Predictions of bytes: by hand on four small matrices, and to the byte beside runs of every algorithm."""

import dataclasses
import json
import shutil

import pytest
import torch

from fedspallm_appfl import cli
from fedspallm_appfl.cli import main
from fedspallm_appfl.errors import ConfigError
from fedspallm_appfl.estimates import job as jobs
from fedspallm_appfl.estimates import over_globus as estimate_globus
from fedspallm_appfl.estimates import traffic as estimate
from fedspallm_appfl.estimates.job import Job, open_outline
from fedspallm_appfl.models.inputs import shared_inputs
from fedspallm_appfl.models.lazy_model import LazyModel, Skeleton
from fedspallm_appfl.rounds import pruning
from fedspallm_appfl.rounds.participants import participants, uncovered
from fedspallm_appfl.settings.reading import load_config
from fedspallm_appfl.settings.schema import Model, Pruning
from fedspallm_appfl.tensors.target import parse_target
from fedspallm_appfl.validation import files
from helpers.experiments import first_pages, uneven
from helpers.families import FAMILIES, save_family, windows
from helpers.outlines import MASKS, MODEL, PACKED, experiment, job
from helpers.paths import DEMO, ROOT
from helpers.rounds import source
from helpers.tiny import events, run, save_tiny, tiny_config

GRAM = {4: 4 * 4 + 6 + 4, 8: 4 * 8 + 28 + 4}  # int8: a float32 diagonal, a byte above it, a scale
GRAMS = 3 * GRAM[4] + GRAM[8]
DRIFTS = 3 * (16 + 4) + 64 + 4


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


def test_traffic_by_hand():
    config = experiment()
    config.server_configs.num_global_epochs = 2
    first, last = estimate.traffic(job(config))
    assert (first.blocks, dict(first.up), dict(first.dense)) == (
        2,
        {"a": 2 * PACKED, "b": 2 * PACKED},
        {"a": 384, "b": 384},
    )
    assert (first.down, last.down) == (2 * PACKED, 0)


def test_a_pruner_that_keeps_weights_sends_masks_alone():
    [traffic] = estimate.traffic(job(experiment(pruner="wanda")))
    assert dict(traffic.up) == {"a": 2 * 12, "b": 2 * 12}


@pytest.mark.parametrize(
    ("algorithm", "settings", "up", "down", "last"),
    [
        ("fedavg", {}, PACKED, 2 * PACKED, 0),
        ("fedprllm", {}, MASKS, 2 * PACKED, 0),
        ("consensus", {}, PACKED, 2 * (MASKS + PACKED), 2 * MASKS),
        ("gram", {}, GRAMS, 0, 0),
        ("gram", {"propagate": "pruned"}, GRAMS, 2 * PACKED, 2 * PACKED - 36),
        ("gram", {"propagate": "pruned", "target": "dense"}, GRAMS + DRIFTS, 2 * PACKED, 2 * PACKED - 36),
        ("gram", {"propagate": "pruned", "stride": 1}, GRAMS, 2 * PACKED, PACKED),
        ("standalone", {}, PACKED, 0, 0),
    ],
)
def test_traffic_of_each_algorithm_by_hand(algorithm, settings, up, down, last):
    """In two rounds; `last` is what comes down in the last one, where nothing follows the last exchange."""
    config = experiment(algorithm=algorithm, **settings)
    config.server_configs.num_global_epochs = 2
    rounds = estimate.traffic(job(config))
    assert [dict(one.up) for one in rounds] == [{"a": 2 * up, "b": 2 * up}] * 2
    assert [one.down for one in rounds] == [down, last]


def test_one_client_has_the_text_of_all_with_centralized():
    config = experiment(3, algorithm="centralized")
    [traffic] = estimate.traffic(job(config))
    assert dict(traffic.up) == {"pooled": 2 * PACKED}
    [pooled] = participants(config)
    assert pooled.data.windows == 18
    assert carried(config)["MPI"] == (False, "centralized pools the text of all clients in one process")


@pytest.mark.parametrize(
    ("sparsity", "mask_only", "smaller"),
    [("0.5", False, 2.06), ("0.7", False, 3.24), ("0.7", True, 16 / 0.89), ("2:4", True, 16 / 0.65)],
)
def test_compression_is_expected_to_do_what_was_measured(sparsity, mask_only, smaller):
    target = parse_target(sparsity)
    packed = 1 / 8 + (0 if mask_only else 2 * (1 - (0.5 if sparsity == "2:4" else float(sparsity))))
    share = estimate.zstd_share(target, torch.float16, "masks" if mask_only else "weights")
    assert 2 / (packed * share) == pytest.approx(smaller, rel=0.02)


def test_blocks_that_nobody_draws_are_named():
    config = experiment(1, resource_share=0.5)
    assert len(uncovered(config, 4)) == 2
    config.server_configs.num_global_epochs = 50
    assert uncovered(config, 4) == []


def test_messages_by_hand():
    config = experiment()
    assert estimate.messages(job(config)) == estimate.Messages(2, PACKED)
    config.client_configs.comm_configs.max_message_bytes = 72
    assert estimate.messages(job(config)).largest == 72


@pytest.mark.parametrize(
    ("algorithm", "settings", "expected"),
    [
        ("fedprllm", {}, (2, MASKS)),
        ("consensus", {}, (4, PACKED - MASKS)),
        ("gram", {}, (2, GRAMS)),
        ("gram", {"propagate": "pruned"}, (8, GRAM[8])),
        ("gram", {"propagate": "pruned", "stride": 1}, (2, GRAMS)),
    ],
)
def test_messages_of_all_exchanges_are_counted(algorithm, settings, expected):
    made = estimate.messages(job(experiment(algorithm=algorithm, **settings)))
    assert dataclasses.astuple(made) == expected


def test_what_comes_down_must_fit_too():
    config = experiment(algorithm="fedprllm")
    config.client_configs.comm_configs.max_message_bytes = 30
    assert carried(config)["serial"][0]  # masks alone, since nothing follows the last round
    config.server_configs.num_global_epochs = 2
    carries, why = carried(config)["serial"]
    assert (carries, "mlp.up takes 36 bytes packed" in why) == (False, True)


@pytest.mark.parametrize(
    ("settings", "limit", "refused"),
    [
        (["algorithm=fedspallm"], 49_536, None),
        (["algorithm=fedspallm"], 49_535, "mlp.gate_proj takes 49536 bytes"),
        (["algorithm=fedprllm"], 5_504, None),
        (["algorithm=fedprllm", "server_configs.num_global_epochs=2"], 5_504, "self_attn.q_proj takes 18432 bytes"),
        (["algorithm=consensus"], 44_031, "mlp.gate_proj takes 44032 bytes"),
        (["algorithm=gram"], 60_376, None),
        (["algorithm=gram"], 60_375, "mlp.down_proj takes 60376 bytes"),
        (["algorithm=gram", "gram.propagate=pruned", "gram.target=dense"], 100_000, "mlp.down_proj takes 178716 bytes"),
        (["algorithm=nothing"], 1024, None),  # is refused by `check`
        (["algorithm=gram", "gram.precision=nothing"], 1024, None),
    ],
)
def test_validation_refuses_what_no_message_can_carry(settings, limit, refused):
    words = [*settings, f"client_configs.comm_configs.max_message_bytes={limit}"]
    config, _ = load_config(ROOT / "configs" / "demo.yaml", words)
    problems = list(files._sizes(config, Skeleton(config.model.path)))
    assert len(problems) == (refused is not None)
    assert refused is None or refused in problems[0]


def carried(config):
    transports = (*estimate.transports(job(config)), estimate_globus.transport(job(config)))
    return {one.name: (one.carries, one.why) for one in transports}


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


def test_what_is_too_large_for_globus_compute_needs_a_data_store(monkeypatch):
    config = experiment()
    assert carried(config)["Globus Compute"] == (True, "a task or its result holds up to 0.0 MB of 7.0 MB")
    monkeypatch.setattr(estimate_globus, "INLINE_LIMIT", 2 * PACKED - 1)
    carries, why = carried(config)["Globus Compute"]
    assert (carries, "set comm_configs.store.connector" in why) == (False, True)
    config.client_configs.comm_configs.store.connector = "redis"
    assert carried(config)["Globus Compute"][0]


def test_what_globus_compute_does_not_do():
    why = "centralized pools the text of all clients in one process"
    assert carried(experiment(algorithm="centralized"))["Globus Compute"] == (False, why)
    for settings in ({"algorithm": "standalone"}, {"algorithm": "gram", "propagate": "pruned"}):
        assert carried(experiment(**settings))["Globus Compute"][0]


def test_a_pattern_must_fit(monkeypatch):
    monkeypatch.setattr(jobs, "open_outline", lambda *settings: MODEL)
    assert Job.of(experiment(sparsity=parse_target("2:4"))).model is MODEL
    with pytest.raises(ConfigError, match="attention.q, attention.out, mlp.up: 4:8 needs rows that are a multiple"):
        Job.of(experiment(sparsity=parse_target("4:8")))


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_that_are_shared_are_those_that_a_forward_pass_shares(family, tmp_path):
    model = LazyModel(str(save_family(family, tmp_path)))
    of = source(model, windows(2), Pruning("wanda", parse_target("0.5")), batch=2)
    with model.block(0) as block, torch.no_grad():
        found = list(pruning.collect(of, block, 0, of.embedded()))
    for known in (open_outline(Model(str(tmp_path))), Skeleton(str(tmp_path))):
        assert shared_inputs(tmp_path, known.layout)[0] == tuple(tuple(names) for names, _ in found)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weights", [True, False])
def test_the_sizes_are_those_of_the_model(family, weights, tmp_path):
    folder = save_family(family, tmp_path)
    model = LazyModel(str(folder))
    entries = sum(parameter.numel() for parameter in model.model.parameters())  # what is tied counts once
    outer = sum(p.numel() for p in model.model.parameters() if p.device.type != "meta")
    if not weights:
        (folder / "model.safetensors").unlink()
    sizes = open_outline(Model(str(folder)))
    assert sizes.assumed is not weights
    assert (sizes.outer + sum(sizes.blocks), sizes.outer) == (entries, outer)
    assert (sizes.hidden, sizes.vocabulary, len(sizes.blocks)) == (32, 96, 3)
    assert (sizes.stored, sizes.arithmetic) == (torch.float32, torch.float32)


def test_a_model_on_the_hub_is_estimated_without_its_weights(tmp_path, monkeypatch, capsys):
    asked = {}

    def fetch(name, **patterns):
        asked.update(patterns, name=name)
        shutil.copy(DEMO / "model" / "config.json", tmp_path)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    code, out, _ = output(capsys, ROOT / "configs" / "demo.yaml", "model.path=some/model")
    assert (asked["name"], asked["allow_patterns"]) == ("some/model", ["*.json", "*.model", "*.txt", "*.py"])
    assert (code, "1.6 MB" in out) == (0, True)
    assert "taken to be float16, as config.json says" in " ".join(out.split())


def output(capsys, *words):
    code = cli.main(["estimate", *map(str, words)])
    return code, *capsys.readouterr()


def test_everything_is_said_of_the_demo_without_its_text(capsys):
    code, out, err = output(capsys, ROOT / "configs" / "demo.yaml", "clients.0.data.text=none.txt")
    assert (code, err) == (0, "")
    for words in (
        "every block is pruned by some client",
        "1.6 MB",
        "2.9 MB",
        "MPI, server",
        "evaluation",
        "Python and its packages",
    ):
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
    assert "raise resource_share or num_global_epochs to reach them" in out
    assert "on average 4.69 blocks a round are drawn by no client and stay dense" in out
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


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            ["algorithm=consensus"],
            "each round: masks up, masks down; values up",
        ),
        (["algorithm=gram"], "linears that share an input: self_attn.q_proj, self_attn.k_proj"),
        (
            ["algorithm=gram", "gram.propagate=pruned"],
            "each round: 32 times Gram matrices up, pruned weights down; nothing down after the last",
        ),
        (
            ["algorithm=gram", "gram.propagate=pruned", "gram.stride=3"],
            "each round: 3 times Gram matrices up, pruned weights down; nothing down after the last",
        ),
        (["algorithm=gram"], "statistics/"),
        (["algorithm=standalone"], "models/"),
        (["algorithm=centralized"], "centralized pools the text"),
    ],
)
def test_what_an_algorithm_does_is_said(settings, words, capsys):
    config = (ROOT / "configs" / "demo.yaml", "evaluation.compare=[]", "evaluation.texts=null")
    code, out, err = output(capsys, *config, *settings)
    assert (code, err) == (0, "")
    assert words in " ".join(out.split())


def pruner(**train):
    return {"client_configs": {"train_configs": train}}


ROUNDS = {
    "server_configs": {"num_global_epochs": 2, "aggregator_kwargs": {"fold": "cumulative"}},
    "clients": [
        {**client, "data": {**client["data"], "windows": 6}, "train_configs": client["train_configs"]}
        for client in uneven(first_pages)["clients"]
    ],
}
SWEEP = {"propagate": "pruned", "precision": "bf16"}
TWO_SWEEPS = {
    "server_configs": {"num_global_epochs": 2},
    "clients": ROUNDS["clients"],
    "gram": {"propagate": "pruned", "target": "dense"},
}


@pytest.mark.parametrize(
    ("algorithm", "changes"),
    [
        ("fedspallm", {}),
        ("fedspallm", ROUNDS),
        ("fedspallm", pruner(pruner="wanda")),
        ("fedspallm", pruner(pruner="wanda", refit=True)),
        ("fedspallm", pruner(pruner="admm", iterations=3)),
        ("fedspallm", {"client_configs": {"comm_configs": {"max_message_bytes": 3000}}}),
        ("fedprllm", ROUNDS),
        ("fedavg", ROUNDS),
        ("consensus", {**ROUNDS, "server_configs": {"num_global_epochs": 2}}),
        ("consensus", {"client_configs": {"comm_configs": {"blocks_per_message": 2}}}),
        ("gram", {}),
        ("gram", {**ROUNDS, "gram": {"precision": "fp32"}}),
        ("gram", {"gram": SWEEP}),
        ("gram", TWO_SWEEPS),
        ("gram", {**TWO_SWEEPS, "gram": {"propagate": "pruned", "stride": 2}}),
        ("standalone", {}),
        ("centralized", {}),
        ("centralized", pruner(pruner="wanda")),
    ],
)
def test_bytes_and_messages_are_those_of_a_run(algorithm, changes, tiny_model, tmp_path):
    """Uploads, what comes down and what is kept: the very bytes."""
    file = tiny_config(tmp_path, tiny_model, algorithm, **changes)
    of, folder = Job.of(load_config(file)[0]), run(file)
    uploads, made = events(folder, "upload"), estimate.messages(of)
    for number, traffic in enumerate(estimate.traffic(of)):
        mine = {client: [e for e in uploads if (e["round"], e["client"]) == (number, client)] for client in traffic.up}
        assert {client: sum(e["bytes"] for e in sent) for client, sent in mine.items()} == traffic.up
        assert {len(sent) for sent in mine.values()} == {made.count}
        assert events(folder, "round")[number]["bytes_down"] == traffic.down
    assert max(event["bytes"] for event in uploads) == made.largest
    for one in estimate.disk(of):
        assert not one.stays or written(folder / one.what) == one.nbytes


def test_a_disk_without_room_is_seen_before_anything_is_pruned(tiny_model, tmp_path, monkeypatch, capsys):
    file = tiny_config(tmp_path, tiny_model, "fedspallm")
    needed = sum(one.nbytes for one in estimate.disk(Job.of(load_config(file)[0])))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed // 3))
    assert main(["run", str(file)]) == 2
    assert f"and its disk has {needed // 3:,} free; make room" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    assert main(["validate", str(file)]) == 0


def written(folder):
    """Bytes of all tensors in the safetensors files of a folder."""
    return sum(_tensor_bytes(file) for file in folder.rglob("*.safetensors"))


def _tensor_bytes(file):
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
