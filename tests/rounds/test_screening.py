"""What no honest client sends is refused by name, and honest uploads never are."""

import pytest
import torch
import yaml
from benchmarks.hostile import honest_facts
from safetensors.torch import load_file

from fedspallm_appfl.aggregation.screening import (
    FAR,
    LIMITS,
    Seen,
    look_at_changes,
    look_at_mask,
    look_at_statistics,
    look_at_values,
    outliers,
)
from fedspallm_appfl.devices import threads
from fedspallm_appfl.errors import UpdateError
from fedspallm_appfl.pruning.from_sums import Sums, prune
from fedspallm_appfl.rounds.participants import server_settings
from fedspallm_appfl.runs import serial
from fedspallm_appfl.settings.reading import load_config
from fedspallm_appfl.settings.schema import Pruning
from fedspallm_appfl.tensors import bitmask
from fedspallm_appfl.tensors.exact_sum import sum_of_squares
from fedspallm_appfl.tensors.target import parse_target
from helpers.tiny import events, run, save_tiny, tiny_config

ATTACKS = {
    "sign flipped": (lambda values: -values, "moved"),
    "x10": (lambda values: 10 * values, "far"),
    "x2": (lambda values: 2 * values, "grown"),
    "zeros": (lambda values: 0 * values, "shrunk"),
    "a tenth of them zeros": (lambda values: torch.cat([0 * values[:1639], values[1639:]]), "shrunk"),
    "noise": (lambda values: torch.randn(len(values), generator=torch.Generator().manual_seed(0)), "shrunk"),
}


def dense_and_bits(seed=0, rows=64, columns=64):
    random = torch.Generator().manual_seed(seed)
    dense = torch.randn(rows, columns, generator=random)
    return dense, bitmask.to_bits(dense.abs() > dense.abs().median())


def looked(values, bits, dense):
    return look_at_values(values, bits, dense, sum_of_squares(dense), own_mask=False)


def broken(seen, fitted=False):
    return [one.what for one in outliers(seen.facts, fitted)]


def test_facts_are_what_they_say():
    dense = torch.tensor([[3.0, 4.0], [0.0, 12.0]])
    bits = bitmask.to_bits(torch.tensor([[False, True], [False, True]]))
    seen = looked(torch.tensor([4.0, 15.0]), bits, dense)
    gone, kept = 3.0, 160.0**0.5
    assert seen.facts["moved"] == pytest.approx(3.0 / gone)
    assert seen.facts["grown"] == seen.facts["shrunk"]
    assert seen.facts["grown"] == pytest.approx(((4 * 4 + 15 * 12) * (1 / 160) - 1) / 1.05 * kept / gone)
    assert (seen.facts["far"], seen.columns, seen.values) == (0.0, 0, None)
    pruned = {"pruned": pytest.approx((9 / 2) / (169 / 4))}
    assert look_at_mask(bits, dense, 169.0).facts == pruned
    assert look_at_values(torch.tensor([4.0, 15.0]), bits, dense, 169.0).facts == seen.facts | pruned
    assert look_at_statistics(4, torch.tensor([2.0, 8.0]), 0.5).facts == {"square": pytest.approx(2.5)}
    assert look_at_statistics(4, torch.tensor([2.0, 8.0]), None).facts == {}
    more = look_at_statistics(6, torch.tensor([2.0, 8.0]), None, 4, 5.0).facts
    assert more == {"tokens": 1.5, "drift": pytest.approx(0.5)}
    learnt = look_at_changes(torch.tensor([3.0, 4.0]), torch.tensor([6.0, 8.0]))
    assert learnt.facts == {"learnt": pytest.approx(0.5)}


def test_facts_do_not_depend_on_threads():
    dense, bits = dense_and_bits(rows=512, columns=1408)
    values = bitmask.gather(dense + 0.1 * dense.roll(1), bits)
    seen = []
    for count in (1, 2, 3):
        with threads(count):
            seen.append(looked(values, bits, dense).facts)
            assert torch.get_num_threads() == count
    assert seen[0] == seen[1] == seen[2]


def test_nothing_pruned_and_nothing_there_are_no_outliers():
    for dense in (torch.randn(8, 8), torch.zeros(8, 8)):
        bits = bitmask.to_bits(torch.ones(8, 8).bool())
        assert broken(looked(dense.flatten(), bits, dense)) == []
        assert look_at_mask(bits, dense, sum_of_squares(dense)).facts == {}
    assert broken(looked(torch.ones(64), bits, dense))


def test_a_mask_that_prunes_what_is_zero_already_is_no_outlier():
    """Sums of squares are rounded, so that they may seem to be smaller without the zeros than with them."""
    for seed in range(20):
        dense = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))
        bits = bitmask.to_bits(mask := dense.abs() > 0.7)
        dense *= mask
        assert broken(look_at_mask(bits, dense, sum_of_squares(dense))) == []
        assert broken(looked(bitmask.gather(dense, bits), bits, dense)) == []


@pytest.mark.parametrize("attack", ATTACKS)
def test_each_attack_is_seen(attack):
    change, fact = ATTACKS[attack]
    dense, bits = dense_and_bits(rows=512)
    for fitted in (False, True):
        seen = looked(change(bitmask.gather(dense, bits)), bits, dense)
        assert LIMITS[fact].what in broken(seen, fitted)


def test_a_column_that_went_far_is_brought_back_and_others_keep_their_bits():
    dense, bits = dense_and_bits(columns=72)
    moved = dense + 0.1
    moved[:, 5] -= 1000.0
    mask = bitmask.from_bits(bits, dense.shape)
    seen = looked(moved[mask].half(), bits, dense.half())
    assert (broken(seen), seen.columns) == ([], 1)
    made = bitmask.scatter(seen.values, bits, dense.shape)
    other = torch.arange(72) != 5
    assert torch.equal(made[:, other], (moved * mask).half()[:, other])
    unit = float((dense[~mask] ** 2).sum()) / 72
    left = float(((made - dense) * mask)[:, 5].square().sum()) / unit
    assert (FAR / 2) ** 2 * 0.99 < left < FAR**2 * 1.01


