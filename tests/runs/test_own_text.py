"""Clients measure the finished model on windows of their own text, and send nothing but sums."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from fedspallm_appfl.errors import UpdateError
from fedspallm_appfl.estimates import traffic
from fedspallm_appfl.estimates.job import Job
from fedspallm_appfl.settings.reading import load_config
from fedspallm_appfl.texts.drawing import draw
from fedspallm_appfl.texts.tokenizer import load_tokenizer
from fedspallm_appfl.texts.windows import Cut
from fedspallm_appfl.wire.update import checked_losses
from helpers.experiments import first_pages
from helpers.tiny import events, run, save_tiny, tiny_config, weights


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model", torch.float32)


def measured(folder):
    return {event["client"]: event for event in events(folder, "measured")}


def loss(folder, windows):
    """An independent sum: the whole model as transformers runs it."""
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(windows).logits
    return float(cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten(), reduction="sum"))


def own_windows(model, client, used, count):
    return draw(str(first_pages(client)), Cut(24), load_tokenizer(model), used, 0, client, count)[used:]


def test_the_sums_are_those_of_windows_that_no_pruning_has_seen_and_the_model_is_the_same(tmp_path, model):
    folder = run(tiny_config(tmp_path, model, "fedspallm", evaluation={"own_windows": 3}))
    found = measured(folder)
    for number, (client, event) in enumerate(found.items()):
        windows = own_windows(model, client, 6 + number, 3)
        assert event["tokens"] == 3 * 23
        assert event["dense"] == pytest.approx(loss(model, windows), rel=1e-4)
        assert event["pruned"] == pytest.approx(loss(folder / "model", windows), rel=1e-4)
        assert set(event) == {"event", "time", "client", "tokens", "dense", "pruned", "bytes_down"}
    without = run(tiny_config(tmp_path / "without", model, "fedspallm", evaluation={"own_windows": 0}))
    assert measured(without) == {}
    assert all(torch.equal(one, weights(without)[name]) for name, one in weights(folder).items())


@pytest.mark.parametrize("algorithm", ["fedspallm", "consensus", "gram", "sweep", "standalone", "centralized"])
@pytest.mark.parametrize("rounds", [1, 2])
def test_every_algorithm_sends_down_what_is_missing_and_the_estimate_says_so(tmp_path, model, algorithm, rounds):
    if rounds == 2 and algorithm in ("standalone", "centralized", "gram", "sweep"):
        pytest.skip("it has one round")
    gram = {"gram": {"propagate": "pruned"}} if algorithm == "sweep" else {}
    sampling = {"layer_sampling": "uniform", "resource_share": 0.34} if rounds == 2 else {}
    config = tiny_config(
        tmp_path,
        model,
        "gram" if algorithm == "sweep" else algorithm,
        server_configs={"num_global_epochs": rounds, "device": "cpu"},
        client_configs={"train_configs": sampling, "comm_configs": {"max_message_bytes": 20_000}},
        **gram,
    )
    folder = run(config)
    found = measured(folder)
    assert all(event["tokens"] == 8 * 23 * (3 if algorithm == "centralized" else 1) for event in found.values())
    assert len(found) == (1 if algorithm == "centralized" else 3)
    assert {event["bytes_down"] for event in found.values()} == {traffic.final(Job.of(load_config(config)[0]))}
    if algorithm == "standalone":
        for number, (client, event) in enumerate(found.items()):
            windows = own_windows(model, client, 6 + number, 8)
            assert event["pruned"] == pytest.approx(loss(folder / "models" / client / "model", windows), rel=1e-4)
    report = (folder / "report.md").read_text("utf-8")
    total = math.exp(sum(one["pruned"] for one in found.values()) / sum(one["tokens"] for one in found.values()))
    assert "## Perplexity on the clients' own held-out text" in report
    assert f"{total:.3f} |" in report


def test_a_text_without_windows_to_spare_is_named_and_nothing_of_a_single_window_is_told(tmp_path, model):
    file = tmp_path / "short.txt"
    text, tokenizer = first_pages("austen").read_text("utf-8"), load_tokenizer(model)
    file.write_text(
        tokenizer.decode(tokenizer(text)["input_ids"][: 24 * 8]), "utf-8"
    )  # 7 or 8 windows; 6 are for pruning
    config = tiny_config(tmp_path, model, "fedspallm", 2)
    folder = run(config, f"clients.0.data.text={file}", "clients.0.data.windows=7")
    [short] = [client for client, event in measured(folder).items() if not event["tokens"]]
    assert f"- {short}: its text has no windows beside those for pruning" in (folder / "report.md").read_text("utf-8")


def test_with_texts_of_the_server_clients_measure_only_if_asked(tmp_path, model):
    texts = {"texts": {"bible": str(first_pages("bible"))}, "length": 24, "windows": 2}
    assert measured(run(tiny_config(tmp_path / "a", model, "fedspallm", 2, evaluation=texts))) == {}
    asked = tiny_config(tmp_path / "b", model, "fedspallm", 2, evaluation={**texts, "own_windows": 2})
    assert len(measured(run(asked))) == 2


@pytest.mark.parametrize(
    "losses",
    [None, {}, {"tokens": 1, "dense": 1.0}, {"tokens": 1.0, "dense": 1.0, "pruned": 1.0}]
    + [{"tokens": 1, "dense": -1.0, "pruned": 1.0}, {"tokens": 1, "dense": [1.0], "pruned": 1.0}],
)
def test_what_is_no_sum_of_losses_is_refused(losses):
    with pytest.raises(UpdateError, match="refused an update from client a: "):
        checked_losses("a", losses)
