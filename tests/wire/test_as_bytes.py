"""A payload as bytes: what comes out went in, and what a stranger has written is refused in words."""

import json

import pytest
import torch

from fedspallm_appfl.errors import UpdateError
from fedspallm_appfl.wire.as_bytes import DTYPES, HEAD, TENSOR, from_bytes, to_bytes


def packed(description, tensors=b""):
    text = description if isinstance(description, bytes) else json.dumps(description).encode()
    return len(text).to_bytes(HEAD, "little") + text + tensors


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_payload_comes_out_as_it_was(dtype):
    values = torch.arange(6).to(dtype).view(2, 3)
    sent = {"round": 1, "blocks": {"3": {"q": {"shape": [2, 3], "values": values, "zstd": ["mask"], "none": None}}}}
    got = from_bytes(to_bytes(sent), "a")
    matrix = got["blocks"]["3"]["q"]
    assert torch.equal(matrix.pop("values"), sent["blocks"]["3"]["q"].pop("values"))
    assert got == sent


def test_the_bytes_are_those_of_the_tensors_and_a_description():
    payload = {"a": torch.ones(1000, dtype=torch.float16)}
    assert 2000 < len(to_bytes(payload)) < 2000 + 100


def test_bits_survive_and_tensors_can_be_changed():
    odd = torch.tensor([-0.0, float("nan")], dtype=torch.float16)
    got = from_bytes(to_bytes({"b": torch.ones(3, dtype=torch.uint8), "a": odd}), "a")["a"]
    assert torch.equal(got.view(torch.int16), odd.view(torch.int16))
    got[0] = 1.0
    assert from_bytes(to_bytes({"a": torch.empty(0)}), "a")["a"].shape == (0,)
    assert from_bytes(to_bytes({}), "a") == {}


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "cannot be read"),
        (b"\xff" * 8, "cannot be read"),
        (packed(b"\xff\xfe"), "cannot be read"),
        (packed(b"[" * 100_000), "cannot be read"),
        (packed({TENSOR: ["float16", [2]]}), "describes 4 bytes of tensors, 0 are there"),
        (packed({TENSOR: ["float16", [2]]}, b"12345"), "describes 4 bytes of tensors, 5 are there"),
        (packed({TENSOR: ["float16", [-2]]}), "a shape must be a list of sizes"),
        (packed({TENSOR: ["float16", [True]]}), "a shape must be a list of sizes"),
        (packed({TENSOR: ["load", [2]]}), "a dtype must be one of"),
        (packed({TENSOR: [["uint8"], [2]]}), "a dtype must be one of"),
        (packed({TENSOR: 3}), "cannot be read"),
        (packed({TENSOR: ["uint8", [10**30]]}), "a shape must be a list of sizes"),
        (packed({TENSOR: ["uint8", [0, 10**22]]}), "a shape must be a list of sizes"),
        (packed(b"[" * 900 + b"]" * 900), "cannot be read"),
    ],
)
def test_what_is_no_payload_is_refused(data, why):
    with pytest.raises(UpdateError, match="refused an update from client a") as caught:
        from_bytes(data, "client a")
    assert why in str(caught.value)
