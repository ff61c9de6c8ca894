"""What no honest client sends is refused by name, and honest uploads never are."""

import pytest
import torch

from fedspallm_appfl.aggregation import screening
from fedspallm_appfl.aggregation.screening import LIMITS, Size, gram_facts, mask_facts, outliers, weight_facts
from fedspallm_appfl.errors import UpdateError
from fedspallm_appfl.pruning.from_sums import Sums, prune
from fedspallm_appfl.runs import serial
from fedspallm_appfl.settings.reading import load_config
from fedspallm_appfl.settings.schema import Pruning
from fedspallm_appfl.tensors.target import parse_target
from helpers.tiny import events, run, save_tiny, tiny_config

ATTACKS = {
    "sign flipped": (lambda values: -values, "cosine"),
    "x10": (lambda values: 10 * values, "norm"),
    "x-10": (lambda values: -10 * values, "cosine"),
    "zeros": (lambda values: 0 * values, "norm"),
    "one value": (lambda values: values.index_fill(0, torch.tensor([3]), 6e4), "largest"),
    "noise": (lambda values: torch.randn(len(values), generator=torch.Generator().manual_seed(0)), "norm"),
}


def dense_and_kept(seed=0, rows=32, columns=64):
    random = torch.Generator().manual_seed(seed)
    dense = torch.randn(rows, columns, generator=random)
    mask = dense.abs() > dense.abs().median()
    return dense, mask


def test_facts_are_what_they_say():
    dense = torch.tensor([[3.0, 4.0], [0.0, 12.0]])
    values, there = torch.tensor([6.0, 8.0]), torch.tensor([3.0, 4.0])
    facts = weight_facts(values, there, Size.of(dense))
    assert facts["cosine"] == pytest.approx(1.0)
    assert facts["norm"] == pytest.approx(2.0)
    assert facts["largest"] == pytest.approx(8 / 12)
    assert mask_facts(there, Size.of(dense))["energy"] == pytest.approx((25 / 2) / (169 / 4))
    assert gram_facts(4, torch.tensor([2.0, 8.0])) == {"square": 2.0}


@pytest.mark.parametrize("attack", ATTACKS)
def test_each_attack_is_seen(attack):
    change, fact = ATTACKS[attack]
    dense, mask = dense_and_kept()
    facts = weight_facts(change(dense[mask]), dense[mask], Size.of(dense))
    assert LIMITS[fact] in [one.limit for one in outliers(facts)]


def test_masks_of_what_is_small_and_sums_of_what_is_huge_are_seen():
    dense, mask = dense_and_kept()
    assert [one.limit for one in outliers(mask_facts(dense[~mask], Size.of(dense)))] == [LIMITS["energy"]]
    assert [one.limit for one in outliers(gram_facts(1, torch.tensor([3e38])))] == [LIMITS["square"]]
    assert outliers(mask_facts(dense[mask], Size.of(dense))) == []


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt", "admm"])
@pytest.mark.parametrize("target", ["0.5", "0.8", "2:4"])
@pytest.mark.parametrize("tokens", [80, 1000])
def test_honest_weights_are_within_the_limits(pruner, target, tokens):
    random = torch.Generator().manual_seed(tokens)
    inputs = torch.randn(tokens, 64, generator=random) * torch.logspace(-1, 1, 64)
    dense = torch.randn(32, 64, generator=random)
    settings = Pruning(pruner, parse_target(target))
    weight, mask = prune({"q": dense}, Sums((inputs.T @ inputs).triu(), tokens), settings, False, 0)["q"]
    size = Size.of(dense)
    assert (
        outliers(weight_facts(weight[mask], dense[mask], size) | mask_facts(dense[mask], size), pruner == "admm") == []
    )


def hostile_run(folder, model, monkeypatch, how, **server):
    """One of three clients sends ten times its weights in its second block."""
    make = serial.made

    def made(agent, *rest):
        update, metadata = make(agent, *rest)
        if agent.trainer.client_id == "bible" and metadata["_chunk_idx"] == 1:
            for parts in update["blocks"]["1"].values():
                parts["values"] = parts["values"] * 10
        return update, metadata

    monkeypatch.setattr(serial, "made", made)
    each = {"comm_configs": {"blocks_per_message": 1}}
    server |= {"aggregator_kwargs": {"screening": how}}
    return tiny_config(folder, model, "fedspallm", 3, client_configs=each, server_configs=server)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def test_a_hostile_client_is_left_out_or_ends_the_run_or_is_reported(tmp_path, tiny_model, monkeypatch):
    file = hostile_run(tmp_path / "out", tiny_model, monkeypatch, "refuse", min_clients=2)
    [absent] = events(run(file), "absent")
    assert absent["client"] == "bible"
    assert "block 1, self_attn.q_proj: norm of kept weights over that of the dense ones there is" in absent["why"]
    file = hostile_run(tmp_path / "end", tiny_model, monkeypatch, "refuse")
    with pytest.raises(UpdateError, match="refused an update from client bible, block 1, .*of honest clients 0.8 to"):
        serial.run(load_config(file)[0], tmp_path / "state", lambda event: None)
    reported = run(hostile_run(tmp_path / "report", tiny_model, monkeypatch, "report"))
    assert {(one["client"], one["block"]) for one in events(reported, "outlier")} == {("bible", 1)}
    text = (reported / "report.md").read_text()
    assert "## Uploads that stand out" in text and "| bible | 1 | " in text
    assert events(run(hostile_run(tmp_path / "off", tiny_model, monkeypatch, "off")), "outlier") == []


def test_a_lie_about_samples_is_refused(tmp_path, tiny_model, monkeypatch):
    make = serial.made

    def made(agent, *rest):
        update, metadata = make(agent, *rest)
        return update, {
            **metadata,
            "samples": metadata["samples"] * (1000 if agent.trainer.client_id == "bible" else 1),
        }

    monkeypatch.setattr(serial, "made", made)
    file = tiny_config(tmp_path, tiny_model, "fedspallm", 3)
    with pytest.raises(UpdateError, match="client bible: its sample size is 7000, and `data.windows` asks for 7"):
        serial.run(load_config(file)[0], tmp_path / "state", lambda event: None)


def test_every_fact_has_limits():
    dense, mask = dense_and_kept()
    size = Size.of(dense)
    facts = weight_facts(dense[mask], dense[mask], size) | mask_facts(dense[mask], size) | gram_facts(1, torch.ones(2))
    assert facts.keys() == LIMITS.keys()
    assert screening.outliers(facts) == []
