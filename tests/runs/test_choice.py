"""What is pruned is chosen: clients, server, estimate, manifest and further models see the same matrices and targets."""

import json

import pytest
import torch

import fedspallm_appfl as fs
from fedspallm_appfl.reports.progress import console
from fedspallm_appfl.runs import further_models
from fedspallm_appfl.tensors.targets import parse_sparsity
from helpers.tiny import events, linears, run, save_tiny, tiny_config, weights

IGNORED = ["0", "2.self_attn.q_proj", "lm_head"]
SPARSITY = {"*.down_proj": "2:4", "2": 0.25, "default": 0.5}  # in the order in which the file is written
CHOICE = {"prune": {"ignore": IGNORED}, "client_configs": {"train_configs": {"sparsity": SPARSITY}}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("dense") / "model")


def stays_dense(key):
    return ".0." in key or key.endswith("2.self_attn.q_proj.weight")


def expected(key, default="0.5"):
    """The target of a matrix by its name in the checkpoint."""
    return "0.25" if ".2." in key else "2:4" if "down_proj" in key else default


def check(folder, model, default="0.5"):
    """The chosen matrices have their targets, on disk and in the manifest; the others are as they were."""
    manifest = json.loads((folder / "manifest.json").read_text())
    dense, made = (linears(weights(place)) for place in (model.parent, folder))
    assert {one["name"] for one in manifest["matrices"]} == {key for key in dense if not stays_dense(key)}
    assert manifest["target"] == str(parse_sparsity(SPARSITY | {"default": default}))
    for one in manifest["matrices"]:
        assert one["target"] == expected(one["name"], default)
        target = fs.parse_target(one["target"])
        assert one["zeros"] == target.zeros(made[one["name"]].numel()) <= int((made[one["name"]] == 0).sum())
    assert all(torch.equal(dense[key], made[key]) for key in dense if stays_dense(key))


@pytest.mark.parametrize("algorithm", ["fedspallm", "consensus", "fedprllm", "gram"])
def test_a_run_prunes_what_was_chosen(algorithm, model, tmp_path):
    config = tiny_config(tmp_path, model, algorithm, count=2, **CHOICE)
    folder = run(config)
    check(folder, model)
    assert [event["block"] for event in events(folder, "block")] == [1, 2]
    estimated = fs.estimate(config).traffic[0]
    sent = {e["client"]: 0 for e in events(folder, "upload")}
    for event in events(folder, "upload"):
        sent[event["client"]] += event["bytes"]
    assert set(sent.values()) == {int(estimated.up[client]) for client in sent}
    if algorithm == "gram":
        further_models.prune(folder, ["0.75"], None, console(), False)
        check(folder / "further" / "sparsegpt-0.75", model, "0.75")


def test_layers_are_drawn_among_blocks_with_something_to_prune(model, tmp_path):
    shares = {"client_configs": {"train_configs": {"resource_share": 0.5}}}
    folder = run(tiny_config(tmp_path, model, "fedspallm", count=2, prune={"ignore": ["0"]}, **shares))
    assert sorted(event["block"] for event in events(folder, "block")) == [1, 2]  # one each, of two and not of three


def test_validate_names_patterns_that_mean_nothing(model, tmp_path):
    config = tiny_config(tmp_path, model, "fedspallm", count=2)
    wrong = fs.load_config(config, sparsity={"default": 0.5, "*.dwn_proj": 0.3, "blocks.5": 0.1}, ignore=["self_atn"])
    assert fs.validate(wrong)[0].startswith("prune.ignore: 'self_atn' means no matrix; did you mean self_attn")
    wrong.prune.ignore = []
    first, second = fs.validate(wrong)
    assert first.startswith(
        "client_configs.train_configs.sparsity: '*.dwn_proj' means no matrix that is pruned; did you"
    )
    assert second.endswith("goes beyond the last block, 2")


def test_zeros_of_the_dense_model_are_counted(model, tmp_path):
    first = run(tiny_config(tmp_path / "first", model, "fedspallm", 2), "client_configs.train_configs.sparsity=0.5")
    config = tiny_config(tmp_path / "second", first / "model", "fedspallm", 2)
    before = linears(weights(first))
    zeros = sum(int((one == 0).sum()) for one in before.values())
    for keep in ("true", "false"):
        folder = run(config, f"prune.keep_zeros={keep}", "client_configs.train_configs.sparsity=2:4", "--overwrite")
        after, manifest = linears(weights(folder)), json.loads((folder / "manifest.json").read_text())
        back = sum(int(((before[key] == 0) & (after[key] != 0)).sum()) for key in before)
        assert (manifest["zeros_before"], manifest["zeros_back"]) == (zeros, back)
        report = (folder / "report.md").read_text()
        assert f"{zeros - back:,} of {zeros:,} weights that were zero in the dense model are still zero" in report
        assert (back == 0) == (keep == "true") == ("came back" not in report)
