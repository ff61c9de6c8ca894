"""The worked example says what its docstring shows."""

import runpy

import torch

from helpers.paths import ROOT

EXAMPLE = runpy.run_path(str(ROOT / "examples" / "by_hand.py"))


def pictured(header: str, column: int) -> torch.Tensor:
    """Read a 4 x 4 picture out of the docstring: the lines under `header`, `column`-th group of four."""
    lines = EXAMPLE["__doc__"].splitlines()
    first = next(i for i, line in enumerate(lines) if line.split() == header.split()) + 1
    rows = [line.split()[4 * column : 4 * column + 4] for line in lines[first : first + 4]]
    return torch.tensor([[0.0 if entry == "." else float(entry) for entry in row] for row in rows])


def test_the_clients_are_as_pictured():
    for column, client in enumerate("ABC"):
        assert torch.equal(EXAMPLE[client], pictured("A B C", column))


def test_votes_mean_mask_and_result_are_as_pictured():
    votes, mean, mask, result = EXAMPLE["aggregate"]()
    assert torch.equal(votes.float(), pictured("votes l0 mean", 0))
    assert torch.equal(mean, pictured("votes l0 mean", 1))
    assert torch.equal(mask.float(), pictured("mask result", 0))
    assert torch.equal(result, pictured("mask result", 1))
