"""Whole experiments in one process: files, sparsity after reload, rounds, and what must not change the result."""

import functools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedspallm_appfl.cli import main
from fedspallm_appfl.errors import FedSpaLLMError
from fedspallm_appfl.runs import experiment, serial
from fedspallm_appfl.settings.reading import load_config
from fedspallm_appfl.tensors import native
from fedspallm_appfl.tensors.target import parse_target
from helpers.experiments import first_pages, small_config, uneven
from helpers.families import save_family
from helpers.paths import DEMO, SHARED
from helpers.tiny import events, linears, run, save_tiny, tiny_config, weights

small_config = functools.partial(small_config, text=first_pages)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run of two clients with nothing but the defaults."""
    return run(small_config(tmp_path_factory.mktemp("plain"), 2))


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def assert_exact(folder, source, sparsity):
    """Every prunable matrix of the written model has exactly the target, and all other tensors are those of the source."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float16)
    AutoTokenizer.from_pretrained(folder / "model")
    dense = load_file(source / "model.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text())["matrices"]
    assert {matrix["name"] for matrix in manifest} == linears(dense).keys()
    parameters = dict(model.named_parameters())
    for matrix in manifest:
        weight = parameters[matrix["name"]]
        zeros = parse_target(sparsity).zeros(weight.numel())
        assert matrix["zeros"] == zeros and matrix["sparsity"] == zeros / weight.numel()
        assert int((weight == 0).sum()) == matrix["zeros_on_disk"] >= zeros
    made = weights(folder)
    assert all(torch.equal(dense[name], made[name]) for name in dense.keys() - linears(dense).keys())


@pytest.mark.parametrize("sparsity", ["0.5", "0.7", "2:4", "4:8"])
@pytest.mark.parametrize("pruner", ["sparsegpt", "wanda", "magnitude"])
def test_every_matrix_has_exactly_the_target_after_reload(tmp_path, tiny_model, pruner, sparsity):
    train = {"pruner": pruner, "sparsity": sparsity}
    folder = run(tiny_config(tmp_path, tiny_model, "fedspallm", 2, client_configs={"train_configs": train}))
    assert_exact(folder, tiny_model, sparsity)


def test_every_matrix_of_the_bundled_model_has_exactly_the_target_after_reload(tmp_path):
    folder = run(small_config(tmp_path, 2, client_configs={"train_configs": {"sparsity": "0.7"}}))
    assert_exact(folder, DEMO / "model", "0.7")
    assert len(json.loads((folder / "manifest.json").read_text())["matrices"]) == 56


def test_the_run_directory_is_complete(tmp_path):
    text = {"austen": str(DEMO / "text/austen/test.txt"), "jargon": str(DEMO / "text/jargon/test.txt")}
    evaluation = {"texts": text, "length": 64, "windows": 4, "compare": ["standalone", "fedavg"]}
    folder = run(small_config(tmp_path, 2, evaluation=evaluation))
    made = {"config.yaml", "manifest.json", "metrics.jsonl", "model", "report.html", "report.md"}
    assert {path.name for path in folder.iterdir()} == made
    assert {path.name for path in (folder / "model").iterdir()} == {
        *(path.name for path in (DEMO / "model").iterdir()),
        "README.md",
    }
    report = (folder / "report.md").read_text()
    for words in ("| FedSpaLLM |", "| standalone (mean) |", "| FedAvg |", "| dense |", "## Bytes", "0.500000"):
        assert words in report
    uploads = events(folder, "upload")
    assert len(uploads) == 2 * 8 and {event["blocks"] for event in uploads} == set("01234567")
    first = [
        json.loads(line)["perplexity"]
        for line in (folder / "metrics.jsonl").read_text().splitlines()
        if "dense" in line
    ]
    assert first[0]["austen"] < 60


BLOCK = 128 * 128 * 2 + 64 * 128 * 2 + 344 * 128 * 3  # weights of a block of the bundled model


def test_bytes_sent_up_are_those_of_mask_and_kept_values(plain):
    assert {event["bytes"] for event in events(plain, "upload")} == {BLOCK // 8 + BLOCK // 2 * 2}


def two_rounds(folder, pruner, compression):
    """Two rounds on half of the blocks each, at 70 %, so that masks get smaller and pieces go down."""
    folder.mkdir()
    train = {"pruner": pruner, "sparsity": 0.7, "layer_sampling": "sweep"}
    data = {"windows": 2, "length": 64, "batch": 2}
    client = {"train_configs": train, "data": data, "comm_configs": {"compression": compression}}
    return run(small_config(folder, 2, server_configs={"num_global_epochs": 2}, client_configs=client))


@pytest.fixture(scope="module", params=["sparsegpt", "wanda"])
def both(request, tmp_path_factory):
    """(pruner, run without compression, the same with it)."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, *(two_rounds(folder / how, request.param, how) for how in ("none", "zstd"))


def test_compression_changes_no_bit_of_the_model_and_sends_less(both):
    _, plain, small = both
    files = {path.name: path.read_bytes() for path in (plain / "model").iterdir()}
    assert {path.name: path.read_bytes() for path in (small / "model").iterdir()} == files
    assert [event["bytes_down"] > 0 for event in events(small, "round")] == [True, False]
    for one, other in zip(events(plain, "upload"), events(small, "upload"), strict=True):
        assert [one[key] for key in ("round", "client", "message", "blocks")] == [
            other[key] for key in ("round", "client", "message", "blocks")
        ]
        assert other["bytes"] < one["bytes"] if one["bytes"] else other["bytes"] == 0


def test_uploads_say_what_each_block_took(both):
    _, *folders = both
    for folder in folders:
        sent = [event for event in events(folder, "upload") if event["blocks"]]
        assert len(sent) == 2 * 8
        for event in events(folder, "upload"):
            assert event["bytes"] == sum(event["block_bytes"].values())
            assert ",".join(event["block_bytes"]) == event["blocks"]


def test_a_mask_alone_goes_up_where_the_server_has_the_weights(both):
    pruner, plain, _ = both
    kept = sum(n - 7 * n // 10 for n in [128 * 128] * 2 + [64 * 128] * 2 + [344 * 128] * 3)
    expected = BLOCK // 8 + (2 * kept if pruner == "sparsegpt" else 0)
    assert {event["bytes"] for event in events(plain, "upload") if event["blocks"]} == {expected}


def test_the_report_has_the_bytes_of_every_block(both):
    _, *folders = both
    for folder in folders:
        report = (folder / "report.md").read_text()
        assert "| block | uploads | up | dense | times smaller |" in report
        for block in range(8):
            up = sum(event["block_bytes"].get(str(block), 0) for event in events(folder, "upload"))
            assert f"| {block} | 2 | {up:,} | {2 * 2 * BLOCK:,} | {4 * BLOCK / up:.2f} |" in report


@pytest.mark.parametrize("both", ["sparsegpt"], indirect=True)
def test_a_run_without_compiled_loops_gives_the_same_model(both, tmp_path, monkeypatch):
    pruner, plain, _ = both
    if native.LIBRARY is None:
        pytest.skip("the compiled loops were not built, or FEDSPALLM_NATIVE=0 is set")
    assert "(compiled loops)" in (plain / "report.md").read_text()
    monkeypatch.setattr(native, "LIBRARY", None)
    slow = two_rounds(tmp_path / "slow", pruner, "none")
    assert "(no compiled loops)" in (slow / "report.md").read_text()
    assert (slow / "model/model.safetensors").read_bytes() == (plain / "model/model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def block_by_block(tmp_path_factory):
    """The weights of a run whose clients send a block in a message."""
    return weights(run(small_config(tmp_path_factory.mktemp("uneven"), **uneven(first_pages))))


@pytest.mark.parametrize(
    "comm", [{"blocks_per_message": 3}, {"max_message_bytes": 70_000}], ids=["groups", "split blocks"]
)
def test_how_an_upload_is_cut_does_not_change_a_bit(tmp_path, block_by_block, comm):
    made = weights(run(small_config(tmp_path, **uneven(first_pages), client_configs={"comm_configs": comm})))
    assert all(torch.equal(block_by_block[name], made[name]) for name in made)


def test_blocks_that_nobody_drew_stay_as_they_were(tmp_path):
    changes = {"client_configs": {"train_configs": {"layer_sampling": "uniform", "resource_share": 0.125}}}
    folder = run(small_config(tmp_path, 2, **changes))
    dense, pruned = load_file(DEMO / "model" / "model.safetensors"), weights(folder)
    drawn = {int(event["blocks"]) for event in events(folder, "upload") if event["blocks"]}
    for block in range(8):
        name = f"model.layers.{block}.mlp.up_proj.weight"
        assert torch.equal(dense[name], pruned[name]) != (block in drawn)
    assert "No client sent these blocks" in (folder / "report.md").read_text()


def test_one_participant_is_placed_and_counted_where_all_text_is_pooled(tmp_path, capsys):
    run(small_config(tmp_path, 2), "algorithm=centralized")
    shown = capsys.readouterr().out
    assert "Placement" in shown
    assert "client pooled  block 7  8/8" in shown


def test_sweep_sends_down_what_later_rounds_need(tmp_path, plain):
    changes = {
        "server_configs": {"num_global_epochs": 4},
        "client_configs": {"train_configs": {"layer_sampling": "sweep"}},
    }
    folder = run(small_config(tmp_path, 2, **changes))
    rounds = events(folder, "round")
    assert [event["blocks"] for event in rounds] == ["0-1", "2-3", "4-5", "6-7"]
    assert [event["bytes_down"] > 0 for event in rounds] == [True, True, True, False]
    one, other = weights(folder), weights(plain)
    first, last = "model.layers.0.mlp.up_proj.weight", "model.layers.7.mlp.up_proj.weight"
    assert torch.equal(one[first], other[first])
    assert not torch.equal(one[last], other[last])


def test_a_latest_round_replaces_and_a_cumulative_one_adds(tmp_path, tiny_model):
    """Two equal rounds: adding the same sums and votes twice gives the same model, unlike other windows would."""
    changes = {"server_configs": {"num_global_epochs": 2}}
    first = weights(run(tiny_config(tmp_path / "latest", tiny_model, "fedspallm", 2, **changes)))
    config = tiny_config(tmp_path / "cumulative", tiny_model, "fedspallm", 2, **changes)
    second = weights(run(config, "server_configs.aggregator_kwargs.fold=cumulative"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(first[name], second[name])


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt-neox", "qwen3"])
def test_other_families_are_written_under_their_own_names(tmp_path, family):
    folder = save_family(family, tmp_path / "model")
    changes = {
        "model": {"path": str(folder)},
        "client_configs": {"train_configs": {"pruner": "magnitude"}, "data": {"text": None}},
        "clients": [{"client_id": "a"}, {"client_id": "b"}],
    }
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((DEMO / "model" / file).read_bytes())
    done = run(small_config(tmp_path, 2, **changes))
    before, after = load_file(folder / "model.safetensors"), weights(done)
    assert before.keys() == after.keys()
    pruned = AutoModelForCausalLM.from_pretrained(done / "model")
    dense = AutoModelForCausalLM.from_pretrained(folder)
    for matrix in json.loads((done / "manifest.json").read_text())["matrices"]:
        kept = after[matrix["name"]] != 0
        assert int((~kept).sum()) == matrix["zeros_on_disk"] >= matrix["zeros"]
        assert torch.equal(after[matrix["name"]][kept], before[matrix["name"]][kept])
    assert sum(int((p == 0).sum()) for p in pruned.parameters()) > sum(int((p == 0).sum()) for p in dense.parameters())


def test_a_factorization_that_needs_more_damping_is_in_the_report(tmp_path):
    """Two windows of two tokens give a Gram matrix of rank four: with hardly any damping it cannot be factored."""
    data = {"windows": 2, "length": 2, "batch": 1}
    train = {"damping": 1e-12, "damping_retries": 12}
    folder = run(small_config(tmp_path, 2, client_configs={"data": data, "train_configs": train}))
    assert "## Unusual events" in (folder / "report.md").read_text()
    damped = [notes for event in events(folder, "upload") for notes in event["notes"].values()]
    assert all(notes["damping"] > 1e-12 for notes in damped) and damped


def test_a_factorization_that_keeps_failing_names_client_block_and_matrix(tmp_path, capsys):
    data = {"windows": 2, "length": 2, "batch": 1}
    config = small_config(
        tmp_path, 2, client_configs={"data": data, "train_configs": {"damping": 1e-14, "damping_retries": 1}}
    )
    assert main(["run", str(config)]) == 2
    error = capsys.readouterr().err
    assert "client austen, block 0, self_attn.q_proj: the Cholesky factorization failed 2 times" in error


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="the larger corpora are not part of the repository")
def test_fedspallm_beats_standalone_on_other_text_and_another_model(tmp_path):
    domains = ("bible", "manpages", "pgdocs", "pycode")
    changes = {
        "model": {"path": str(SHARED / "models/tiny-llama"), "dtype": "float32"},
        "client_configs": {
            "train_configs": {"threads": 2, "sparsity": 0.7},
            "data": {"windows": 32, "length": 256, "batch": 8},
        },
        "clients": [{"client_id": d, "data": {"text": str(SHARED / f"corpora/{d}/calib.txt")}} for d in domains],
        "evaluation": {
            "texts": {d: str(SHARED / f"corpora/{d}/test.txt") for d in (*domains, "wiki")},
            "length": 256,
            "windows": 30,
            "batch": 8,
            "compare": ["standalone"],
        },
    }
    folder = run(small_config(tmp_path, 4, **changes))
    rows = {event["method"]: event["perplexity"] for event in events(folder, "evaluation")}
    for text in (*domains, "wiki"):
        alone = sum(rows[f"standalone/{d}"][text] for d in domains) / 4
        assert rows["dense"][text] < rows["fedspallm"][text] < alone


def evaluated(folder, model, algorithm="fedspallm", **evaluation):
    """A tiny experiment that is evaluated on a text of its own."""
    text = shutil.copy(first_pages("jargon"), folder / "jargon.txt")
    texts = {"texts": {"law": str(text)}, "length": 24, "windows": 3}
    return load_config(tiny_config(folder, model, algorithm, 2, evaluation=texts | evaluation))[0]


@pytest.mark.parametrize(
    ("evaluation", "words"),
    [
        ({"texts": {"law": "gone.txt"}}, "evaluation.texts.law: the text gone.txt cannot be read"),
        ({"texts": {"law": ["word.txt"]}}, "evaluation.texts.law: .*word.txt has no whole window of 24 tokens"),
        ({"length": 65}, "evaluation.length: the model takes at most 64 tokens .*, got 65"),
        ({"device": "cuda:7"}, "evaluation.device: device cuda:7 was asked for"),
    ],
)
def test_what_the_evaluation_needs_is_looked_at_before_anything_is_pruned(
    evaluation, words, tiny_model, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "word.txt").write_text("word")
    config = evaluated(tmp_path, tiny_model, **evaluation)
    with pytest.raises(FedSpaLLMError, match=words):
        experiment.conduct(config, lambda *_: pytest.fail("it was run"), False)
    assert not (tmp_path / "run").exists()


def test_a_text_that_goes_away_while_a_run_works_does_not_end_it(tiny_model, tmp_path):
    config = evaluated(tmp_path, tiny_model)

    def launch(*arguments):
        (tmp_path / "jargon.txt").unlink()
        return serial.run(*arguments)

    results, _ = experiment.conduct(config, launch, False)
    assert results.perplexity["fedspallm"]["law"] > 0


def test_an_evaluation_that_fails_leaves_model_and_statistics(tiny_model, tmp_path, monkeypatch):
    config = evaluated(tmp_path, tiny_model, "gram")
    monkeypatch.setattr(experiment, "evaluate", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        experiment.conduct(config, serial.run, False)
    for name in ("model/model.safetensors", "manifest.json", "statistics"):
        assert (tmp_path / "run" / name).exists()
