"""How far the server goes along the mean of changes, by hand and by the vectors themselves."""

import itertools

import pytest
import torch

from fedspallm_appfl.aggregation.step_length import UNIT, step_length


def step_of(changes):
    mean = sum(changes) / len(changes)
    return step_length([float(change.square().sum()) for change in changes], float(mean.square().sum())), mean


def test_clients_that_agree_go_as_far_as_their_mean():
    assert step_of([torch.tensor([3.0, -4.0])] * 5)[0] == 1.0


def test_clients_with_nothing_in_common_go_by_the_root_of_their_number():
    assert step_of(list(torch.eye(4)))[0] == 2.0


def test_no_step_is_larger_however_much_clients_contradict_each_other():
    a = torch.tensor([1.0, 2.0])
    assert step_of([a, -0.9 * a])[0] == pytest.approx(2**0.5)
    assert step_of([a, -a])[0] == 1.0  # a mean of nothing
    assert step_of([0 * a, 0 * a])[0] == 1.0


def test_one_client_alone_goes_as_far_as_it_did():
    assert step_of([torch.tensor([1.0, 2.0])])[0] == 1.0


@pytest.mark.parametrize("odd", [[0, 0, 0, 10.0], [0, 0, 0, -1e6], [-1.0, -1.0, -1.0, 0], [-2.0, -2.0, -2.0, 1.0]])
def test_one_client_among_four_does_not_set_the_length(odd):
    step, mean = step_of([*list(torch.eye(4))[:3], torch.tensor(odd)])
    assert step <= 2.0 and step * float(mean.norm()) <= max(1.0 + 1 / UNIT, float(mean.norm()))


def test_the_step_along_the_mean_is_as_long_as_a_client_s_in_any_order():
    changes = list(
        torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)) + torch.tensor([[0.4], [0.5], [0.9]])
    )
    step, mean = step_of(changes)
    assert 1 < step < 3**0.5
    assert step * float(mean.norm()) == pytest.approx(float(changes[1].norm()), abs=float(mean.norm()) / UNIT)
    assert all(step_of(turn)[0] == step for turn in itertools.permutations(changes))
