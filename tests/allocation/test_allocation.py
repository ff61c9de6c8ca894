"""Sensitivities and losses against the whole model, and runs with targets that were chosen."""

import json

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

import fedspallm_appfl as fs
from fedspallm_appfl.allocation import choice
from fedspallm_appfl.allocation.choice import allocate, allocated
from fedspallm_appfl.allocation.curves import look, unseen_experts
from fedspallm_appfl.allocation.fisher import sensitivities
from fedspallm_appfl.allocation.text import public_windows
from fedspallm_appfl.errors import DataError
from fedspallm_appfl.estimates.memory import allocation_memory
from fedspallm_appfl.models.experts import Part
from fedspallm_appfl.models.layout import Layout, Linear
from fedspallm_appfl.models.lazy_model import LazyModel
from fedspallm_appfl.pruning import registry
from fedspallm_appfl.pruning.statistics import InputGram
from fedspallm_appfl.settings.schema import Pruning
from fedspallm_appfl.tensors.target import parse_target
from helpers.experiments import first_pages
from helpers.tiny import BLOCKS, HIDDEN, events, run, save_tiny, tiny_config, weights

LEVELS = [parse_target(text).share for text in ("0.4", "0.7")]
WINDOWS = torch.arange(4 * 12).view(4, 12) * 7 % 512
CHOSEN = {"method": "fisher", "windows": 6, "length": 32, "batch": 3}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"), torch.float32)


@pytest.fixture(scope="module")
def whole(tiny):
    """The model as a whole: inputs of each linear, gradients of its outputs for labels drawn with seed 5."""
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    inputs, outputs = {}, {}

    def keep(name):
        def hook(module, args, out):
            out.retain_grad()
            inputs.setdefault(name, []).append(args[0].detach().flatten(0, 1))
            outputs.setdefault(name, []).append(out)

        return hook

    for index, block in enumerate(model.model.layers):
        for name, module in block.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(keep((index, name)))
    generator = torch.Generator().manual_seed(5)
    for ids in WINDOWS.split(2):
        scores = model(input_ids=ids).logits.flatten(0, 1)
        drawn = torch.multinomial(scores.detach().softmax(-1), 1, generator=generator).flatten()
        cross_entropy(scores, drawn, reduction="sum").backward()
    gradients = {key: torch.cat([out.grad.flatten(0, 1) for out in outs]) for key, outs in outputs.items()}
    return model, {key: torch.cat(parts) for key, parts in inputs.items()}, gradients


def test_sensitivities_are_mean_squared_gradients_of_the_whole_model(tiny, whole):
    model, _, gradients = LazyModel(str(tiny)), *whole[1:]
    passed = look(model, WINDOWS, LEVELS, Pruning(), batch=2)
    found = sensitivities(model, WINDOWS, passed, 5, batch=2)
    assert found.keys() == gradients.keys()
    for key, of in gradients.items():
        torch.testing.assert_close(found[key], of.double().square().mean(0), rtol=1e-3, atol=1e-9)


def test_losses_are_mean_squared_changes_of_outputs(tiny, whole):
    model, inputs = LazyModel(str(tiny)), whole[1]
    passed = look(model, WINDOWS, LEVELS, Pruning(damping=1.0), batch=2)
    for key in ((0, "self_attn.k_proj"), (2, "mlp.down_proj")):
        dense = whole[0].model.layers[key[0]].get_submodule(key[1]).weight.detach()
        for level, rows in zip(("0.4", "0.7"), passed.lost[key].rows, strict=True):
            gram = InputGram(dense.shape[1])
            gram.add(inputs[key])
            pruned, _ = registry.prune(dense, Pruning(sparsity=parse_target(level), damping=1.0), gram)
            change = inputs[key] @ (dense - pruned).T
            torch.testing.assert_close(rows.float(), change.square().mean(0), rtol=1e-2, atol=1e-7)


def config_of(folder, model, algorithm="fedspallm", **changes):
    return tiny_config(folder, model, algorithm, allocation=CHOSEN, **changes)


def test_auto_keeps_the_width_that_loses_least_and_the_uniform_target_if_that_is_it(tiny, tmp_path, monkeypatch):
    config = fs.load_config(config_of(tmp_path, tiny), sparsity=0.7)
    real, told = choice._loss, []
    monkeypatch.setattr(choice, "_loss", lambda *args: told.append(args[-1]) or real(*args))
    found = allocate(config)
    assert list(found.losses) == list(choice.WIDTHS)
    assert found.losses[found.width] == min(found.losses.values()) <= found.losses[0.0]
    assert len(set(found.losses.values())) == len(told) == 4
    monkeypatch.setattr(choice, "_loss", lambda *args: 1.0)
    seen = []
    assert allocated(config, seen.append).client_configs.train_configs.sparsity == parse_target("0.7")
    assert "uniform target lost least" in seen[-1]["text"]


