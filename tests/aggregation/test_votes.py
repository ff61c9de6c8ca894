"""Votes of masks: plain counting, the types that they need, and rounds on top of each other."""

import random

import pytest
import torch

from fedspallm_appfl.aggregation.l0_mean import MOST_CLIENTS
from fedspallm_appfl.aggregation.mask_expansion import Votes
from fedspallm_appfl.tensors import bitmask

SHAPE = (5, 7)


def masks(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(SHAPE, generator=generator) < 0.4 for _ in range(count)]


def counted(of, clients=None):
    votes = Votes.empty(SHAPE, clients or len(of))
    for mask in of:
        votes.add(bitmask.to_bits(mask))
    return votes


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_an_entry_has_the_votes_of_those_that_pruned_it(count):
    of = masks(count)
    votes = counted(of)
    for row in range(SHAPE[0]):
        for column in range(SHAPE[1]):
            assert int(votes.pruned[row, column]) == sum(not bool(mask[row, column]) for mask in of)
    assert votes.clients == count


def test_the_order_of_clients_does_not_matter():
    of = masks(6)
    assert torch.equal(counted(of).pruned, counted(random.Random(1).sample(of, 6)).pruned)


def test_nobody_has_voted_at_first():
    votes = Votes.empty(SHAPE, 3)
    assert votes.clients == 0
    assert not votes.pruned.any()


@pytest.mark.parametrize(("clients", "dtype"), [(1, torch.uint8), (255, torch.uint8), (256, torch.int16)])
def test_votes_of_so_many_clients_fit(clients, dtype):
    nothing = bitmask.to_bits(torch.zeros(SHAPE, dtype=torch.bool))
    votes = Votes.empty(SHAPE, clients)
    assert votes.pruned.dtype is dtype
    for _ in range(clients):
        votes.add(nothing)
    assert votes.pruned.unique().tolist() == [clients]
    assert votes.clients == clients


def test_rounds_add_up_and_leave_the_smallest_type_when_they_must():
    rounds = [masks(200, seed) for seed in (1, 2)]
    first, second = map(counted, rounds)
    first.merge(second)
    assert first.clients == 400
    assert first.pruned.dtype is torch.int16
    assert torch.equal(first.pruned, counted(rounds[0] + rounds[1]).pruned)
    small = counted(masks(3))
    small.merge(counted(masks(4, 5)))
    assert small.pruned.dtype is torch.uint8
    assert torch.equal(small.pruned, counted(masks(3) + masks(4, 5)).pruned)


def test_more_clients_than_can_be_counted_are_refused():
    with pytest.raises(ValueError, match=f"at most {MOST_CLIENTS} clients can be folded, got {MOST_CLIENTS + 1}"):
        Votes.empty(SHAPE, MOST_CLIENTS + 1)
    votes = counted(masks(1))
    votes.clients = MOST_CLIENTS
    with pytest.raises(ValueError, match="at most"):
        votes.merge(counted(masks(1)))
