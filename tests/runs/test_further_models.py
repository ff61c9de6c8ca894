"""Further models from stored statistics: those that fresh runs would give, and what stands in the way."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fedspallm_appfl.aggregation.layer_sampling import from_text
from fedspallm_appfl.cli import main
from fedspallm_appfl.errors import ConfigError
from fedspallm_appfl.runs import further_models, run_dir
from fedspallm_appfl.settings.reading import load_config
from fedspallm_appfl.tensors.target import parse_target
from helpers.experiments import first_pages
from helpers.tiny import BLOCKS, events, linears, run, save_tiny, tiny_config, weights


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def done(model, tmp_path_factory):
    """A run with rounded statistics and something to evaluate on."""
    folder = tmp_path_factory.mktemp("done")
    evaluation = {"texts": {"jargon": str(first_pages("jargon"))}, "length": 24, "windows": 3}
    return run(tiny_config(folder, model, "gram", 2, evaluation=evaluation))


@pytest.fixture
def damaged(done, tmp_path):
    """A copy that may be broken."""
    return shutil.copytree(done, tmp_path / "run")


def prune(folder, *arguments):
    return main(["prune", str(folder), *arguments])


def said(capsys):
    return " ".join(capsys.readouterr().err.split())


def file_of(folder):
    return (folder / "model" / "model.safetensors").read_bytes()


def test_a_run_keeps_sums_of_every_input(done):
    files = sorted(path.name for path in (done / "statistics").iterdir())
    inputs = ("mlp.down_proj", "mlp.gate_proj", "self_attn.o_proj", "self_attn.q_proj")
    assert files == [f"{block:04d}-{name}.safetensors" for block in range(BLOCKS) for name in inputs]
    with safe_open(done / "statistics" / files[3], framework="pt") as file:
        facts = file.metadata()
    assert json.loads(facts["linears"]) == ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    assert (facts["tokens"], facts["rounded"]) == (str(24 * (6 + 7)), "true")


@pytest.mark.parametrize(
    "changes", [{}, {"pruner": "admm", "iterations": 9}, {"pruner": "wanda", "refit": True}], ids=str
)
def test_the_target_of_the_run_gives_its_model_again_and_others_those_of_fresh_runs(tmp_path, model, changes):
    def fresh(name, sparsity):
        train = {"client_configs": {"train_configs": {**changes, "sparsity": sparsity, "damping": 0.02}}}
        return run(tiny_config(tmp_path / name, model, "gram", 2, **train))

    first, others, used = fresh("first", "0.5"), {"0.7": "0.7", "2-4": "2:4"}, changes.get("pruner", "sparsegpt")
    assert prune(first, "--sparsity", "0.5", *others.values()) == 0
    assert {path.name for path in (first / "further").iterdir()} == {f"{used}-{name}" for name in ("0.5", *others)}
    assert file_of(first / "further" / f"{used}-0.5") == file_of(first)
    if changes:  # one other target will do
        others.pop("0.7")
    for name, target in others.items():
        made = first / "further" / f"{used}-{name}"
        assert file_of(made) == file_of(fresh(name, target))
        manifest = json.loads((made / "manifest.json").read_text())
        assert (manifest["target"], manifest["algorithm"]) == (target, "gram")
        assert all(one["zeros"] == parse_target(target).zeros(one["entries"]) for one in manifest["matrices"])
    config = (first / "model" / "config.json").read_text()
    assert (first / "further" / f"{used}-2-4" / "model" / "config.json").read_text() == config


def test_another_pruner_gives_what_a_run_with_it_would(tmp_path, model, done):
    folder = shutil.copytree(done, tmp_path / "run")
    assert prune(folder, "--sparsity", "0.6", "--pruner", "admm") == 0
    train = {"client_configs": {"train_configs": {"pruner": "admm", "sparsity": "0.6"}}}
    fresh = run(tiny_config(tmp_path / "fresh", model, "gram", 2, **train))
    assert file_of(folder / "further" / "admm-0.6") == file_of(fresh)


def test_another_pruner_begins_without_the_refit_of_the_run(tmp_path, model):
    train = {"client_configs": {"train_configs": {"refit": True}}}
    folder = run(tiny_config(tmp_path / "run", model, "gram", 2, **train))
    assert prune(folder, "--sparsity", "0.5", "--pruner", "sparsegpt") == 0
    assert file_of(folder / "further" / "sparsegpt-0.5") == file_of(folder)
    assert prune(folder, "--sparsity", "0.5", "--pruner", "admm") == 0
    train = {"client_configs": {"train_configs": {"pruner": "admm"}}}
    fresh = run(tiny_config(tmp_path / "fresh", model, "gram", 2, **train))
    assert file_of(folder / "further" / "admm-0.5") == file_of(fresh)


@pytest.mark.parametrize("texts", [{}, None], ids=["without texts", "with a text"])
def test_packed_models_lie_in_the_run_directory_and_no_longer_than_they_are_read(damaged, texts, monkeypatch):
    if texts is not None:
        file = damaged / "config.yaml"
        file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"evaluation": {"texts": texts}}))
    beside, check = [], further_models._require_all

    def watched(run, skeleton, packed):
        beside.append(sorted(path.name for path in (damaged / "scratch").iterdir()))
        check(run, skeleton, packed)

    monkeypatch.setattr(further_models, "_require_all", watched)
    assert prune(damaged, "--sparsity", "0.5", "0.6") == 0
    assert beside == [["sparsegpt-0.5"], ["sparsegpt-0.5", "sparsegpt-0.6"] if texts is None else ["sparsegpt-0.6"]]
    assert not (damaged / "scratch").exists()


def test_what_is_packed_goes_when_a_model_cannot_be_written(damaged, monkeypatch):
    monkeypatch.setattr(further_models.experiment, "write_pruned", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prune(damaged, "--sparsity", "0.6")
    assert not (damaged / "scratch").exists()


def test_another_pruner_has_a_folder_of_its_own_and_the_run_is_left_alone(damaged, capsys):
    before = {path: path.read_bytes() for path in damaged.rglob("*") if path.is_file()}
    for pruner in ("admm", "sparsegpt"):
        assert prune(damaged, "--sparsity", "0.5", "--pruner", pruner) == 0
    assert {path.name for path in (damaged / "further").iterdir()} == {"admm-0.5", "sparsegpt-0.5"}
    assert file_of(damaged / "further" / "sparsegpt-0.5") == file_of(damaged)
    after = {path: path.read_bytes() for path in damaged.rglob("*") if path.is_file()}
    assert {path: after[path] for path in before} == before
    assert all(path.is_relative_to(damaged / "further") for path in after.keys() - before.keys())
    out = capsys.readouterr().out
    assert "jargon" in out
    assert "0.5" in out


def test_perplexities_are_those_of_the_run(damaged, done, capsys):
    assert prune(damaged, "--sparsity", "0.5") == 0
    out = capsys.readouterr().out
    [measured] = [event["perplexity"]["jargon"] for event in events(done, "evaluation") if event["method"] == "gram"]
    assert f"{measured:.2f}"[:5] in out


def test_equal_targets_are_one_model_by_one_name(damaged):
    assert prune(damaged, "--sparsity", "1/2", "0.50", "5e-1") == 0
    assert [path.name for path in (damaged / "further").iterdir()] == ["sparsegpt-0.5"]
    assert file_of(damaged / "further" / "sparsegpt-0.5") == file_of(damaged)
    assert json.loads((damaged / "further" / "sparsegpt-0.5" / "manifest.json").read_text())["target"] == "0.5"


@pytest.mark.parametrize(
    ("text", "spelt", "folder"),
    [
        ("0.50", "0.5", "0.5"),
        ("0", "0", "0"),
        ("7/10", "0.7", "0.7"),
        ("0.1234567", "0.1234567", "0.1234567"),
        ("1/3", "1/3", "1_3"),
        ("02:4", "2:4", "2-4"),
        ("1:2", "1:2", "1-2"),  # stricter than 2:4
    ],
)
def test_a_target_has_one_spelling_that_means_it_exactly(text, spelt, folder):
    made = str(parse_target(text))
    assert (made, further_models.folder_name(made)) == (spelt, folder)
    assert parse_target(made) == parse_target(text)


def test_a_model_that_is_there_is_replaced_only_when_it_is_asked_for(damaged, capsys):
    assert prune(damaged, "--sparsity", "0.5") == 0
    there = damaged / "further" / "sparsegpt-0.5"
    (there / "model" / "model.safetensors").write_bytes(b"mine")
    assert prune(damaged, "--sparsity", "0.7", "0.50") == 2
    assert f"{there}: made before; give --overwrite to replace what is there" in said(capsys)
    assert file_of(there) == b"mine"
    assert not (damaged / "further" / "sparsegpt-0.7").exists()
    (there / "model" / "stray.safetensors").write_bytes(b"mine")
    assert prune(damaged, "--sparsity", "0.5", "--overwrite") == 0
    assert file_of(there) == file_of(damaged)
    assert not (there / "model" / "stray.safetensors").exists()


def test_a_model_that_was_interrupted_is_made_anew(damaged):
    (damaged / "further" / "sparsegpt-0.5" / "model").mkdir(parents=True)
    assert prune(damaged, "--sparsity", "0.5") == 0
    assert file_of(damaged / "further" / "sparsegpt-0.5") == file_of(damaged)


def test_a_run_directory_in_which_somebody_is_at_work_is_left_alone(damaged, capsys):
    with run_dir.locked(damaged, "wait"):
        assert prune(damaged, "--sparsity", "0.6") == 2
        assert f"another run or fedspallm prune is using {damaged}; wait until it is done" in said(capsys)
        assert not (damaged / "further").exists()
    assert prune(damaged, "--sparsity", "0.6") == 0
    assert not (damaged / ".lock").exists()


def test_a_run_does_not_replace_what_prune_is_reading(damaged, capsys):
    config, _ = load_config(damaged / "config.yaml")
    config.run_dir = str(damaged)
    with run_dir.locked(damaged, ""), pytest.raises(ConfigError, match="is using"), run_dir.claimed(config, True):
        pass
    assert (damaged / "statistics").is_dir()


def test_a_text_that_is_gone_is_said_before_anything_is_pruned(damaged, tmp_path, capsys):
    file = damaged / "config.yaml"
    raw = yaml.safe_load(file.read_text())
    raw["evaluation"]["texts"]["jargon"] = str(tmp_path / "gone.txt")
    file.write_text(yaml.safe_dump(raw))
    assert prune(damaged, "--sparsity", "0.6") == 2
    assert f"evaluation.texts.jargon: the text {tmp_path / 'gone.txt'} cannot be read" in said(capsys)
    assert not (damaged / "further").exists()


def test_blocks_that_nobody_drew_stay_dense(tmp_path, model):
    train = {"client_configs": {"train_configs": {"resource_share": 0.34, "layer_sampling": "uniform"}}}
    folder = run(tiny_config(tmp_path, model, "gram", 2, **train, seed=4))
    [event] = events(folder, "round")
    drawn = from_text(event["blocks"])
    assert 0 < len(drawn) < BLOCKS
    assert prune(folder, "--sparsity", "0.75") == 0
    dense, made = load_file(model / "model.safetensors"), weights(folder / "further" / "sparsegpt-0.75")
    for name, tensor in linears(dense).items():
        assert torch.equal(made[name], tensor) is (int(name.split(".")[2]) not in drawn)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sparsity", "1.5"], "--sparsity: sparsity is a share in [0, 1), got 1.5; 50 % is written 0.5"),
        (["--sparsity", "half"], "--sparsity: sparsity is a share in [0, 1) such as 0.5 or a pattern such as 2:4, got"),
        (["--sparsity", "4:2"], "--sparsity: a pattern n:m needs 0 < n < m"),
        (["--sparsity", "3:5"], "3:5 needs rows that are a multiple of 5 long, got 32"),
        (["--sparsity", "0.5", "-1"], "--sparsity: sparsity is a share in [0, 1), got -1"),
        (
            ["--sparsity", "0.5", "--pruner", "fisher"],
            "--pruner: one of sparsegpt, admm, wanda, magnitude; got 'fisher'",
        ),
        (["--sparsity", "0.5", "--pruner", "magnitude"], "magnitude needs no statistics; choose another pruner"),
    ],
)
def test_bad_targets_and_pruners_are_said_before_anything_is_written(damaged, capsys, arguments, words):
    assert prune(damaged, *arguments) == 2
    error = said(capsys)
    assert error.startswith("error: ")
    assert words in error
    assert not (damaged / "further").exists()


def test_a_folder_that_is_no_finished_run_of_gram_is_refused(tmp_path, model, damaged, capsys):
    swept = {"gram": {"propagate": "pruned"}, "client_configs": {"train_configs": {"pruner": "wanda"}}}
    assert prune(tmp_path / "nowhere", "--sparsity", "0.6") == 2
    assert f"there is no folder {tmp_path / 'nowhere'}; name the run_dir of a finished run" in said(capsys)
    folders = [
        model,
        run(tiny_config(tmp_path / "fedavg", model, "fedavg", 1)),
        run(tiny_config(tmp_path / "swept", model, "gram", 1, **swept)),
    ]
    for folder in folders:
        assert prune(folder, "--sparsity", "0.6") == 2
        assert f"{folder} holds no statistics/; name the run_dir of a finished run with algorithm gram" in said(capsys)
        assert not (folder / "further").exists()
    (damaged / "manifest.json").unlink()  # it was killed while it wrote the model
    assert prune(damaged, "--sparsity", "0.6") == 2
    assert "name the run_dir of a finished run" in said(capsys)


@pytest.mark.parametrize("lost", ["0001-mlp.gate_proj", "0000-self_attn.q_proj", "0002-"])
def test_statistics_that_are_gone_are_named(damaged, capsys, lost):
    """One input of a block, or all of one."""
    for file in (damaged / "statistics").glob(f"{lost}*"):
        file.unlink()
    assert prune(damaged, "--sparsity", "0.6") == 2
    block, linear = int(lost[:4]), lost[5:] or "self_attn.q_proj"
    assert f"statistics lacks the statistics of block {block}, {linear}; run the experiment again" in said(capsys)
    assert not (damaged / "further").exists()


@pytest.mark.parametrize("change", [lambda data: data[:-3], lambda data: b"", lambda data: b"{}" * 50])
def test_statistics_that_are_damaged_are_named(damaged, capsys, change):
    file = damaged / "statistics" / "0001-mlp.gate_proj.safetensors"
    file.write_bytes(change(file.read_bytes()))
    assert prune(damaged, "--sparsity", "0.6") == 2
    assert "0001-mlp.gate_proj.safetensors is damaged: " in said(capsys)


def test_a_dense_model_that_has_moved_is_named(tmp_path, model, capsys):
    moved = shutil.copytree(model, tmp_path / "model")
    folder = run(tiny_config(tmp_path, moved, "gram", 1))
    shutil.rmtree(moved)
    assert prune(folder, "--sparsity", "0.6") == 2
    assert str(moved) in said(capsys)


@pytest.mark.parametrize(
    "manifest",
    ["", "[1]", "{}", '{"matrices": 1}', '{"matrices": [1]}', '{"matrices": [{}]}', "[" * 10**5, '{"a": "' + "x" * 999],
    ids=range(8),
)
def test_a_damaged_manifest_ends_with_a_line(damaged, capsys, manifest):
    (damaged / "manifest.json").write_text(manifest)
    assert prune(damaged, "--sparsity", "0.5") == 2
    assert "manifest.json is damaged: " in (error := said(capsys))
    assert "Traceback" not in error and "run the experiment again" in error


def rewritten(file, facts=None, **tensors):
    with safe_open(file, framework="pt") as stored:
        before, kept = stored.metadata(), {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    save_file({**kept, **tensors}, file, metadata={**before, **(facts or {})})


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file.write_bytes(file.read_bytes()[:100]),
        lambda file: file.write_bytes(b"\xff" * 100),
        lambda file: rewritten(file, {"linears": "1"}),
        lambda file: rewritten(file, {"linears": "[]"}),
        lambda file: rewritten(file, {"linears": '["nobody"]'}),
        lambda file: rewritten(file, {"tokens": "many"}),
        lambda file: rewritten(file, {"rounded": "{"}),
        lambda file: rewritten(file, diagonal=torch.ones(2), upper=torch.ones(1)),
        lambda file: rewritten(file, upper=torch.ones(1)),
        lambda file: rewritten(file, diagonal=torch.tensor(1.0)),
        lambda file: file.rename(file.with_name("0099-mlp.down_proj.safetensors")),
    ],
)
def test_damaged_statistics_end_with_a_line(damaged, capsys, change):
    change(damaged / "statistics" / "0001-mlp.down_proj.safetensors")
    assert prune(damaged, "--sparsity", "0.5") == 2
    error = said(capsys)
    assert "Traceback" not in error and "run the experiment again" in error


def test_a_run_that_was_cut_off_is_named_as_such(tmp_path, capsys):
    folder = tmp_path / "run"
    (folder / run_dir.STATE).mkdir(parents=True)
    (folder / run_dir.MARK).touch()
    assert prune(folder, "--sparsity", "0.5") == 2
    assert "was cut off; finish it with fedspallm resume" in said(capsys)
    with run_dir.locked(folder, "wait"):
        assert prune(folder, "--sparsity", "0.5") == 2
    assert "another run or fedspallm prune is using" in said(capsys)
