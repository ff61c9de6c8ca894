"""The pruners that leave kept weights alone. Integers everywhere, so that scores are exact and ties are many."""

import pytest
import torch

from fedspallm_appfl.pruning.registry import new_statistic, prepare
from fedspallm_appfl.pruning.statistics import InputGram, InputNorms
from fedspallm_appfl.settings.schema import Pruning
from fedspallm_appfl.tensors.target import NM, parse_target

TARGETS = ["0.3", "0.5", "0.7", "0.37", "1:4", "2:4", "4:8"]
SHAPES = [(1, 8), (9, 16), (17, 40), (40, 24)]


def integers(*shape, seed=0):
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


def run(pruner, weight, inputs, text):
    settings = Pruning(pruner, parse_target(text))
    statistic = new_statistic(settings, weight.shape[1], torch.device("cpu"))
    if statistic is not None:
        statistic.add(inputs)
    return prepare(settings, statistic).prune(weight)


def mask_oracle(weight, norms, target, per_row):
    """Oracle: sort (|w| * norm, index) in plain Python in each group (m entries, a row or the matrix) and prune the first.

    A group that ends at entry e of the matrix and starts at b prunes floor(s * e) - floor(s * b), or m - n for n:m.
    """
    (rows, columns), kept = weight.shape, []
    size = target.group if isinstance(target, NM) else columns if per_row else rows * columns
    scores = [abs(w) * norms[i % columns] for i, w in enumerate(weight.flatten().tolist())]
    for start in range(0, rows * columns, size):
        order = sorted(range(start, start + size), key=lambda i: (scores[i], i))
        pruned = set(order[: target.zeros(start + size) - target.zeros(start)])
        kept += [i not in pruned for i in range(start, start + size)]
    return torch.tensor(kept).view(rows, columns)


@pytest.mark.parametrize("text", TARGETS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pruner", ["wanda", "magnitude"])
def test_the_smallest_scores_go_and_what_is_kept_stays_as_it_was(pruner, shape, text):
    weight, one_token = integers(*shape), integers(1, shape[1], seed=1)
    norms = one_token.abs()[0].tolist() if pruner == "wanda" else [1] * shape[1]
    given = weight.clone()
    pruned, mask = run(pruner, weight, one_token, text)
    assert torch.equal(mask, mask_oracle(weight, norms, parse_target(text), per_row=pruner == "wanda"))
    assert torch.equal(pruned, weight * mask)
    assert torch.equal(weight, given)
    assert int((~mask).sum()) == parse_target(text).zeros(weight.numel())


def test_wanda_by_hand():
    inputs = torch.tensor([[3.0, 0.0, 1.0, 0.0], [4.0, 1.0, 0.0, 0.0]])  # norms 5, 1, 1, 0
    weight = torch.tensor([[0.5, -2.0, 3.0, 9.0], [0.1, 1.0, 0.2, 0.0]])  # scores 2.5 2 3 0 and 0.5 1 0.2 0
    assert run("wanda", weight, inputs, "0.5")[1].tolist() == [[True, False, True, False], [True, True, False, False]]


def test_wanda_compares_within_a_row_and_magnitude_over_the_matrix():
    weight = torch.tensor([[1.0, 2.0], [30.0, 40.0]])
    assert run("wanda", weight, torch.ones(1, 2), "0.5")[1].tolist() == [[False, True], [False, True]]
    assert run("magnitude", weight, None, "0.5")[1].tolist() == [[False, False], [True, True]]


def test_wanda_prunes_the_weights_of_dead_inputs_first():
    inputs = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    assert run("wanda", torch.tensor([[0.1, 100.0, 0.1, -100.0]]), inputs, "0.5")[1].tolist() == [[True, False] * 2]


def test_wanda_takes_a_gram_matrix_for_norms():
    inputs, gram, norms = integers(30, 16, seed=2), InputGram(16), InputNorms(16)
    gram.add(inputs)
    norms.add(inputs[:10])
    norms.add(inputs[10:])
    assert torch.equal(gram.diagonal(), norms.diagonal())


def test_magnitude_needs_no_data():
    assert new_statistic(Pruning("magnitude", parse_target("0.5")), 4, torch.device("cpu")) is None
    assert isinstance(new_statistic(Pruning("wanda", parse_target("0.5")), 4, torch.device("cpu")), InputNorms)
