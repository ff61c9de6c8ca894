"""The references that speed is compared with compute the right thing, and the benchmarks run."""

import gc
import importlib
import re
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedspallm_appfl.settings.schema import Pruning
from helpers.oracles import column_blocks, sparsegpt
from helpers.paths import ROOT

sys.path.insert(0, str(ROOT))

from benchmarks import children, memory, privacy, replay
from benchmarks.__main__ import BY_NAME, NAMES, PAGE, main
from benchmarks.context import Context
from benchmarks.measure import Ratio, interleave
from benchmarks.models import correlated, random_mask, random_windows, save_llama
from benchmarks.reference import driver
from benchmarks.reference.aggregation import aggregate
from benchmarks.reference.sparsegpt import SparseGPT
from benchmarks.reference.wanda import Wanda
from benchmarks.tables import Table, met

from fedspallm_appfl.models.lazy_model import LazyModel
from fedspallm_appfl.tensors.target import parse_target
from helpers.rounds import prune_blocks
from helpers.tiny import save_tiny

IN_PROCESS = ("solve", "block_statistics", "aggregation", "payload", "codec", "secure", "large_block")


@pytest.fixture(autouse=True, scope="module")
def nothing_old_to_collect():
    """Memory is measured after a garbage collection, which would look at all that the other tests have imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def inputs_and_weight(rows=12, columns=160):
    return correlated(600, columns).view(3, 200, columns), torch.randn(rows, columns)


def test_the_reference_of_sparsegpt_is_the_algorithm_with_one_zero_more_a_block():
    inputs, weight = inputs_and_weight()
    gram = inputs.flatten(0, 1).double().T @ inputs.flatten(0, 1).double()
    zeros = [(a, b, int(0.5 * 12 * (b - a)) + 1) for a, b, _ in column_blocks(12, 160, 0.5)]
    expected, kept = sparsegpt(weight, gram, zeros, 0.01)
    pruner = SparseGPT(weight.clone())
    for window in inputs:
        pruner.add(window.unsqueeze(0))
    pruner.prune(0.5)
    assert torch.equal(pruner.weight != 0, kept)
    torch.testing.assert_close(pruner.weight.double(), expected, rtol=1e-3, atol=1e-3)
    assert pruner.loss > 0


def test_the_reference_of_sparsegpt_prunes_two_in_four():
    inputs, weight = inputs_and_weight(3, 32)
    gram = inputs.flatten(0, 1).double().T @ inputs.flatten(0, 1).double()
    groups = [(a, a + 4, 2) for a in range(0, 32, 4)]
    rows = [sparsegpt(row.unsqueeze(0), gram, groups, 0.01)[0] for row in weight]  # rows never meet
    pruner = SparseGPT(weight.clone())
    pruner.add(inputs)
    pruner.prune(pattern=(2, 4))
    torch.testing.assert_close(pruner.weight.double(), torch.cat(rows), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("how", "group", "zeros"), [({"share": 0.5}, 32, 16), ({"pattern": (2, 4)}, 4, 2)])
def test_the_reference_of_wanda_prunes_the_smallest_products_of_each_group(how, group, zeros):
    inputs, weight = inputs_and_weight(3, 32)
    pruner = Wanda(weight.clone())
    for window in inputs:
        pruner.add(window.unsqueeze(0))
    pruner.prune(**how)
    scores = (weight.abs() * inputs.flatten(0, 1).norm(dim=0)).view(-1, group)
    kept = scores >= scores.sort(dim=1).values[:, zeros : zeros + 1]
    assert torch.equal(pruner.weight, weight * kept.view(weight.shape))


def test_the_driver_of_the_references_does_what_the_package_does(tmp_path):
    folder, windows = save_llama(tmp_path, 32, 48, 2, 64), random_windows(3, 12, 64)
    lazy, settings = LazyModel(str(folder)), Pruning("wanda", parse_target("0.5"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    driver.prune(model, windows, "wanda", 0.5)
    compared = 0
    for index, linears in prune_blocks(lazy, windows, {0, 1}, settings):
        for name, pruned in linears.items():
            assert torch.equal(model.model.layers[index].get_submodule(name).weight.data, pruned.weight)
            compared += 1
    assert compared == 14


def test_the_reference_of_aggregation_on_a_matrix_to_check_by_hand():
    weights = [torch.tensor([[4.0, 0.0], [3.0, 0.0]]), torch.tensor([[2.0, 1.0], [0.0, 0.0]])]
    masks = [torch.tensor([[True, False], [True, False]]), torch.tensor([[True, True], [False, False]])]
    weight, mask = aggregate(weights, masks, 0.5)
    assert torch.equal(mask, torch.tensor([[True, False], [True, False]]))  # one vote each: the smaller mean goes
    assert torch.equal(weight, torch.tensor([[3.0, 0.0], [3.0, 0.0]]))


def test_variants_take_turns_and_ratios_are_of_turns():
    order = []
    times = interleave(2, lambda: order.append("a") or 4.0, lambda: order.append("b") or 2.0)
    assert order == ["a", "b", "a", "b"]
    assert times == [[4.0, 4.0], [2.0, 2.0]]
    assert Ratio.of([6.0, 4.0], [2.0, 1.0]) == Ratio(best=4.0, median=3.5, low=3.0, high=4.0)


def test_the_peak_of_some_work_is_above_what_was_there():
    held = torch.ones(5_000_000)
    above = memory.peak_above(lambda: torch.ones(20_000_000).sum())
    assert above == pytest.approx(80, abs=10)
    assert memory.resident() > held.nbytes / 1e6


def test_masks_have_the_number_of_zeros_asked_for():
    assert int((~random_mask((30, 50), 700, 0)).sum()) == 700


def test_a_table_says_which_target_is_met():
    table = Table("Title")
    table.compare("what", [3.0, 2.0], [1.0, 1.0], 2, 4)
    assert table.rows == [("what", "2.000 s", "1.000 s", "2.00x", "2.50x", "2.00 .. 3.00", "2x", "4x", "must")]
    assert table.markdown().startswith("## Title\n\n| what | before ")
    assert [met(value, 2, 4) for value in (1, 2, 4)] == ["NO", "must", "aim"]


@pytest.mark.parametrize("name", NAMES + BY_NAME)
def test_every_name_is_a_benchmark(name):
    assert callable(importlib.import_module(f"benchmarks.{name}").run)


@pytest.mark.parametrize("name", IN_PROCESS)
def test_a_cheap_benchmark_runs(name, tmp_path):
    found = importlib.import_module(f"benchmarks.{name}").run(Context(True, tmp_path, tmp_path))
    for table in found if isinstance(found, list) else [found]:
        assert table.rows
        assert table.title in table.markdown()


def test_the_page_has_the_tables_of_all_and_what_they_were_measured_on(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "codec", "payload", "--quick", "--out", str(tmp_path)])
    monkeypatch.chdir(ROOT)
    assert main() == 0
    page = (tmp_path / PAGE).read_text("utf-8")
    made = [(tmp_path / f"{name}.md").read_text("utf-8") for name in ("payload", "codec")]
    assert page == "\n".join(["# Benchmarks\n", *made])
    assert all(re.search(r"^\d{4}-\d\d-\d\d, .+ cores, one thread, torch .+, quick sizes", one, re.M) for one in made)


def test_uploads_of_a_few_clients_are_played_for_many(tmp_path):
    """All clients twice give the same bits."""
    model = save_tiny(tmp_path / "model")
    made = replay.record(model, "fedspallm", tmp_path / "uploads")
    played = [
        replay.play(model, "fedspallm", tmp_path / "uploads", n * replay.DISTINCT, tmp_path / str(n)) for n in (1, 2)
    ]
    assert played[0]["digest"] == made["digest"] == played[1]["digest"]
    assert [one["messages"] / played[0]["messages"] for one in played] == [1, 2]


def test_what_is_in_a_sum_is_found_although_windows_have_much_in_common():
    common = torch.ones(4)
    alone = torch.eye(4)[:3] + 3 * common  # the third is asked for, and was not in it
    [found] = privacy.shares((alone[0] + 0.5 * alone[1]).unsqueeze(0), alone)
    torch.testing.assert_close(found, torch.tensor([1.0, 0.5, 0.0]), rtol=0, atol=0.35)
    assert found.topk(2).indices.tolist() == [0, 1]
    assert privacy.nearest(alone[1], alone) == 1


def test_a_curious_server_names_domains_and_windows_better_than_by_chance(monkeypatch):
    monkeypatch.chdir(ROOT)
    size = privacy.Size(("austen", "csource"), trials=1, blocks=(0,))
    table = privacy.measure(size, [replace(privacy.KINDS[0], cases=((12, 1),))])
    [(*_, domains, members), (*_, by_chance)] = table.rows
    assert int(domains) == 2
    assert int(members) >= 12 > int(by_chance)


def test_without_the_peers_their_rows_say_how_to_get_them(tmp_path, monkeypatch):
    result = {"seconds": 1.0, "imports": 100.0, "loaded": 150.0, "peak": 200.0}
    monkeypatch.setattr(children, "run", lambda *arguments, **options: result)
    monkeypatch.setattr(children, "peers_python", lambda: None)
    times, memories = importlib.import_module("benchmarks.whole_job").run(Context(True, tmp_path, tmp_path))
    assert [row[1] for row in times.rows if "llm-compressor" in row[0]] == ["not installed: make bench-peers"] * 2
    assert "llm-compressor" not in memories.markdown()


def test_the_interpreter_of_the_peers_can_be_named(monkeypatch):
    monkeypatch.setenv("FEDSPALLM_PEERS_PYTHON", "some/python")
    assert children.peers_python() == "some/python"


def test_a_child_that_fails_says_why():
    with pytest.raises(RuntimeError, match="No module named benchmarks.nothing"):
        children.run("nothing")
