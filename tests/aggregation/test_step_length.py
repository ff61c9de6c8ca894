"""How far the server goes along the mean of changes, by hand and by the vectors themselves."""

import itertools

import pytest
import torch

from fedspallm_appfl.aggregation.step_length import UNIT, step_length


def step_of(changes, weights):
    mean = sum(weight * change for weight, change in zip(weights, changes, strict=True)) / sum(weights)
    return step_length([float(change.square().sum()) for change in changes], weights, float(mean.square().sum())), mean


def test_clients_that_agree_go_as_far_as_their_mean():
    assert step_of([torch.tensor([3.0, -4.0])] * 5, [1] * 5)[0] == 1.0


def test_clients_with_nothing_in_common_go_by_the_root_of_their_number():
    assert step_of(list(torch.eye(4)), [1] * 4)[0] == 2.0


def test_no_step_is_larger_however_much_clients_contradict_each_other():
    a = torch.tensor([1.0, 2.0])
    assert step_of([a, -0.9 * a], [1, 1])[0] == pytest.approx(2**0.5)
    assert step_of([a, -a], [1, 1])[0] == 1.0  # a mean of nothing
    assert step_of([0 * a, 0 * a], [1, 1])[0] == 1.0


def test_the_step_along_the_mean_is_as_long_as_a_client_s_in_any_order():
    changes, weights = list(torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)) + 0.5), [3, 1, 8]
    step, mean = step_of(changes, weights)
    theirs = sum(weight * float(change.square().sum()) for weight, change in zip(weights, changes, strict=True)) / 12
    assert step * float(mean.norm()) == pytest.approx(theirs**0.5, abs=float(mean.norm()) / UNIT)
    for turn in itertools.permutations(range(3)):
        assert step_of([changes[n] for n in turn], [weights[n] for n in turn])[0] == step
