"""A payload goes through a connection in parts and comes out as it was, whatever its keys are called."""

import multiprocessing

import pytest
import torch

from fedspallm_appfl.runs.workers import Line
from fedspallm_appfl.wire.as_bytes import Inbox


@pytest.fixture
def through():
    """What comes out of a payload that was sent."""
    sender, receiver = (Line(end, Inbox()) for end in multiprocessing.Pipe())

    def through(payload):
        sender.send(payload=payload)
        received = receiver.receive()["payload"]
        assert not receiver.connection.poll()
        return received

    return through


@pytest.mark.parametrize("name", ["ann", "tensor", "dtype", "shape"])
def test_a_payload_comes_out_as_it_was_whatever_a_client_is_called(through, name):
    values = torch.tensor([1.5, -0.0, float("nan")], dtype=torch.bfloat16)
    sent = {
        name: {"round": 3, "blocks": {"0": {"q": {"shape": [3, 1], "mask": torch.arange(5).byte(), "values": values}}}}
    }
    got = through(sent)
    assert got[name]["round"] == 3
    matrix = got[name]["blocks"]["0"]["q"]
    assert matrix["shape"] == [3, 1]
    assert torch.equal(matrix["mask"], torch.arange(5).byte())
    assert matrix["values"].dtype is torch.bfloat16
    assert torch.equal(matrix["values"].view(torch.int16), values.view(torch.int16))


def test_a_payload_without_tensors_and_empty_tensors_come_through(through):
    assert through({"a": {}, "b": [1, "x", None]}) == {"a": {}, "b": [1, "x", None]}
    assert through({"a": torch.empty(0)})["a"].shape == (0,)


def test_a_view_is_sent_without_what_lies_around_it(through):
    assert through({"a": torch.arange(10)[2:8:2]})["a"].tolist() == [2, 4, 6]


def test_the_memory_of_a_message_is_used_for_the_next_one(through):
    first = through({"a": torch.ones(8)})["a"]
    second = through({"a": torch.zeros(8)})["a"]
    assert first.data_ptr() == second.data_ptr()
    assert through({"a": torch.arange(100), "b": torch.ones(3)})["a"].tolist() == list(range(100))