@pytest.mark.parametrize(
    ("algorithm", "pruner"), [("fedspallm", "sparsegpt"), ("gram", "admm"), ("fedprllm", "magnitude")]
)
def test_a_run_has_the_same_total_and_each_matrix_its_own_target(tiny, tmp_path, algorithm, pruner):
    changes = {"client_configs": {"train_configs": {"pruner": pruner, "sparsity": 0.55, "iterations": 3}}}
    file = config_of(tmp_path / "chosen", tiny, algorithm, **changes)
    folder = run(file, "allocation.width=0.2")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["target"] == "0.55"
    assert manifest["zeros"] == sum(int(0.55 * one["entries"]) for one in manifest["matrices"])
    for one in manifest["matrices"]:
        assert one["zeros"] == parse_target(one["target"]).zeros(one["entries"])
        assert 0.349 <= one["sparsity"] <= 0.751
    assert len({one["target"] for one in manifest["matrices"]}) > 10
    [event] = events(folder, "allocation")
    assert event["width"] == 0.2
    assert "## Targets" in (folder / "report.md").read_text()
    # What clients are told is a mapping like any other: a run that is given it has the same bits.
    given = dict(changes["client_configs"]["train_configs"], sparsity={"default": 0.55} | exact(folder))
    again = tiny_config(tmp_path / "given", tiny, algorithm, client_configs={"train_configs": given})
    one, other = weights(folder), weights(run(again))
    assert all(torch.equal(one[name], other[name]) for name in one)


def exact(folder):
    """The mapping that a run with these targets would be given by hand, from its manifest."""
    found = json.loads((folder / "manifest.json").read_text())["matrices"]
    names = [one["name"].removeprefix("model.layers.").removesuffix(".weight") for one in found]
    return {f"blocks.{name}": one["target"] for name, one in zip(names, found, strict=True)}


def test_more_models_of_the_same_sums_get_targets_of_their_own(tiny, tmp_path):
    folder = run(config_of(tmp_path, tiny, "gram"), "allocation.width=0.1")
    assert fs.cli.main(["prune", str(folder), "--sparsity", "0.6"]) == 0
    manifest = json.loads((folder / "further" / "sparsegpt-0.6" / "manifest.json").read_text())
    assert manifest["zeros"] == sum(int(0.6 * one["entries"]) for one in manifest["matrices"])
    assert len({one["target"] for one in manifest["matrices"]}) > 10
    assert fs.cli.main(["prune", str(folder), "--sparsity", "2:4"]) == 0
    manifest = json.loads((folder / "further" / "sparsegpt-2-4" / "manifest.json").read_text())
    assert {one["target"] for one in manifest["matrices"]} == {"2:4"}


def test_with_n_m_there_is_nothing_to_choose_and_validate_and_the_report_say_so(tiny, tmp_path, capsys):
    words = "allocation: 2:4 is the target of each group of entries, so there is nothing to choose"
    shared = {"train_configs": {"sparsity": "2:4"}}
    file = tiny_config(tmp_path, tiny, "fedspallm", client_configs=shared, allocation=CHOSEN)
    assert fs.cli.main(["validate", str(file)]) == 0
    assert words in capsys.readouterr().out.splitlines()
    assert not events(folder := run(file), "allocation")
    assert f"{words}." in (folder / "report.md").read_text()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"sparsity": {"default": 0.5, "blocks.0": 0.3}}, "allocation chooses the target of each matrix"),
        ({"allocation": {"width": 0.1}}, "its other keys do nothing with method uniform"),
        (
            {"allocation": {**CHOSEN, "width": "1.5"}},
            "allocation.width: auto, or a number between 0 and 1 such as 0.15",
        ),
        ({"allocation": {**CHOSEN, "length": 65}}, "allocation.length: the model takes at most 64 tokens"),
        ({"allocation": {**CHOSEN, "text": "nowhere.txt"}}, "allocation.text: the text nowhere.txt cannot be read"),
    ],
)
def test_what_cannot_be_run_is_refused_before_it_begins(tiny, tmp_path, changes, problem):
    shared = {"train_configs": {"sparsity": changes.pop("sparsity")}} if "sparsity" in changes else {}
    file = tiny_config(tmp_path, tiny, "fedspallm", client_configs=shared, **({"allocation": CHOSEN} | changes))
    assert any(problem in one for one in fs.validate(file)), fs.validate(file)


def test_a_public_text_of_one_window_is_too_short(tiny, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text(first_pages("bible").read_text()[:60])
    config = fs.load_config(config_of(tmp_path, tiny))
    config.allocation.text = str(text)
    with pytest.raises(DataError, match="^allocation.text: "):
        public_windows(config, LazyModel(str(tiny)).skeleton)


def test_windows_that_judge_are_not_those_that_choose(tiny, tmp_path):
    mine, others = public_windows(fs.load_config(config_of(tmp_path, tiny)), LazyModel(str(tiny)).skeleton)
    assert mine.shape == others.shape == (6, 32)
    assert not {tuple(row.tolist()) for row in mine} & {tuple(row.tolist()) for row in others}


def test_experts_in_one_tensor_are_refused():
    part = Part("mlp.experts", "mlp.experts.down_proj", 0, None, (8, 4), False)
    layout = Layout("model.layers", ((Linear("mlp.experts.0.down_proj", (8, 4), False, part, True),),))
    assert "block 0 holds its experts in one tensor, mlp.experts.down_proj" in unseen_experts(layout)


def test_an_estimate_counts_the_choice(tiny, tmp_path):
    """Four windows more cost their hidden states: in front of each block, behind the last, and their gradients."""
    made = [fs.estimate(fs.load_config(config_of(tmp_path, tiny), allocation=CHOSEN | {"windows": n})) for n in (6, 10)]
    few, many = (allocation_memory(one.job) for one in made)
    more = many.parts["hidden states of all blocks"] - few.parts["hidden states of all blocks"]
    assert more == 4 * 32 * (HIDDEN * 4 + 8) * (BLOCKS + 2)
    assert made[0].durations.allocation > 0
    assert fs.estimate(tiny_config(tmp_path, tiny, "fedspallm")).durations.allocation == 0