def test_masks_of_what_is_small_and_sums_of_what_is_huge_are_seen():
    dense, bits = dense_and_bits()
    square = sum_of_squares(dense)
    assert broken(look_at_mask(bits, dense, square)) == []
    assert broken(look_at_mask(~bits, dense, square)) == [LIMITS["pruned"].what]
    assert broken(look_at_statistics(1, torch.full((4,), 31.0), 1.0)) == [LIMITS["square"].what]
    assert broken(look_at_statistics(10**9, torch.full((4,), 1e9), 1.0, 100)) == [LIMITS["tokens"].what]
    assert broken(Seen({"moved": float("nan")})) == [LIMITS["moved"].what]


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt", "admm"])
@pytest.mark.parametrize("target", ["0.5", "0.8", "2:4"])
@pytest.mark.parametrize("tokens", [80, 1000])
def test_honest_weights_are_within_the_limits(pruner, target, tokens):
    random = torch.Generator().manual_seed(tokens)
    inputs = torch.randn(tokens, 64, generator=random) * torch.logspace(-1, 1, 64)
    inputs[1:, 3] = 0  # a feature that one token uses
    dense = torch.randn(32, 64, generator=random)
    settings = Pruning(pruner, parse_target(target))
    weight, mask = prune({"q": dense}, Sums((inputs.T @ inputs).triu(), tokens), settings, False, 0)["q"]
    bits = bitmask.to_bits(mask)
    assert broken(looked(weight[mask], bits, dense), pruner == "admm") == []
    assert broken(look_at_mask(bits, dense, sum_of_squares(dense))) == []


def tenfold(parts):
    parts["values"] = parts["values"] * 10


def far_column(parts):
    weight = bitmask.scatter(parts["values"], parts["mask"], tuple(parts["shape"]))
    weight[:, 2] *= -100
    parts["values"] = bitmask.gather(weight, parts["mask"])


def hostile_run(folder, model, monkeypatch, how, spoil=tenfold, **server):
    """One of three clients spoils the weights of its second block."""
    make = serial.made

    def made(agent, *rest):
        update, metadata = make(agent, *rest)
        if agent.trainer.client_id == "bible" and metadata["_chunk_idx"] == 1:
            for parts in update["blocks"]["1"].values():
                spoil(parts)
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
    assert (
        "block 1, self_attn.q_proj: share of columns that changed more than 5 times what pruning takes away is 1"
        in absent["why"]
    )
    file = hostile_run(tmp_path / "end", tiny_model, monkeypatch, "refuse")
    with pytest.raises(
        UpdateError, match="refused an update from client bible, block 1, .*of honest clients 0 to 0.25"
    ):
        serial.run(load_config(file)[0], tmp_path / "state", lambda event: None)
    reported = run(hostile_run(tmp_path / "report", tiny_model, monkeypatch, "report"))
    assert {(one["client"], one["block"]) for one in events(reported, "outlier")} == {("bible", 1)}
    text = (reported / "report.md").read_text()
    assert "## Uploads that stand out" in text and "| bible | 1 | " in text
    assert events(run(hostile_run(tmp_path / "off", tiny_model, monkeypatch, "off")), "outlier") == []


def test_columns_that_went_far_are_brought_back_in_what_is_folded(tmp_path, tiny_model, monkeypatch):
    folders = []
    for how in ("refuse", "report", "off"):
        with monkeypatch.context() as patch:
            folders.append(run(hostile_run(tmp_path / how, tiny_model, patch, how, far_column)))
    back = {(one["client"], one["block"]) for one in events(folders[0], "brought_back")}
    assert ("bible", 1) in back and events(folders[0], "absent") == []
    assert "| bible | 1 | " in (folders[0] / "report.md").read_text().split("were brought back")[1]
    values = [load_file(folder / "model" / "model.safetensors") for folder in folders]
    name = "model.layers.1.self_attn.q_proj.weight"
    assert float(values[0][name][:, 2].abs().max()) < 0.2 * float(values[2][name][:, 2].abs().max())
    assert torch.equal(values[1][name], values[2][name])


def test_models_that_are_apart_stay_as_they_came(tmp_path, tiny_model, monkeypatch):
    files = []
    for how in ("refuse", "off"):
        with monkeypatch.context() as patch:
            file = hostile_run(tmp_path / how, tiny_model, patch, how, far_column)
            file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"algorithm": "standalone"}))
            files.append(run(file) / "models" / "bible" / "model" / "model.safetensors")
    assert files[0].read_bytes() == files[1].read_bytes()


def test_little_damping_has_the_limits_of_least_squares(tmp_path, tiny_model):
    told = [
        server_settings(load_config(tiny_config(tmp_path, tiny_model, "fedspallm", 2, **changes))[0], tmp_path).fitted
        for changes in ({}, {"client_configs": {"train_configs": {"damping": 1e-4}}})
    ]
    assert told == [[], ["austen", "bible"]]


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


def test_the_benchmark_sees_the_facts_of_honest_clients(tmp_path, tiny_model):
    raw = yaml.safe_load(tiny_config(tmp_path, tiny_model, "fedspallm", recovery={"rounds": 1}).read_text())
    found = {}
    assert honest_facts(raw, found) == 0
    assert {"far", "moved", "shrunk", "grown", "pruned", "learnt"} == found.keys()
    assert len(found["learnt"]) == 3 * 3 * 7  # clients, blocks, matrices
