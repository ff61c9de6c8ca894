"""The card of a pruned model."""

import json

import pytest
import yaml
from huggingface_hub import ModelCard

from fedspallm_appfl.cli import main
from helpers.tiny import run, save_tiny, tiny_config

BASE = "---\nlicense: other\nlicense_name: ours\ntags: [x]\n---\n# The base\n"


def front_and_body(folder):
    text = (folder / "README.md").read_text("utf-8")
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run whose base model has a card, and a further model from its sums."""
    folder = tmp_path_factory.mktemp("card")
    model = save_tiny(folder / "tiny")
    (model / "README.md").write_text(BASE)
    text = next(iter(yaml.safe_load(tiny_config(folder / "x", model, "gram").read_text())["clients"]))["data"]["text"]
    evaluation = {"texts": {"held": text}, "length": 24, "windows": 2}
    out = run(tiny_config(folder / "c", model, "gram", evaluation=evaluation))
    assert main(["prune", str(out), "--sparsity", "2:4"]) == 0
    return out


@pytest.mark.parametrize(("place", "target"), [(".", "0.5"), ("further/sparsegpt-2-4", "2:4")])
def test_a_card_says_what_the_model_is(done, place, target):
    front, body = front_and_body(done / place / "model")
    assert front["license"] == "other"
    assert front["license_name"] == "ours"
    assert "base_model" not in front  # a folder is no name on the hub
    manifest = json.loads((done / place / "manifest.json").read_text())
    for words in (
        f"# tiny, {target} sparse",
        f"{manifest['zeros']:,} of {manifest['block_weights']:,} weights in the blocks are pruned, 50.0000 % of ",
        "| dense |",
        "from_pretrained",
        "dense kernels run no faster",
        "other, ours",
    ):
        assert words in body, words
    assert (done / place / "model" / "README.base.md").read_text() == BASE


def test_the_perplexity_on_a_card_is_that_of_the_run(done):
    events = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    for event in events:
        if event["event"] == "evaluation":
            assert f"| {event['perplexity']['held']:.3f} |" in (done / "model" / "README.md").read_text()
    [result] = ModelCard.load(done / "model" / "README.md").data.eval_results  # as the hub reads it
    assert (result.dataset_name, result.metric_type) == ("held", "perplexity")
    last = [event for event in events if event["event"] == "evaluation"][-1]
    assert result.metric_value == pytest.approx(last["perplexity"]["held"], abs=1e-3)


def test_a_card_names_no_client_and_no_path(done):
    text = (done / "model" / "README.md").read_text()
    config = yaml.safe_load((done / "config.yaml").read_text())
    for client in config["clients"]:
        assert client["client_id"] not in text
        assert client["data"]["text"] not in text
    assert str(done) not in text


def test_each_client_that_stands_alone_gets_a_card(tmp_path):
    model = save_tiny(tmp_path / "tiny")
    out = run(tiny_config(tmp_path / "c", model, "standalone", count=2))
    cards = sorted(out.glob("models/*/model/README.md"))
    assert len(cards) == 2
    assert "names no licence" in cards[0].read_text()
    assert not list(out.rglob("README.base.md"))
