"""Pruners and algorithms of one's own: used like the built-in ones, and refused by name where they are wrong."""

import json
from fractions import Fraction

import pytest
import torch
from safetensors.torch import load_file

import fedspallm_appfl as fs
from fedspallm_appfl.algorithms import registry as algorithms
from fedspallm_appfl.cli import main
from fedspallm_appfl.pruning import registry
from fedspallm_appfl.pruning.pruner import Prepared
from fedspallm_appfl.settings import plugins
from fedspallm_appfl.settings.schema import Pruning
from fedspallm_appfl.tensors.target import Ratio
from helpers.experiments import DOMAINS, first_pages
from helpers.paths import DEMO, ROOT
from helpers.tiny import run, save_tiny, tiny_config, weights

RIA = str(ROOT / "examples" / "plugins" / "ria.py")
OWN = {"plugins": [RIA], "client_configs": {"train_configs": {"pruner": "ria"}}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


def test_ria_by_hand():
    plugins.load([RIA])
    weight = torch.tensor([[1.0, -3.0], [2.0, 2.0]])
    norms = fs.InputNorms.of(torch.tensor([16.0, 1.0]), 4)
    # Shares of column and row: 1/3 + 1/4, 3/5 + 3/4; 2/3 + 1/2, 2/5 + 1/2. Times (4, 1) ** 0.5: 1.17, 1.35; 2.33, 0.9.
    settings = fs.Pruning("ria", fs.parse_target(0.5))
    pruned, mask = registry.prune(weight, settings, norms)
    assert mask.tolist() == [[False, True], [True, False]]
    assert pruned.tolist() == [[0.0, -3.0], [2.0, 0.0]]


def test_a_plugin_is_used_in_one_process_and_sends_masks_alone(model, tmp_path):
    folder = run(tiny_config(tmp_path, model, "fedspallm", **OWN))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["pruner"] == "ria" and manifest["sparsity"] == 0.5
    pruned = weights(folder)
    for name, tensor in load_file(model / "model.safetensors").items():
        kept = pruned[name] != 0
        assert torch.equal(pruned[name][kept], tensor[kept])
    uploads = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    sent = sum(event["bytes"] for event in uploads if event["event"] == "upload")
    assert sent == 3 * 23_040 // 8
    assert str(RIA) in (folder / "config.yaml").read_text()


def test_a_plugin_is_used_by_study_validate_and_estimate(model, tmp_path, capsys):
    texts = {"texts": {"held": str(first_pages("bible"))}, "length": 24, "windows": 4}
    config = str(tiny_config(tmp_path, model, "fedspallm", plugins=[RIA], evaluation=texts))
    command = ["study", config, "--algorithms", "fedspallm+ria", "gram+ria", "--out", str(tmp_path / "study")]
    assert main(["validate", config, "client_configs.train_configs.pruner=ria"]) == 0
    assert main(["estimate", config, "client_configs.train_configs.pruner=ria"]) == 0
    assert "with ria" in capsys.readouterr().out
    assert main(command) == 0
    rows = json.loads((tmp_path / "study" / "study.json").read_text())
    assert "fedspallm+ria" in json.dumps(rows) and "gram+ria" in json.dumps(rows)


def test_an_algorithm_of_ones_own(model, tmp_path):
    plugin = tmp_path / "own.py"
    plugin.write_text(
        "import fedspallm_appfl as fs\n"
        "def combine(sums, matrix):\n"
        "    mean = fs.l0_mean(sums)\n"
        "    return mean, fs.expand(sums.votes, sums.clients, mean, matrix.target, matrix.group)\n"
        "fs.register(fs.Algorithm('mine', [fs.Exchange('weights', 'weights', combine)], averages=True, expands=True))\n"
    )
    mine = run(tiny_config(tmp_path / "mine", model, "mine", plugins=[str(plugin)]))
    builtin = run(tiny_config(tmp_path / "paper", model, "fedspallm"))
    assert all(torch.equal(tensor, weights(builtin)[name]) for name, tensor in weights(mine).items())


WRONG = {  # what a function makes of a weight -> what is said
    "shape": (
        "torch.ones(2, 2, dtype=torch.bool)",
        "the mask is bool of shape [32, 32], True = kept; got bool of shape [2, 2]",
    ),
    "dtype": ("weight", "the mask is bool of shape [32, 32], True = kept; got float32 of shape [32, 32]"),
    "zeros": ("torch.ones_like(weight, dtype=torch.bool)", "sparsity 0.5 prunes 512 of 1024 entries, the mask 0"),
    "weight": (
        "(weight[:1], ~fs.select(weight.abs(), target, False))",
        "the weight has shape [32, 32], got float32 of shape [1, 32]",
    ),
    "kept": ("(weight + 1, ~fs.select(weight.abs(), target, False))", "it changed kept weights"),
    "error": ("1 / 0", "ZeroDivisionError: division by zero"),
    "nothing": ("None", "the mask is bool of shape [32, 32], True = kept; got NoneType"),
    "nan": ("(weight * float('nan'), ~fs.select(weight.abs(), target, False))", "NaN or infinity"),
    "changed": ("[inputs.squares.zero_(), ~fs.select(weight.abs(), target, False)][1]", "it changed the statistic"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_a_pruner_makes_is_checked_with_pruner_client_block_and_matrix(model, tmp_path, wrong):
    made, words = WRONG[wrong]
    plugin = tmp_path / "own.py"
    plugin.write_text(
        "import torch\nimport fedspallm_appfl as fs\n"
        "@fs.pruner('mine', needs=fs.InputNorms, keeps_weights=True)\n"
        f"def mine(weight, target, inputs):\n    return {made}\n"
    )
    texts = {name: first_pages(name) for name in DOMAINS[:2]}
    settings = {"plugins": [str(plugin)], "pruner": "mine", "windows": 2, "length": 24}
    with pytest.raises(fs.PruningError) as caught:
        fs.prune(model, texts, tmp_path / "run", **settings)
    for word in ("client austen", "block 0", "self_attn.q_proj", "pruner mine", words):
        assert word in str(caught.value)


def test_what_a_pruner_makes_of_zeros_and_for_a_mask_of_others_is_checked_too():
    weight, zero = torch.ones(4, 8), torch.zeros(4, 8, dtype=torch.bool)
    zero[:, :4] = True
    half = ~zero
    settings = Pruning("mine", Ratio(Fraction(1, 4)))

    def guarded(sparse=None, compensate=torch.mul):
        prepared = Prepared(lambda weight: (weight, half), compensate, sparse=sparse)
        fs.register(fs.Pruner("mine", None, lambda settings, known: prepared))
        return registry.find("mine").prepare(settings, None)

    pruned, mask = guarded(lambda weight, zero: (weight * ~zero, ~zero)).prune_all(
        weight * half, settings.own_target, zero
    )
    assert (
        int((~mask).sum()) == 8 and int((pruned == 0).sum()) == 16
    )  # all zeros stay, the mask says as many as it should
    for wrong, words in (
        (lambda weight, zero: (weight * float("nan"), ~zero), "NaN or infinity"),
        (lambda weight, zero: weight, "ValueError"),
        (lambda weight, zero: (weight[:1], ~zero), "the weight has shape"),
    ):
        with pytest.raises(fs.PruningError, match=f"pruner mine: .*{words}"):
            guarded(wrong).prune_all(weight * half, settings.own_target, zero)
    for wrong, words in (
        (lambda weight, mask: 1 / 0, "ZeroDivisionError"),
        (lambda weight, mask: None, "got NoneType"),
    ):
        with pytest.raises(fs.PruningError, match=f"pruner mine: .*{words}"):
            guarded(compensate=wrong).fit_all(weight, half, None)


def test_what_an_algorithm_makes_is_checked_with_block_and_matrix(model, tmp_path):
    for made, words in (
        (lambda sums, matrix: sums.votes < 1, "makes a weight and a mask here, got a mask"),
        (lambda sums, matrix: (fs.l0_mean(sums), sums.votes), "True = kept; got uint8"),
        (lambda sums, matrix: (fs.l0_mean(sums) / 0, sums.votes < 1), "without NaN or infinity"),
        (lambda sums, matrix: 1 / 0, "ZeroDivisionError: division by zero"),
        (
            lambda sums, matrix: (fs.l0_mean(sums), sums.votes < 9),
            "sparsity 0.5 prunes 512 of 1024 entries, the mask 0",
        ),
    ):
        fs.register(fs.Algorithm("mine", [fs.Exchange("weights", "weights", made)]))
        with pytest.raises(fs.PruningError, match=r"algorithm mine, block 0, self_attn\.\w_proj") as caught:
            fs.prune(model, {"a": first_pages("bible")}, tmp_path / words, algorithm="mine", windows=2, length=24)
        assert words in str(caught.value)


def test_plugins_that_cannot_be_used_are_named(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("import fedspallm_appfl\n\nraise ValueError('no')\n")
    config = ROOT / "configs" / "demo.yaml"
    for named, words in (
        (str(broken), "broken.py cannot be imported: ValueError: no, line 3"),
        (str(tmp_path / "none.py"), "there is no file"),
        ("no_such_module", "no_such_module cannot be imported: ModuleNotFoundError"),
    ):
        [problem] = fs.validate(fs.load_config(config, plugins=[named]), files=False)
        assert problem.startswith("plugins: ") and words in problem
    with pytest.raises(fs.ConfigError, match="one of sparsegpt, admm, wanda, magnitude; got 'mine'"):
        fs.prune(DEMO / "model", {"a": first_pages("bible")}, tmp_path / "run", pruner="mine", length=24, windows=1)


def test_names_that_are_taken_or_no_names_are_refused():
    for name in ("wanda", "a b", ""):
        with pytest.raises(fs.ConfigError, match="built in|letters"):
            fs.pruner(name)(lambda weight, target: weight > 0)
    with pytest.raises(fs.ConfigError, match="built in"):
        fs.register(fs.Algorithm("gram", [fs.Exchange("grams")], accumulates=False))
    for made, words in (
        (lambda: fs.Exchange("text"), "an exchange sends one of"),
        (lambda: fs.Exchange("weights", make=3), "is a function of sums and matrix"),
        (lambda: fs.Algorithm("mine", []), "name its exchanges"),
        (lambda: fs.Algorithm("mine", [fs.Exchange("weights")]), "an exchange of weights needs a `make`"),
        (lambda: fs.Algorithm("mine", [fs.Exchange("masks")]), "an exchange of masks needs a `make`"),
        (lambda: fs.Algorithm("mine", [fs.Exchange("masks", "masks", max)]), "ends in weights"),
        (lambda: fs.Algorithm("mine", [fs.Exchange("values")]), "that the exchange before sent down"),
        (lambda: fs.Algorithm("mine", [fs.Exchange("grams", make=max)]), "take no `make`"),
        (lambda: fs.Algorithm("mine", [fs.Exchange("weights", "weights", max)] * 2), "set accumulates=False"),
        (lambda: fs.Algorithm("mine", [fs.Exchange("grams"), fs.Exchange("grams")]), "stands alone"),
        (lambda: fs.register("mine"), "got str"),
        (lambda: fs.register(fs.Algorithm("dense", [fs.Exchange("grams")])), "built in"),
        (lambda: fs.pruner(lambda weight, target: weight > 0), "write @fs.pruner"),
        (lambda: fs.pruner("mine", needs="gram"), "InputNorms, InputGram or None; got 'mine', 'gram'"),
    ):
        with pytest.raises(fs.ConfigError, match=words):
            made()
    assert algorithms.names() == algorithms.BUILT_IN and registry.names() == registry.BUILT_IN


def test_a_function_may_write_into_its_weight(model, tmp_path):
    texts = {"a": first_pages("bible")}

    @fs.pruner("mine", keeps_weights=True)
    def mine(weight, target):
        return ~fs.select(weight.abs_().mul_(3.0), target, per_row=False)

    own = fs.prune(model, texts, tmp_path / "own", pruner="mine", windows=2, length=24)
    built_in = fs.prune(model, texts, tmp_path / "built-in", pruner="magnitude", windows=2, length=24)
    assert all(
        torch.equal(tensor, weights(tmp_path / "built-in")[name]) for name, tensor in weights(tmp_path / "own").items()
    )
    assert own.sparsity == built_in.sparsity


def test_a_pruner_that_cannot_make_up_for_a_mask_is_refused_by_consensus(model, tmp_path):
    fs.pruner("mine")(lambda weight, target: (weight * 2, ~fs.select(weight.abs(), target, False)))
    with pytest.raises(fs.ConfigError, match="mine cannot make up for a mask that others chose"):
        fs.prune(
            model, {"a": first_pages("bible")}, tmp_path, pruner="mine", algorithm="consensus", windows=2, length=24
        )
