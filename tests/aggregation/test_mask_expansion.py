"""From votes to a mask: order of votes, magnitude and index, exact counts, what everybody pruned."""

import pytest
import torch

from fedspallm_appfl.aggregation import mask_expansion
from fedspallm_appfl.aggregation.mask_expansion import agreement, expand
from fedspallm_appfl.tensors.target import NM, parse_target
from helpers.loops import LOOPS, use

HALF = parse_target(0.5)


def expand_oracle(votes, clients, magnitude, target, group):
    """Oracle: in each comparison group sort entries by (-votes, magnitude, index), prune the first ones and the unanimous.

    The groups are runs of m entries, rows or the matrix; row counts are differences of floor(s * entries so far).
    """
    size = target.group if isinstance(target, NM) else votes.shape[1] if group == "row" else votes.numel()
    votes, magnitude = votes.flatten().tolist(), magnitude.flatten().tolist()
    kept = [count < clients for count in votes]
    for start in range(0, len(votes), size):
        order = sorted(range(start, start + size), key=lambda i: (-votes[i], magnitude[i], i))
        for i in order[: target.zeros(start + size) - target.zeros(start)]:
            kept[i] = False
    return kept


def random_votes(shape, clients, target, seed):
    """Votes of clients that each pruned a share a little below the target, and magnitudes with many ties."""
    generator = torch.Generator().manual_seed(seed)
    share = target.zeros(840) / 840
    votes = (torch.rand(clients, *shape, generator=generator) < share).sum(0).to(torch.int16)
    return votes, torch.randint(0, 4, shape, generator=generator) / 4


@pytest.mark.parametrize("clients", [1, 2, 5, 200])
@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("0.5", "matrix"),
        ("0.7", "matrix"),
        ("0.5", "row"),
        ("0.37", "row"),
        ("1:4", "row"),
        ("2:4", "row"),
        ("4:8", "row"),
    ],
)
@pytest.mark.parametrize("shape", [(1, 8), (5, 8), (7, 40)])
def test_the_most_voted_go_first_then_the_smallest_then_the_lowest_index(monkeypatch, shape, text, group, clients):
    monkeypatch.setattr(mask_expansion, "TILE", 16)  # several, of which the last is not full
    target = parse_target(text)
    for seed in range(3):
        votes, magnitude = random_votes(shape, clients, target, seed)
        kept = expand(votes, clients, magnitude, target, group)
        assert kept.shape == shape
        assert kept.flatten().tolist() == expand_oracle(votes, clients, magnitude, target, group)


@pytest.mark.parametrize("text", ["0.3", "0.5", "0.7", "1:4", "2:4", "4:8"])
@pytest.mark.parametrize("shape", [(3, 16), (17, 40)])
def test_exactly_the_target_is_zero(shape, text):
    target, generator = parse_target(text), torch.Generator().manual_seed(0)
    votes = torch.randint(0, 4, shape, generator=generator)  # 4 of 4 clients never agree
    kept = expand(votes, 4, torch.rand(shape, generator=generator), target)
    assert int((~kept).sum()) == target.zeros(votes.numel())
    if isinstance(target, NM):
        assert kept.view(-1, target.group).sum(1).unique().tolist() == [target.kept]


def test_votes_go_before_magnitude():
    votes, magnitude = torch.tensor([[2, 1, 1, 2]]), torch.tensor([[9.0, 0.1, 0.2, 8.0]])
    assert expand(votes, 3, magnitude, HALF).tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("target", [HALF, NM(2, 4)])
def test_equal_votes_go_by_magnitude_and_equal_magnitudes_by_index(target):
    votes = torch.tensor([[100, 100, 100, 0]])
    assert expand(votes, 101, torch.tensor([[3e-30, 1e-30, 2e-30, 0.0]]), target).tolist() == [
        [True, False, False, True]
    ]
    assert expand(votes, 101, torch.ones(1, 4), target).tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("text", ["0.5", "0.25", "2:4"])
def test_nothing_is_expanded_when_everybody_pruned_more_than_the_target(text):
    votes = torch.tensor([[3, 3, 3, 2]])
    assert expand(votes, 3, torch.tensor([[0.0, 0.0, 0.0, 1.0]]), parse_target(text)).tolist() == [[False] * 3 + [True]]
    assert agreement(votes, 3)["zeros_before_expansion"] == 3


