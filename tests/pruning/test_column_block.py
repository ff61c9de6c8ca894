"""The inner loop of SparseGPT on one column block, against single float32 numbers; compiled loops and torch alike."""

import random

import numpy as np
import pytest
import torch

from fedspallm_appfl.pruning import column_block
from fedspallm_appfl.tensors import native
from fedspallm_appfl.tensors.target import NM, parse_target
from helpers.loops import LOOPS, use


@pytest.fixture(params=LOOPS)
def loops(request, monkeypatch):
    use(request.param, monkeypatch)


def problem(width, rows, text, seed=0, ties=False, dead=()):
    """(columns, kept, upper, importance, target) as `solve` takes them; dead columns cost nothing."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randn(width, rows, generator=generator)
    upper = torch.randn(width, width, generator=generator).mul_(0.3).triu(1)
    upper += torch.diag(torch.rand(width, generator=generator) + 0.5)
    if ties:  # whole numbers, some of them zero, and no compensation but by whole numbers
        columns = torch.randint(-2, 3, (width, rows), generator=generator).float()
        columns[columns == 0] *= torch.randint(0, 2, (int((columns == 0).sum()),), generator=generator) * 2.0 - 1.0
        upper = torch.randint(-1, 2, (width, width), generator=generator).float().triu(1) + torch.eye(width)
    importance = upper.diagonal() ** -2
    for column in dead:
        importance[column] = 0.0
        upper[column, column + 1 :] = 0.0
    target = parse_target(text)
    kept = torch.rand(width, rows, generator=generator) < 1 - target.zeros(840) / 840
    return columns, kept, upper, importance, target


def solve_oracle(columns, kept, upper, importance, target, number=np.float32):
    """Oracle: one row and one column at a time, each operation on two numbers. Returns (columns, kept) as lists of rows."""
    u = [[number(x) for x in row] for row in upper.tolist()]
    cost = [number(x) for x in importance.tolist()]
    weights, masks = [], []
    for row, flags in zip(columns.T.tolist(), kept.T.tolist(), strict=True):
        w, mask = [number(x) for x in row], list(flags)
        for j in range(len(w)):
            if isinstance(target, NM) and j % target.group == 0:
                group = range(j, j + target.group)
                first = sorted(group, key=lambda k: (mask[k], w[k] * w[k] * cost[k], k))[: target.group - target.kept]
                mask[j : j + target.group] = [mask[k] and k not in first for k in group]
            if not mask[j]:
                error = w[j] / u[j][j]
                w[j] = number(0)
                for k in range(j + 1, len(w)):
                    w[k] = w[k] - u[j][k] * error
        weights.append([float(x) for x in w])
        masks.append(mask)
    return weights, masks


def solved(columns, kept, upper, importance, target):
    """The same with `solve`, on copies."""
    columns, kept = columns.clone(), kept.clone()
    column_block.solve(columns, kept, upper, importance, target)
    return columns, kept


def same_bits(one, other):
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


def both_ways(monkeypatch, parts):
    results = []
    for library in (native.LIBRARY, None):
        with monkeypatch.context() as patch:
            patch.setattr(native, "LIBRARY", library)
            results.append(solved(*parts))
    return results


def test_a_block_by_hand(loops):
    columns = torch.tensor([[4.0, 4.0], [3.0, 3.0], [1.0, 1.0]])
    kept = torch.tensor([[False, True], [True, False], [True, False]])
    upper = torch.tensor([[2.0, 0.5, -1.0], [0.0, 1.0, 3.0], [0.0, 0.0, 0.5]])
    # Row 0 loses 4 / 2 = 2: the others lose 0.5 * 2 and -1 * 2. Row 1 loses 3 / 1 = 3: 3 * 3 from the last one, which goes.
    columns, after = solved(columns, kept, upper, torch.ones(3), parse_target("0.5"))
    assert columns.T.tolist() == [[0.0, 2.0, 3.0], [4.0, 0.0, 0.0]]
    assert torch.equal(after, kept)


def test_the_choice_of_a_later_group_sees_the_compensation_of_an_earlier_one(loops):
    columns = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    upper = torch.eye(4)
    upper[0, 2:] = torch.tensor([-5.0, 3.0])  # pruning the first makes the third 8 and the fourth 1
    columns, kept = solved(columns, torch.ones(4, 1, dtype=torch.bool), upper, torch.ones(4), NM(1, 2))
    assert kept.flatten().tolist() == [False, True, True, False]
    assert columns.flatten().tolist() == [0.0, 2.0, 8.0, 0.0]


def test_a_column_that_costs_nothing_goes_first_whatever_its_weight(loops):
    columns, importance = torch.tensor([[1.0], [9.0], [8.0], [2.0]]), torch.tensor([1.0, 0.0, 1.0, 0.0])
    columns, kept = solved(columns, torch.ones(4, 1, dtype=torch.bool), torch.eye(4), importance, NM(2, 4))
    assert kept.flatten().tolist() == [True, False, True, False]
    assert columns.flatten().tolist() == [1.0, 0.0, 8.0, 0.0]


def test_equal_costs_go_by_index(loops):
    _, kept = solved(torch.ones(8, 3), torch.ones(8, 3, dtype=torch.bool), torch.eye(8), torch.ones(8), NM(1, 4))
    assert kept.T.tolist() == [[False, False, False, True] * 2] * 3


@pytest.mark.parametrize("tied_first", [False, True])
def test_a_cost_is_the_square_of_the_weight_times_the_importance_in_float32(loops, tied_first):
    """Of each pair one costs exactly what the other costs after both roundings: whichever stands first goes."""
    generator = torch.Generator().manual_seed(0)
    weights, importance = torch.randn(100, 2, generator=generator), torch.rand(100, 2, generator=generator) + 0.5
    for pair in range(100):
        w, cost = np.float32(weights[pair, 0].item()), np.float32(importance[pair, 0].item())
        weights[pair, 1], importance[pair, 1] = 1.0, float(w * w * cost)
    columns, costs = (part.flip(1) if tied_first else part for part in (weights, importance))
    kept = torch.ones(200, 1, dtype=torch.bool)
    _, kept = solved(columns.reshape(200, 1), kept, torch.eye(200), costs.reshape(200), NM(1, 2))
    assert kept.flatten().tolist() == [False, True] * 100


CASES = [("0.5", 1), ("0.5", 2), ("0.7", 9), ("0.5", 24), ("0.3", 33), ("2:4", 4), ("2:4", 24)]
CASES += [("1:4", 20), ("4:8", 24), ("2:3", 21), ("3:6", 18), ("8:16", 32), ("3:10", 20)]


@pytest.mark.parametrize("kind", ["plain", "ties", "dead"])
@pytest.mark.parametrize("rows", [1, 5, 33])
@pytest.mark.parametrize(("text", "width"), CASES)
def test_every_bit_is_that_of_single_numbers(loops, text, width, rows, kind):
    dead = range(0, width, 3) if kind == "dead" else ()
    parts = problem(width, rows, text, seed=width + rows, ties=kind == "ties", dead=dead)
    columns, kept = solved(*parts)
    expected, masks = solve_oracle(*parts)
    assert kept.T.tolist() == masks
    assert same_bits(columns.T.contiguous() + 0.0, torch.tensor(expected) + 0.0)  # whatever the sign of a zero
    if isinstance(parts[-1], NM):
        assert not (kept & ~parts[1]).any()  # what came in as pruned stays so
        assert kept.T.reshape(-1, parts[-1].group).sum(1).max() <= parts[-1].kept


def test_rounding_stays_that_of_float32(loops):
    *parts, target = problem(48, 6, "0.5")
    columns, _ = solved(*parts, target)
    expected, _ = solve_oracle(*parts, target, number=float)
    scale = torch.tensor(expected).abs().max().item()
    torch.testing.assert_close(columns.T, torch.tensor(expected), rtol=1e-4, atol=1e-6 * scale)


def test_random_blocks_are_the_same_with_and_without_compiled_loops(monkeypatch):
    use("compiled", monkeypatch)
    chance = random.Random(0)
    for trial in range(70):
        text = chance.choice(["0.5", "0.7", "2:4", "4:8", "3:6", "8:16"])
        group = getattr(parse_target(text), "group", 1)
        width = group * chance.randint(1, (256 if trial % 7 == 0 else 48) // group)
        dead = chance.sample(range(width), chance.choice([0, width // 4]))
        parts = problem(width, chance.randint(1, 80), text, trial, ties=trial % 3 == 0 and width <= 16, dead=dead)
        (one, kept), (other, same) = both_ways(monkeypatch, parts)
        assert torch.equal(kept, same)
        assert same_bits(one, other)


@pytest.mark.parametrize(("text", "width"), [("0.5", 256), ("0.5", 257), ("4:8", 256), ("4:8", 264)])
def test_blocks_wider_than_the_loops_have_room_for_are_solved_by_torch(monkeypatch, text, width):
    use("compiled", monkeypatch)
    called, call = [], native.call
    monkeypatch.setattr(native, "call", lambda name, *arguments: called.append(name) or call(name, *arguments))
    parts = problem(width, 3, text)
    (one, kept), (other, same) = both_ways(monkeypatch, parts)
    assert called == (["sparsegpt_block"] if width == 256 else [])
    assert torch.equal(kept, same)
    assert same_bits(one, other)


def test_columns_that_are_not_contiguous_are_solved_in_place_too(loops):
    columns, kept, upper, importance, target = problem(24, 5, "2:4")
    expected, masks = solved(columns, kept, upper, importance, target)
    wide, flags = columns.T.contiguous().T, kept.T.contiguous().T
    column_block.solve(wide, flags, upper, importance, target)
    assert same_bits(wide.contiguous(), expected)
    assert torch.equal(flags, masks)
