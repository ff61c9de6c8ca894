"""Weights that are zero already are pruned first and stay zero, whatever the pruner."""

import pytest
import torch

from fedspallm_appfl.pruning import from_sums
from fedspallm_appfl.pruning.from_sums import Sums
from fedspallm_appfl.pruning.pruner import InputGram, of_function
from fedspallm_appfl.pruning.registry import find, names
from fedspallm_appfl.settings.schema import Pruning
from fedspallm_appfl.tensors.sparsity import already_zero, exact, select, spread
from fedspallm_appfl.tensors.target import NM, parse_target

ROWS, COLUMNS = 24, 160  # more columns than a block of SparseGPT has
PRUNERS = [*names(), "sparsegpt, refit", "wanda, refit", "plugin"]
CASES = [("2:4", "0.7"), ("0.5", "0.5"), ("0.7", "0.5"), ("0.5", "2:4"), ("2:4", "4:8")]


def weight_with(zeros, seed=0):
    """Random weights with so many zeros in random places."""
    generator = torch.Generator().manual_seed(seed)
    dense, order = (torch.randn(ROWS, COLUMNS, generator=generator) for _ in range(2))
    return dense * ~select(order, parse_target(zeros), per_row=False)


def gram():
    generator = torch.Generator().manual_seed(1)
    shared = torch.randn(400, 8, generator=generator) @ torch.randn(8, COLUMNS, generator=generator)
    made = InputGram(COLUMNS)
    made.add(shared + 0.3 * torch.randn(400, COLUMNS, generator=generator))
    return made


def careless(weight, target, statistic):
    """A pruner that knows nothing of zeros: it prunes the first entries and moves all others."""
    order = torch.arange(weight.numel()).view(weight.shape).float()
    return weight + 1.0, ~select(order, target, per_row=False)


def prepared(pruner, target):
    """(prepared, settings)"""
    name, _, refit = pruner.partition(", ")
    settings = Pruning(name, parse_target(target), refit=bool(refit))
    one = of_function("plugin", careless, needs=InputGram) if name == "plugin" else find(name)
    return one.ready(settings, gram()), settings


@pytest.mark.parametrize(("first", "second"), CASES)
@pytest.mark.parametrize("pruner", PRUNERS)
def test_no_zero_comes_back_and_the_mask_has_its_size(pruner, first, second):
    weight = weight_with(first)
    ready, settings = prepared(pruner, second)
    made, mask = ready.prune_all(weight, settings.own_target, already_zero(weight))
    target, zero = settings.own_target, weight == 0
    assert not made[zero].any()
    assert not made[~mask].any()
    assert int((~mask).sum()) == target.zeros(mask.numel())
    if isinstance(target, NM):
        assert (mask.view(-1, target.group).sum(1) == target.kept).all()
    elif pruner != "plugin":  # zeros first
        assert not (mask & zero).any() or not (~mask & ~zero).any()
    if first == "2:4":
        assert (made.view(-1, 4) != 0).sum(1).max() <= 2


@pytest.mark.parametrize("pruner", [one for one in PRUNERS if one != "plugin"])
def test_the_same_target_again_prunes_the_same(pruner):
    weight = weight_with("0.5")
    ready, settings = prepared(pruner, "0.5")
    _, mask = ready.prune_all(weight, settings.own_target, already_zero(weight))
    assert torch.equal(mask, weight != 0)


@pytest.mark.parametrize("pruner", ["sparsegpt", "sparsegpt, refit"])
def test_without_protection_compensation_fills_them(pruner):
    """What this is for: 2:4 then 0.7 without it."""
    weight = weight_with("2:4")
    made, _ = prepared(pruner, "0.7")[0].prune(weight)
    assert made[weight == 0].any()


@pytest.mark.parametrize("pruner", PRUNERS)
def test_a_mask_that_was_agreed_on_fills_no_zero(pruner):
    weight, ready = weight_with("0.7"), prepared(pruner, "0.5")[0]
    mask = ~select(-torch.arange(weight.numel()).view(weight.shape).float(), parse_target("0.5"), per_row=False)
    made = ready.fit_all(weight, mask, already_zero(weight))
    assert not made[weight == 0].any()
    assert not made[~mask].any()


@pytest.mark.parametrize("pruner", ["sparsegpt", "admm", "wanda"])
def test_zeros_are_those_of_the_dense_weight_where_the_target_is_its_output(pruner):
    """With the drift known the weight to approximate has no zero left."""
    weight, drift = weight_with("2:4"), 0.1 * torch.randn(COLUMNS, COLUMNS, generator=torch.Generator().manual_seed(2))
    sums = Sums(gram().upper, 400, drift)
    made, _ = from_sums.prune({"q": weight}, sums, Pruning(pruner, parse_target("0.7")), rounded=False)["q"]
    assert not made[weight == 0].any()


def test_no_zeros_no_mask():
    assert already_zero(torch.ones(2, 2)) is None
    assert already_zero(torch.tensor([[0.0, -0.0, 1.0]])).tolist() == [[True, True, False]]


def test_missing_zeros_are_spread_over_what_is_left():
    half = parse_target("0.5")
    assert spread(half, [5, 5], [0, 0]) == [2, 3]  # cumulative
    assert spread(half, [10, 10], [10, 0]) == [10, 0]  # enough
    assert spread(half, [10, 10], [2, 4]) == [2 + 2, 4 + 2]  # 4 more among 8 and 6 entries
    assert spread(half, [10, 10], [9, 5]) == [9, 5]  # more than asked for: all of them


def test_zeros_beyond_the_target_are_kept_as_zeros():
    mask = torch.tensor([[False, False, False, True]])
    zero = torch.tensor([[False, True, True, False]])
    assert exact(mask, zero, parse_target("0.5")).tolist() == [[False, False, True, True]]
