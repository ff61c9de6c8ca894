"""A payload goes through MPI in parts and comes out as it was, whatever its keys are called."""

import pytest
import torch

pytest.importorskip("mpi4py")

from fedspallm_appfl.adaptors import registration
from fedspallm_appfl.wire.as_bytes import take_apart


class Pipe:
    """Stands in for a communicator: what is sent is received in the same order."""

    def __init__(self):
        self.sent = []

    def Send(self, buffer, dest, tag):  # noqa: N802 - MPI's name
        self.sent.append(bytes(buffer[0]))

    def Recv(self, buffer, source, tag):  # noqa: N802
        message = self.sent.pop(0)
        assert len(buffer[0]) == len(message)
        buffer[0][:] = message


@pytest.fixture(scope="module")
def communicators():
    registration.register()
    from fedspallm_appfl.adaptors import mpi_communicators

    return mpi_communicators


@pytest.fixture
def through(communicators):
    """What comes out of a payload that was sent."""
    inbox = communicators.Inbox()

    def through(payload):
        pipe = Pipe()
        description, tensors = take_apart(payload)
        communicators.send_tensors(pipe, tensors, 0, 1)
        received = inbox.receive(pipe, description, 0, 1)
        assert not pipe.sent
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
