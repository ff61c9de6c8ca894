"""What goes into secure sums fits them, and what the server says of them is read as from a stranger."""

import pytest
import torch

from fedspallm_appfl.errors import PruningError, SecureSumError
from fedspallm_appfl.pruning.from_sums import Sums
from fedspallm_appfl.rounds.hidden import coding
from fedspallm_appfl.rounds.hidden.places import heard, listed, said, unlisted
from fedspallm_appfl.settings.schema import Client, Config
from fedspallm_appfl.validation.rules import check


def test_squares_of_as_many_clients_as_are_taken_do_not_overflow():
    largest = torch.tensor(
        [4095.999755859375, coding.LARGEST_SQUARES], dtype=torch.float64
    )  # largest fine and coarse part
    numbers = coding.squares(Sums(torch.diag(largest), 7), "here")
    total, tokens = coding.summed_squares(numbers * coding.MOST_CLIENTS)
    assert torch.allclose(total, largest * coding.MOST_CLIENTS, rtol=1e-9) and tokens == 7 * coding.MOST_CLIENTS
    assert coding.MOST_CLIENTS == 2047
    assert 2048 * (coding.COARSE / coding.FINE) >= 2**63


@pytest.mark.parametrize("clients", [2047, 2048])
def test_more_clients_than_fit_are_refused_before_a_run(clients):
    config = Config(algorithm="gram", clients=[Client(client_id=f"c{number}") for number in range(clients)])
    config.server_configs.secure_sums = True
    found = [one for one in check(config) if "list at most 2047 clients, got 2048" in one]
    assert len(found) == (clients == 2048)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 2.0**63])
def test_what_is_too_large_or_no_number_is_refused(wrong):
    with pytest.raises(PruningError, match="block 0, q_proj: a secure sum takes squares up to"):
        coding.squares(Sums(torch.diag(torch.tensor([1.0, wrong])), 7), "block 0, q_proj")
    with pytest.raises(PruningError, match="block 0, q_proj: in a secure sum weights are at most"):
        coding.fixed(torch.tensor([1.0, wrong]), torch.ones(2), 3, "block 0, q_proj")


def test_survivors_are_told_in_short():
    survivors = {0: ["a", "b"], 1: ["a", "b"], 2: ["a"], 4: ["a", "b"]}
    assert listed(survivors) == [[["a", "b"], "0-1,4"], [["a"], "2"]]
    assert unlisted(listed(survivors), 5, "a") == survivors


@pytest.mark.parametrize(
    "told",
    [None, 5, "ab", [["a"]], [[1, "0"]], [["a", "0"]], [[["a"], 1]], [[[1], "0"]], [[["a"], "x"]], [[["a"], "2-1"]]]
    + [[[["a"], numbers]] for numbers in ("5", "0-99999999", "-1", "1,1", "1,0")]
    + [[[["a"], "0-2"], [["b"], "2"]]],
    ids=str,
)
def test_survivors_that_are_none_are_refused(told):
    with pytest.raises(SecureSumError, match="refused the survivors that the server names to client c"):
        unlisted(told, 5, "c")


@pytest.mark.parametrize("text", ["", "5", "[]", '{"a": 5}', '{"a": "*"}', '{"a": "AA==", "a": "AQ=="}', "[" * 10**5])
def test_parts_that_are_none_are_refused(text):
    assert heard(said({"a": b"1", "b": b""}), "it") == {"a": b"1", "b": b""}
    with pytest.raises(SecureSumError, match="refused the keys of client c: "):
        heard(text, "the keys of client c")
