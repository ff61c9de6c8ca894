"""The codec bit by bit, and the refusal of every update that is not what was asked for."""

import io
from copy import deepcopy

import pytest
import torch

from fedspallm_appfl.errors import UpdateError
from fedspallm_appfl.payload import (
    check_update,
    make_update,
    matrices,
    nbytes,
    pack,
    packed_size,
    unpack,
    unpack_mask,
    update_nbytes,
)
from fedspallm_appfl.sparsity import parse_target

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (3, 5), (17, 33), (8, 16)]


def random_matrix(shape, dtype, seed=0):
    """A weight with zeros and negative zeros among the kept entries, and its mask."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    weight[torch.rand(shape, generator=generator) < 0.3] = -0.0
    weight[torch.rand(shape, generator=generator) < 0.2] = 0.0
    return weight.to(dtype), torch.rand(shape, generator=generator) < 0.6


def same_bits(one, other):
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def pack_oracle(mask):
    """Oracle: entry i in row-major order is bit i % 8, counted from the least significant, of byte i // 8."""
    entries = sum(mask.tolist(), [])
    packed = [0] * ((len(entries) + 7) // 8)
    for i, kept in enumerate(entries):
        packed[i // 8] |= kept << (i % 8)
    return packed


def test_a_matrix_by_hand():
    mask = torch.tensor([[True, False, True], [False, False, False], [False, True, True]])
    packed = pack(torch.arange(9.0).view(3, 3), mask, torch.float16)
    assert packed["shape"] == [3, 3]
    assert packed["mask"].tolist() == [0b10000101, 0b1]
    assert packed["values"].tolist() == [0.0, 2.0, 7.0, 8.0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_packing_is_bit_by_bit_and_unpacking_is_exact(shape, dtype):
    weight, mask = random_matrix(shape, dtype)
    packed = pack(weight, mask, dtype)
    restored, restored_mask = unpack(packed)
    assert packed["mask"].tolist() == pack_oracle(mask)
    assert torch.equal(restored_mask, mask)
    assert torch.equal(unpack_mask(packed), mask)
    assert same_bits(restored, torch.where(mask, weight, torch.zeros((), dtype=dtype)))
    assert restored.shape == shape


def test_a_kept_weight_may_be_zero_and_a_dropped_one_anything():
    weight = torch.tensor([[0.0, float("nan"), -0.0, float("inf")]])
    restored, mask = unpack(pack(weight, torch.tensor([[True, False, True, False]]), torch.float32))
    assert mask.tolist() == [[True, False, True, False]]
    assert restored.tolist() == [[0.0, 0.0, 0.0, 0.0]]
    assert restored.signbit().tolist() == [[False, False, True, False]]


def test_a_transposed_weight_is_packed_row_by_row():
    weight, mask = random_matrix((5, 3), torch.float32)
    transposed, contiguous = (
        pack(weight.T, mask.T, torch.float32),
        pack(weight.T.contiguous(), mask.T.contiguous(), torch.float32),
    )
    assert all(same_bits(transposed[part], contiguous[part]) for part in ("mask", "values"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_from_first_principles(shape, dtype):
    weight, mask = random_matrix(shape, dtype)
    packed, kept = pack(weight, mask, dtype), int(mask.sum())
    expected = (shape[0] * shape[1] + 7) // 8 + kept * (4 if dtype is torch.float32 else 2)
    assert nbytes(packed) == packed_size(shape, mask.numel() - kept, dtype) == expected
    assert update_nbytes(make_update(0, {1: {"q": packed, "k": packed}, 2: {"q": packed}})) == 3 * expected


def test_an_empty_update_takes_no_bytes():
    assert update_nbytes({}) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_update_survives_torch_save_without_pickle(dtype):
    blocks = {
        3: {"self_attn.q_proj": pack(*random_matrix((3, 5), dtype), dtype)},
        10: {"up": pack(*random_matrix((17, 33), dtype), dtype)},
    }
    buffer = io.BytesIO()
    torch.save(make_update(7, blocks), buffer)
    buffer.seek(0)
    update = torch.load(buffer, weights_only=True)
    assert (update["format"], update["round"]) == ("fedspallm-update/1", 7)
    assert [(block, name) for block, name, _ in matrices(update)] == [(3, "self_attn.q_proj"), (10, "up")]
    for block, name, packed in matrices(update):
        sent = blocks[block][name]
        assert packed["shape"] == sent["shape"]
        assert all(same_bits(packed[part], sent[part]) for part in ("mask", "values"))


HALF = torch.tensor(
    [[True, False, True], [False, True, False], [True, False, True]]
)  # 5 of 9: floor(0.5 * 9) = 4 zeros
PAIRS = torch.tensor([[True, True, False, False, False, True, False, True]])
SHAPES_OF_BLOCKS = {3: {"q": (3, 3), "up": (3, 3)}, 4: {"q": (1, 8)}}


def bits(*octets):
    return torch.tensor(octets, dtype=torch.uint8)


def honest(text="0.5"):
    """A good update for round 2: two linears of block 3, or one of block 4 for a pattern."""
    if ":" in text:
        return make_update(2, {4: {"q": pack(torch.ones(1, 8), PAIRS, torch.float16)}})
    matrix = pack(torch.arange(9.0).view(3, 3), HALF, torch.float16)
    return make_update(2, {3: {"q": matrix, "up": deepcopy(matrix)}})


def check(update, text="0.5"):
    check_update(update, "client ann", 2, {3, 4}, SHAPES_OF_BLOCKS, torch.float16, parse_target(text))


def changed(part, change, text="0.5"):
    """The good update with `change` applied to one part, a path such as `blocks/3/up/mask`; None removes it."""
    update = honest(text)
    *path, last = part.split("/")
    folder = update
    for key in path:
        folder = folder[key]
    value = change(folder.get(last))
    if value is None:
        del folder[last]
    else:
        folder[last] = value
    return update


@pytest.mark.parametrize("text", ["0.5", "2:4", "4:8"])
def test_an_update_that_was_asked_for_is_taken(text):
    check(honest(text), text)


def assert_refused(update, message):
    with pytest.raises(UpdateError) as refusal:
        check(update)
    assert str(refusal.value).startswith(f"refused an update from {message}")


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("format", "fedspallm-update/9", ": the format must be fedspallm-update/1"),
        ("format", None, ": the format must be fedspallm-update/1"),
        ("extra", 1, ": the keys are ['blocks', 'extra', 'format', 'round']"),
        ("blocks", None, ": the keys are ['format', 'round']"),
        ("round", 1, ": it is for round 1, this is round 2"),
        ("blocks", [], ": `blocks` is not a dict"),
        ("blocks/5", {}, ": block '5' was not assigned; assigned were [3, 4]"),
        ("blocks/x", {}, ": block 'x' was not assigned"),
        ("blocks/-3", {}, ": block '-3' was not assigned"),
        ("blocks/03", honest()["blocks"]["3"], ": block '03'"),
        ("blocks/3", [], ": block 3 is not a dict"),
        ("blocks/3/k", {}, ", block 3, k: there is no such linear; there are ['q', 'up']"),
        ("blocks/3/up", [1], ", block 3, up: a matrix has the keys shape, mask, values"),
    ],
)
def test_an_update_that_was_not_asked_for_is_refused(part, value, message):
    assert_refused(changed(part, lambda _: value), f"client ann{message}")


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("mask", lambda _: None, "a matrix has the keys shape, mask, values"),
        ("shape", lambda _: [9, 1], "the shape is [9, 1], expected [3, 3]"),
        ("shape", lambda _: 9, "the shape is 9, expected [3, 3]"),
        ("mask", lambda mask: mask.tolist(), "mask and values must be tensors"),
        ("mask", lambda mask: mask.short(), "the mask must be uint8 of 2 bytes, got torch.int16 of shape (2,)"),
        ("mask", lambda mask: mask[:1], "the mask must be uint8 of 2 bytes, got torch.uint8 of shape (1,)"),
        ("mask", lambda mask: mask | bits(0, 2), "bits beyond the last entry of the mask are set"),
        ("mask", lambda mask: mask | bits(2, 0), "the mask keeps 6 entries, sparsity 0.5 keeps 5"),
        ("mask", lambda mask: mask & bits(0xFE, 1), "the mask keeps 4 entries, sparsity 0.5 keeps 5"),
        ("values", lambda values: values.float(), "the values must be one row of torch.float16, got torch.float32"),
        ("values", lambda values: values[None], "the values must be one row of torch.float16, got torch.float16 of"),
        ("values", lambda values: values[1:], "the mask keeps 5 entries but there are 4 values"),
        ("values", lambda values: values.repeat(2), "the mask keeps 5 entries but there are 10 values"),
        ("values", lambda values: values / 0, "the values hold NaN or infinity"),
        ("values", lambda values: (values + 1) / 0, "the values hold NaN or infinity"),
    ],
)
def test_a_matrix_that_is_not_as_agreed_is_refused(part, change, message):
    assert_refused(changed(f"blocks/3/up/{part}", change), f"client ann, block 3, up: {message}")


def test_a_mask_of_the_right_count_but_another_pattern_is_refused():
    check(changed("blocks/4/q/mask", lambda _: bits(0x0F), "4:8"), "4:8")
    with pytest.raises(UpdateError, match="client ann, block 4, q: the mask does not keep 2:4 in every group"):
        check(changed("blocks/4/q/mask", lambda _: bits(0x0F), "2:4"), "2:4")


@pytest.mark.parametrize("garbage", ["weights", 5, [1, 2], {"layer.weight": torch.ones(2)}])
def test_what_is_no_update_is_refused(garbage):
    with pytest.raises(UpdateError, match="client ann: the format must be"):
        check(garbage)
