"""Masks as bits and the values under them, against loops over single entries; compiled loops and torch alike."""

import pytest
import torch

from fedspallm_appfl.tensors import bitmask
from helpers.loops import LOOPS, use

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(n,) for n in range(1, 41)] + [(1, 1), (3, 5), (2, 8), (7, 9), (17, 33), (64, 24)]


@pytest.fixture(params=LOOPS)
def loops(request, monkeypatch):
    use(request.param, monkeypatch)
    return request.param


def random_mask(shape, seed=0, share=0.5):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def any_bits(shape, dtype, seed=0):
    """Floats of any bit pattern: numbers of every size, both zeros, infinities, NaNs of every payload."""
    integer = torch.int32 if dtype is torch.float32 else torch.int16
    low, high = torch.iinfo(integer).min, torch.iinfo(integer).max + 1
    random = torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int64)
    return random.to(integer).view(dtype)


def patterns(tensor):
    """The bits of each entry as an integer, row-major."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(integer).flatten().tolist()


def packed_bits(mask):
    """Oracle: entry i is bit i % 8 of byte i // 8."""
    entries = mask.flatten().tolist()
    octets = [0] * (len(entries) // 8 + (len(entries) % 8 > 0))
    for i, kept in enumerate(entries):
        if kept:
            octets[i // 8] += 2 ** (i % 8)
    return octets


def as_bits(octets):
    return torch.tensor(octets, dtype=torch.uint8)


def masks_of(shape):
    full = torch.ones(shape, dtype=torch.bool)
    return [random_mask(shape), random_mask(shape, 1, 0.1), random_mask(shape, 2, 0.9), full, ~full]


def test_masks_and_values_by_hand(loops):
    mask = torch.tensor([[True, False, True], [False, False, False], [False, True, True]])
    bits = bitmask.to_bits(mask)
    assert bits.tolist() == [0b10000101, 0b1]
    assert bitmask.count(bits) == 4
    values = bitmask.gather(torch.arange(9.0).view(3, 3), bits)
    assert values.tolist() == [0.0, 2.0, 7.0, 8.0]
    assert bitmask.scatter(values + 1, bits, (3, 3)).tolist() == [[1, 0, 3], [0, 0, 0], [0, 8, 9]]


@pytest.mark.parametrize("shape", SHAPES)
def test_masks_become_bits_and_come_back(loops, shape):
    for mask in masks_of(shape):
        bits = bitmask.to_bits(mask)
        assert bits.dtype is torch.uint8
        assert bits.tolist() == packed_bits(mask)
        assert bitmask.count(bits) == sum(mask.flatten().tolist())
        restored = bitmask.from_bits(bits, shape)
        assert (restored.dtype, restored.shape) == (torch.bool, shape)
        assert restored.tolist() == mask.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_are_gathered_and_scattered_bit_for_bit(loops, shape, dtype):
    dense = any_bits(shape, dtype)
    for mask in masks_of(shape):
        bits = as_bits(packed_bits(mask))
        flags, entries = mask.flatten().tolist(), patterns(dense)
        kept = [entry for entry, flag in zip(entries, flags, strict=True) if flag]
        values = bitmask.gather(dense, bits)
        assert (values.dtype, values.shape) == (dtype, (len(kept),))
        assert patterns(values) == kept
        restored = bitmask.scatter(values, bits, shape)
        assert (restored.dtype, restored.shape) == (dtype, shape)
        assert patterns(restored) == [entry if flag else 0 for entry, flag in zip(entries, flags, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_infinities_and_nan_keep_their_bits_and_a_pruned_entry_becomes_plus_zero(loops, dtype):
    one = torch.tensor(
        [-0.0, float("nan"), float("inf"), -float("inf"), 0.0, 1.0, -0.0, float("nan"), -0.0], dtype=dtype
    )
    mask = torch.tensor([True, True, True, True, True, False, False, False, True])
    bits = bitmask.to_bits(mask)
    expected = [*patterns(one)[:5], 0, 0, 0, patterns(one)[8]]
    assert patterns(bitmask.gather(one, bits)) == [*expected[:5], expected[8]]
    assert patterns(bitmask.scatter(bitmask.gather(one, bits), bits, (9,))) == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8])
def test_entries_of_other_sizes_are_gathered_too(loops, dtype):
    dense, mask = torch.arange(27).view(3, 9).to(dtype), random_mask((3, 9))
    bits = bitmask.to_bits(mask)
    assert patterns(bitmask.gather(dense, bits)) == patterns(dense[mask])
    assert bitmask.scatter(bitmask.gather(dense, bits), bits, (3, 9)).tolist() == (dense * mask).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5), (9, 16), (33, 40)])
def test_tensors_that_are_not_contiguous_are_read_in_the_order_of_their_entries(loops, shape, dtype):
    dense, mask = any_bits(shape, dtype).T, random_mask(shape).T
    bits = bitmask.to_bits(mask)
    assert bits.tolist() == packed_bits(mask)
    kept = [entry for entry, flag in zip(patterns(dense), mask.flatten().tolist(), strict=True) if flag]
    assert patterns(bitmask.gather(dense, bits)) == kept
    twice = as_bits([octet for octet in bits.tolist() for _ in (0, 1)])[::2]
    assert bitmask.count(twice) == len(kept)
    assert bitmask.from_bits(twice, tuple(mask.shape)).tolist() == mask.tolist()
    spread = bitmask.gather(dense, bits).repeat_interleave(2)[::2]
    assert patterns(bitmask.scatter(spread, twice, tuple(mask.shape))) == [
        entry if flag else 0 for entry, flag in zip(patterns(dense), mask.flatten().tolist(), strict=True)
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_slice_of_a_larger_tensor_is_read_from_its_own_first_entry(loops, dtype):
    around, mask = any_bits((5, 21), dtype), random_mask((3, 21))
    bits = torch.cat([as_bits([255]), bitmask.to_bits(mask), as_bits([255])])[1:-1]
    values = bitmask.gather(around[1:4], bits)
    assert patterns(values) == patterns(around[1:4][mask])
    surrounded = torch.cat([around[0, :1], values, around[0, :9]])[1 : 1 + len(values)]
    restored = bitmask.scatter(surrounded, bits, (3, 21))
    assert patterns(restored[mask]) == patterns(values)
    assert patterns(restored[~mask]) == [0] * int((~mask).sum())


def test_gathered_values_are_a_copy_even_where_everything_is_kept(loops):
    dense = torch.ones(4, 8)
    bitmask.gather(dense, as_bits([255] * 4)).zero_()
    assert dense.tolist() == [[1.0] * 8] * 4


@pytest.mark.parametrize("length", [*range(20), 63, 64, 65, 1000])
def test_set_bits_are_counted_in_every_byte(loops, length):
    octets = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    assert bitmask.count(as_bits(octets)) == sum(octet.bit_count() for octet in octets)


@pytest.mark.parametrize("count", [0, 2, 4])
def test_more_or_fewer_values_than_the_mask_keeps_are_refused(count):
    bits = bitmask.to_bits(torch.tensor([True, False, True, True]))
    with pytest.raises(ValueError, match=f"a mask with 3 kept entries needs as many values, got {count}"):
        bitmask.scatter(torch.ones(count), bits, (2, 2))