def test_a_row_that_is_over_target_takes_nothing_from_another_row():
    votes = torch.tensor([[2, 2, 2, 1], [0, 0, 0, 1]])
    magnitude = torch.tensor([[0.0, 0.0, 0.0, 5.0], [4.0, 3.0, 2.0, 6.0]])
    assert expand(votes, 2, magnitude, HALF, "row").int().tolist() == [[0, 0, 0, 1], [1, 1, 0, 0]]
    assert expand(votes, 2, magnitude, HALF, "matrix").int().tolist() == [[0, 0, 0, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("text", ["0.5", "2:4"])
def test_clients_that_agree_keep_their_mask(text):
    mask = torch.tensor([[True, False, False, True], [False, True, False, True]])
    magnitude = torch.tensor([[0.1, 0.0, 0.0, 0.0], [0.0, 0.2, 0.0, 0.3]])
    for clients in (1, 4):
        assert torch.equal(expand(clients * (~mask).int(), clients, magnitude, parse_target(text)), mask)


def test_a_target_of_zero_prunes_only_what_everybody_pruned():
    assert expand(torch.tensor([[0, 1, 2]]), 2, torch.zeros(1, 3), parse_target(0)).tolist() == [[True, True, False]]


@pytest.mark.parametrize("loops", LOOPS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
@pytest.mark.parametrize("clients", [1, 3, 255])
@pytest.mark.parametrize(
    ("text", "group"),
    [("0.5", "matrix"), ("0.7", "matrix"), ("0.5", "row"), ("0.61", "row"), ("2:4", "row"), ("3:6", "row")],
)
def test_only_the_magnitude_of_an_aggregate_counts(monkeypatch, text, group, clients, dtype, loops):
    use(loops, monkeypatch)
    target, shape = parse_target(text), (7, 24)
    for seed in range(3):
        votes, magnitude = random_votes(shape, clients, target, seed)
        signs = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)) * 2.0 - 1.0
        aggregate = magnitude * signs  # zeros of both signs among them
        given = aggregate.clone(), votes.to(dtype)
        kept = expand(given[1], clients, aggregate, target, group)
        assert kept.flatten().tolist() == expand_oracle(votes, clients, magnitude, target, group)
        assert torch.equal(aggregate, given[0])
        assert torch.equal(votes.to(dtype), given[1])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
@pytest.mark.parametrize(("text", "group"), [("0.5", "matrix"), ("0.5", "row"), ("2:4", "row"), ("4:8", "row")])
def test_what_everybody_pruned_stays_zero_beyond_the_target(text, group, dtype):
    target, generator = parse_target(text), torch.Generator().manual_seed(0)
    for seed in range(5):
        votes, magnitude = random_votes((6, 16), 2, parse_target("0.9"), seed)
        aggregate = magnitude * (torch.randint(0, 2, (6, 16), generator=generator) * 2 - 1)
        kept = expand(votes.to(dtype), 2, aggregate, target, group)
        assert kept.flatten().tolist() == expand_oracle(votes, 2, magnitude, target, group)
        assert not kept[votes == 2].any()
        assert int((~kept).sum()) > target.zeros(96)


def test_votes_of_more_than_255_clients_are_told_apart():
    votes = torch.tensor([[300, 44, 299, 300]], dtype=torch.int16)  # 300 is 44 in one byte
    assert expand(votes, 301, torch.ones(1, 4), HALF).tolist() == [[False, True, True, False]]
    assert expand(votes, 300, torch.ones(1, 4), parse_target(0)).tolist() == [[False, True, True, False]]
    assert agreement(votes, 300)["zeros_before_expansion"] == 2


def test_255_votes_of_255_clients_fit_in_a_byte():
    votes = torch.tensor([[255, 254, 0, 255]], dtype=torch.uint8)
    assert expand(votes, 255, torch.ones(1, 4), parse_target("0.75")).tolist() == [[False, False, True, False]]
    assert agreement(votes, 255)["zeros_before_expansion"] == 2


def test_agreement_counts_what_two_clients_both_pruned():
    masks = torch.tensor([[1, 1, 0, 0, 1], [1, 0, 1, 0, 1], [1, 1, 0, 1, 0]])  # 1: pruned, a row a client
    pairs = [int((masks[a] * masks[b]).sum()) for a, b in ((0, 1), (0, 2), (1, 2))]
    assert pairs == [2, 2, 1]
    facts = agreement(masks.sum(0, keepdim=True).to(torch.uint8), 3)
    assert facts == {"zeros_before_expansion": 1, "zeros_of_one": 3, "zeros_of_two": round(sum(pairs) / 3)}
    assert agreement(torch.tensor([[1, 0]], dtype=torch.uint8), 1) == {"zeros_before_expansion": 1}
