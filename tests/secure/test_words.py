"""Integers in words, against Python's own integers of any size."""

import random

import pytest
import torch

from fedspallm_appfl.secure import words


def slow_pack(values, bits):
    """Each entry times the unit of its field, modulo 2^64, as int64."""
    total = -(-len(values) // (64 // bits))
    sums = [0] * total
    for i, value in enumerate(values):
        sums[i % total] += value << bits * (i // total)
    return [(one + 2**63) % 2**64 - 2**63 for one in sums]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", range(1, 65))
def test_sums_of_words_are_words_of_sums(bits, signed):
    draw = random.Random(bits)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, min(2**bits, 2**63) - 1)
    least, most = -(-low // 3), high // 3  # of one of three clients
    for count in (1, 2, 7, 131):
        entries = [[draw.randint(least, most) for _ in range(count)] for _ in range(3)]
        for one, first, last in zip(
            entries, (low - 2 * least, least, least), (high - 2 * most, most, most), strict=True
        ):
            one[0], one[-1] = first, last  # the smallest sum beside large ones
        parts = [torch.tensor(one) for one in entries]
        packed = [words.pack(part, bits) for part in parts]
        assert [one.tolist() for one in packed] == [slow_pack(one, bits) for one in entries]
        assert len(packed[0]) == words.size(count, bits)
        found = words.unpack(sum(packed), bits, count, signed)
        assert found.tolist() == [sum(column) for column in zip(*entries, strict=True)]


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_every_integer_dtype_is_packed_in_pieces(dtype, monkeypatch):
    monkeypatch.setattr(words, "PIECE", 16)
    values = torch.arange(127, dtype=dtype)
    for bits in (7, 8, 10, 16):
        assert words.unpack(words.pack(values, bits), bits, 127, False).tolist() == list(range(127))


@pytest.mark.parametrize(
    ("bits", "signed", "dtype"),
    [(8, False, "uint8"), (8, True, "int8"), (9, True, "int16"), (15, False, "int16"), (16, False, "int32")]
    + [(16, True, "int16"), (32, True, "int32"), (32, False, "int64"), (64, True, "int64")],
)
def test_what_comes_out_is_as_small_as_its_range(bits, signed, dtype):
    empty = words.unpack(torch.empty(0, dtype=torch.int64), bits, 0, signed)
    assert empty.dtype == getattr(torch, dtype)
    assert words.pack(empty, bits).shape == (0,)


def test_what_does_not_fit_is_refused():
    for wrong in ([16], [-9]):
        with pytest.raises(ValueError, match="entries of 4 bits are wanted"):
            words.pack(torch.tensor(wrong), 4)
    words.pack(torch.tensor([15, -8]), 4)
    with pytest.raises(ValueError, match="33 entries of 4 bits take 3 words, got 2"):
        words.unpack(torch.zeros(2, dtype=torch.int64), 4, 33, True)
    for bits in (0, 65):
        with pytest.raises(ValueError, match=f"1 to 64 bits, got {bits}"):
            words.size(1, bits)
