"""The codec bit by bit, and the refusal of every update that is not what was asked for."""

import io
from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
import zstandard

from fedspallm_appfl.errors import UpdateError
from fedspallm_appfl.tensors import bitmask
from fedspallm_appfl.tensors.target import parse_target
from fedspallm_appfl.wire import compression
from fedspallm_appfl.wire.packed import pack, pack_mask, pack_values, packed_size, packed_sizes
from fedspallm_appfl.wire.update import (
    FORMAT,
    block_nbytes,
    check_matrix,
    check_update,
    check_values,
    compress,
    make_update,
    read_matrices,
    update_nbytes,
)
from helpers.packed import as_packed, matrices, parts, unpack, unpack_mask

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
    assert packed.shape == (3, 3)
    assert packed.mask.tolist() == [0b10000101, 0b1]
    assert packed.values.tolist() == [0.0, 2.0, 7.0, 8.0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_packing_is_bit_by_bit_and_unpacking_is_exact(shape, dtype):
    weight, mask = random_matrix(shape, dtype)
    packed = pack(weight, mask, dtype)
    restored, restored_mask = unpack(packed)
    assert packed.mask.tolist() == pack_oracle(mask)
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
    assert same_bits(transposed.mask, contiguous.mask)
    assert same_bits(transposed.values, contiguous.values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_from_first_principles(shape, dtype):
    weight, mask = random_matrix(shape, dtype)
    packed, kept = pack(weight, mask, dtype), int(mask.sum())
    expected = (shape[0] * shape[1] + 7) // 8 + kept * (4 if dtype is torch.float32 else 2)
    assert packed.nbytes == packed_size(shape, mask.numel() - kept, dtype) == expected
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
    assert (update["format"], update["round"]) == ("fedspallm-update/2", 7)
    assert [(block, name) for block, name, _ in matrices(update)] == [(3, "self_attn.q_proj"), (10, "up")]
    for block, name, packed in matrices(update):
        sent = blocks[block][name].to_dict()
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


def expected(shapes, dtype, text, mask_only=False):
    """How each matrix of an upload is checked."""
    options = {"dtype": dtype, "target": parse_target(text), "mask_only": mask_only}
    return {
        block: {name: partial(check_matrix, shape=shape, **options) for name, shape in linears.items()}
        for block, linears in shapes.items()
    }


def check(update, text="0.5"):
    check_update(update, "client ann", 2, 0, expected(SHAPES_OF_BLOCKS, torch.float16, text))


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
        ("format", "fedspallm-update/9", ": the format must be fedspallm-update/2"),
        ("format", "fedspallm-update/1", ": the format must be fedspallm-update/2"),
        ("format", None, ": the format must be fedspallm-update/2"),
        ("extra", 1, ": the keys are ['blocks', 'exchange', 'extra', 'format', 'round']"),
        ("blocks", None, ": the keys are ['exchange', 'format', 'round']"),
        ("exchange", None, ": the keys are ['blocks', 'format', 'round']"),
        ("round", 1, ": it is for round 1, this is round 2"),
        ("round", torch.tensor(2), ": it is for round <Tensor>, this is round 2"),
        ("exchange", 1, ": it is for exchange 1, this is exchange 0"),
        ("exchange", False, ": it is for exchange False, this is exchange 0"),
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
        ("mask", lambda mask: mask.short(), "mask must be 2 entries of torch.uint8, got torch.int16 of shape (2,)"),
        ("mask", lambda mask: mask[:1], "mask must be 2 entries of torch.uint8, got torch.uint8 of shape (1,)"),
        ("mask", lambda mask: mask | bits(0, 2), "bits beyond the last entry of the mask are set"),
        ("mask", lambda mask: mask | bits(2, 0), "the mask keeps 6 entries, sparsity 0.5 keeps 5"),
        ("mask", lambda mask: mask & bits(0xFE, 1), "the mask keeps 4 entries, sparsity 0.5 keeps 5"),
        ("values", lambda values: values.float(), "values must be 5 entries of torch.float16, got torch.float32 of"),
        (
            "values",
            lambda values: values[None],
            "values must be 5 entries of torch.float16, got torch.float16 of shape (1",
        ),
        (
            "values",
            lambda values: values[1:],
            "values must be 5 entries of torch.float16, got torch.float16 of shape (4,)",
        ),
        ("values", lambda values: values.repeat(2), "values must be 5 entries of torch.float16, got torch.float16 of"),
        ("values", lambda values: values.to_sparse(), "mask and values must be tensors in memory"),
        ("values", lambda values: values.to("meta"), "mask and values must be tensors in memory"),
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


LARGE = {3: {"q": (32, 48), "up": (40, 64)}, 4: {"q": (32, 48)}}
TARGETS = ["0.5", "0.7", "2:4"]


def target_mask(shape, text, seed=0):
    """A mask of exactly the target, unlike any other seed's."""
    target, generator = parse_target(text), torch.Generator().manual_seed(seed)
    size = getattr(target, "group", shape[0] * shape[1])
    order = torch.rand(shape[0] * shape[1] // size, size, generator=generator).argsort(1)
    return (order >= target.zeros(size)).view(shape)


def coarse(shape, seed):
    """Weights with few bits in their mantissas, so that the values of a small matrix get smaller too."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul_(8).round_() / 512


def large(text, dtype, only_masks=False, round_index=2):
    """A good update of three matrices."""
    blocks = {}
    for block, linears in LARGE.items():
        for seed, (name, shape) in enumerate(linears.items()):
            weight, mask = coarse(shape, 10 * block + seed), target_mask(shape, text, 10 * block + seed)
            matrix = pack_mask(mask) if only_masks else pack(weight, mask, dtype)
            blocks.setdefault(block, {})[name] = matrix
    return make_update(round_index, blocks)


def checked(update, text="0.5", dtype=torch.float16, mask_only=False):
    return check_update(update, "client ann", 2, 0, expected(LARGE, dtype, text, mask_only))


def units(made):
    """All (block, name, parts) of an update, of the matrices read from one, or of what was checked."""
    if isinstance(made, tuple):
        return [(block, name, unit.to_dict()) for block, name, unit in made]
    return matrices(made if "blocks" in made else make_update(0, made))


def assert_same(one, other):
    for (block, name, first), (where, same, second) in zip(units(one), units(other), strict=True):
        assert (block, name, list(first), first["shape"]) == (where, same, list(second), second["shape"])
        assert all(same_bits(first[part], second[part]) for part in ("mask", "values") if part in first)


@pytest.mark.parametrize("text", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_compression_loses_no_bit(dtype, text):
    update = large(text, dtype)
    given = deepcopy(update)
    small = compress(update)
    assert all("values" in packed["zstd"] for _, _, packed in matrices(small))
    assert {key: small[key] for key in small if key != "blocks"} == {"format": FORMAT, "round": 2, "exchange": 0}
    assert_same(read_matrices(small, dtype), update)
    assert_same(read_matrices(update, dtype), update)
    assert_same(checked(small, text, dtype), update)
    assert_same(checked(update, text, dtype), update)
    assert_same(update, given)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_of_both_signs_infinities_and_nan_survive_compression(dtype):
    values = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1.0] * 40, dtype=dtype)
    packed = pack(values.view(8, 30), torch.ones(8, 30, dtype=torch.bool), dtype)
    update = make_update(0, {0: {"q": packed}})
    small = compress(update)
    assert small["blocks"]["0"]["q"]["zstd"] == ["mask", "values"]
    assert_same(read_matrices(small, dtype), update)


def test_a_frame_holds_all_first_bytes_then_all_second_ones():
    values = torch.arange(0x4000, 0x4000 + 500, dtype=torch.int16).view(torch.float16)
    small = compress(
        make_update(0, {0: {"q": pack(values.view(5, 100), torch.ones(5, 100, dtype=torch.bool), torch.float16)}})
    )
    frame = small["blocks"]["0"]["q"]["values"]
    assert frame.dtype is torch.uint8
    plain = zstandard.ZstdDecompressor().decompress(bytes(frame.tolist()))
    numbers = range(0x4000, 0x4000 + 500)
    assert plain == bytes([n % 256 for n in numbers] + [n // 256 for n in numbers])


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_that_would_not_get_smaller_stay_as_they_are(dtype):
    generator = torch.Generator().manual_seed(0)
    integer = torch.int32 if dtype is torch.float32 else torch.int16
    low, high = torch.iinfo(integer).min, torch.iinfo(integer).max
    noise = torch.randint(low, high, (32, 48), generator=generator, dtype=torch.int64).to(integer).view(dtype)
    packed = pack(noise, target_mask((32, 48), "0.5"), dtype)
    small = compress(make_update(0, {0: {"q": packed}}))["blocks"]["0"]["q"]
    assert small["zstd"] == []
    assert all(same_bits(small[part], getattr(packed, part)) for part in ("mask", "values"))
    sparse = pack(noise, target_mask((32, 48), "0.95"), dtype)
    assert compress(make_update(0, {0: {"q": sparse}}))["blocks"]["0"]["q"]["zstd"] == ["mask"]


def test_nothing_at_all_can_be_compressed_and_comes_back():
    packed = pack(torch.ones(4, 40), torch.zeros(4, 40, dtype=torch.bool), torch.float16)
    update = make_update(0, {0: {"q": packed}, 1: {}})
    read = read_matrices(compress(update), torch.float16)
    assert list(read) == [0, 1]
    assert_same(read, update)


@pytest.mark.parametrize("text", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_compressed_bytes_are_those_that_are_counted(dtype, text):
    small = compress(large(text, dtype))
    sizes = {
        int(block): sum(packed[part].nbytes for packed in linears.values() for part in ("mask", "values"))
        for block, linears in small["blocks"].items()
    }
    assert block_nbytes(small) == sizes
    assert update_nbytes(small) == sum(sizes.values()) < update_nbytes(large(text, dtype))
    assert sum(block_nbytes(large(text, dtype)).values()) == update_nbytes(large(text, dtype))


def test_masks_alone_take_one_bit_a_weight():
    update = large("0.5", torch.float16, only_masks=True)
    assert block_nbytes(update) == {3: (32 * 48 + 40 * 64) // 8, 4: 32 * 48 // 8}
    assert block_nbytes({}) == {}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_compressed_update_survives_torch_save_without_pickle(dtype):
    buffer = io.BytesIO()
    torch.save(compress(large("0.7", dtype)), buffer)
    buffer.seek(0)
    assert_same(checked(torch.load(buffer, weights_only=True), "0.7", dtype), large("0.7", dtype))


@pytest.mark.parametrize("text", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_alone_are_taken_from_whom_sends_nothing_else(dtype, text):
    update = large(text, dtype, only_masks=True)
    for sent in (update, compress(update)):
        taken = checked(sent, text, dtype, mask_only=True)
        assert_same(taken, update)
        assert all(parts(unit) == {"shape", "mask"} for _, _, unit in taken)
    full = as_packed(update["blocks"]["4"]["q"]).with_values(coarse((32, 48), 40).to(dtype))
    assert same_bits(full.values, large(text, dtype)["blocks"]["4"]["q"]["values"])
    assert full.shape == (32, 48)


@pytest.mark.parametrize("prepare", [lambda update: update, compress], ids=["plain", "compressed"])
def test_values_from_whom_masks_are_expected_and_masks_from_others_are_refused(prepare):
    with pytest.raises(UpdateError, match="client ann, block 3, q: a matrix has the keys shape, mask, and `zstd` if"):
        checked(prepare(large("0.7", torch.float16)), "0.7", mask_only=True)
    with pytest.raises(
        UpdateError, match="client ann, block 3, q: a matrix has the keys shape, mask, values, and `zstd`"
    ):
        checked(prepare(large("0.7", torch.float16, only_masks=True)), "0.7")


def test_a_mask_alone_is_checked_like_any_other():
    update = large("0.5", torch.float16, only_masks=True)
    update["blocks"]["4"]["q"]["mask"] = torch.full((32 * 48 // 8,), 255, dtype=torch.uint8)
    for sent in (update, compress(update)):
        with pytest.raises(
            UpdateError, match="client ann, block 4, q: the mask keeps 1536 entries, sparsity 0.5 keeps 768"
        ):
            checked(sent, mask_only=True)
    update["blocks"]["4"]["q"]["mask"] = "all"
    with pytest.raises(UpdateError, match="client ann, block 4, q: mask must be a tensor"):
        checked(update, mask_only=True)


def framed(data, **options):
    """A zstandard frame as it travels."""
    return torch.tensor(
        list(zstandard.ZstdCompressor(**({"write_checksum": True} | options)).compress(data)), dtype=torch.uint8
    )


def hostile(part, frame, frames=None):
    """A good update for `LARGE` whose block 4 holds something else as a frame."""
    update = large("0.5", torch.float16)
    matrix = update["blocks"]["4"]["q"]
    matrix[part], matrix["zstd"] = frame, [part] if frames is None else frames
    return update


def size_of(part):
    return 192 if part == "mask" else 2 * 768


def claiming(size):
    """The header of a frame that promises `size` bytes, in eight bytes of content size, and nothing after it."""
    return torch.tensor([0x28, 0xB5, 0x2F, 0xFD, 0xE0, *size.to_bytes(8, "little")], dtype=torch.uint8)


def refuse_to_decompress(monkeypatch):
    def decompressor(**_):
        raise AssertionError("a frame was opened that should have been refused by its header")

    monkeypatch.setattr(compression.zstandard, "ZstdDecompressor", decompressor)


@pytest.mark.parametrize("part", ["mask", "values"])
def test_a_frame_of_the_right_size_is_taken_and_its_content_is_checked(part):
    good = large("0.5", torch.float16)["blocks"]["4"]["q"]
    shuffled = good["mask"] if part == "mask" else torch.cat([good["values"].view(torch.uint8)[i::2] for i in (0, 1)])
    assert_same(checked(hostile(part, framed(bytes(shuffled.tolist())))), large("0.5", torch.float16))
    message = {"mask": "the mask keeps 1536 entries", "values": "the values hold NaN or infinity"}[part]
    with pytest.raises(UpdateError, match=f"client ann, block 4, q: {message}"):
        checked(hostile(part, framed(bytes([255]) * size_of(part))))


@pytest.mark.parametrize("part", ["mask", "values"])
@pytest.mark.parametrize("size", [0, 1, 191, 193, 1535, 1537, 10**9, 10**15, 2**63, 2**64 - 1])
def test_a_frame_that_promises_another_size_is_refused_before_it_is_opened(monkeypatch, part, size):
    refuse_to_decompress(monkeypatch)
    with pytest.raises(
        UpdateError, match=f"ann, block 4, q: {part}: the frame holds {size} bytes, expected {size_of(part)}$"
    ):
        checked(hostile(part, claiming(size)))


@pytest.mark.parametrize("part", ["mask", "values"])
def test_a_frame_that_does_not_say_its_size_is_refused_before_it_is_opened(monkeypatch, part):
    refuse_to_decompress(monkeypatch)
    frame = framed(bytes(size_of(part)), write_content_size=False)
    with pytest.raises(UpdateError, match=f"client ann, block 4, q: {part}: the frame holds [0-9]+ bytes, expected"):
        checked(hostile(part, frame))


def skippable(part):
    return torch.tensor([0x50, 0x2A, 0x4D, 0x18, *size_of(part).to_bytes(4, "little"), *[0] * size_of(part)]).to(
        torch.uint8
    )


@pytest.mark.parametrize("part", ["mask", "values"])
@pytest.mark.parametrize(
    "frame",
    [
        lambda part: framed(bytes(range(192)) * (size_of(part) // 192))[:-5],
        lambda part: framed(bytes(range(192)) * (size_of(part) // 192))[:7],
        lambda part: torch.arange(100, dtype=torch.uint8),
        lambda part: torch.zeros(0, dtype=torch.uint8),
        lambda part: claiming(size_of(part)),
        lambda part: torch.cat([claiming(size_of(part)), framed(bytes(1000))[6:]]),
        skippable,
        lambda part: torch._neg_view(framed(bytes(size_of(part)))),
    ],
    ids=["truncated", "header only", "garbage", "empty", "no content", "more than promised", "skippable", "negated"],
)
def test_a_frame_that_cannot_be_decompressed_is_refused(part, frame):
    with pytest.raises(UpdateError, match=f"from client ann, block 4, q: {part} cannot be decompressed: "):
        checked(hostile(part, frame(part)))


@pytest.mark.parametrize("part", ["mask", "values"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.int64, torch.bool])
def test_a_frame_is_one_row_of_bytes(part, dtype):
    frame = framed(bytes(size_of(part)))
    with pytest.raises(UpdateError, match=rf"client ann, block 4, q: {part}: not a frame but {dtype} of shape "):
        checked(hostile(part, frame.to(dtype)))
    with pytest.raises(
        UpdateError, match=rf"client ann, block 4, q: {part}: not a frame but torch.uint8 of shape \(1, "
    ):
        checked(hostile(part, frame[None]))


@pytest.mark.parametrize(
    "frames", ["mask", {"mask": 1}, ("mask",), ["shape"], ["mask", "zstd"], [0], [["mask"]], [None], 1, None, True]
)
def test_what_is_compressed_is_said_in_a_list_of_known_parts(frames):
    update = large("0.5", torch.float16)
    update["blocks"]["4"]["q"]["zstd"] = frames
    with pytest.raises(
        UpdateError, match="client ann, block 4, q: `zstd` lists which of the parts are compressed, got"
    ):
        checked(update)


def test_a_mask_alone_has_no_values_to_name_as_compressed():
    update = large("0.5", torch.float16, only_masks=True)
    update["blocks"]["4"]["q"]["zstd"] = ["values"]
    with pytest.raises(
        UpdateError, match=r"block 4, q: `zstd` lists which of the parts are compressed, got \['values'\]"
    ):
        checked(update, mask_only=True)


def test_a_compressed_part_that_is_not_named_as_such_is_refused():
    update = compress(large("0.7", torch.float16))
    update["blocks"]["4"]["q"]["zstd"] = []
    with pytest.raises(UpdateError, match="client ann, block 4, q: "):
        checked(update, "0.7")


def test_values_that_travel_share_no_memory_with_the_matrix():
    weight = torch.ones(4, 8)
    packed = pack(weight, torch.ones(4, 8, dtype=torch.bool), torch.float32)
    from_mask = pack_mask(torch.ones(4, 8, dtype=torch.bool)).with_values(weight)
    weight.zero_()
    assert packed.values.tolist() == from_mask.values.tolist() == [1.0] * 32
    assert bitmask.count(packed.mask) == packed.kept == 32


def test_nothing_may_follow_a_frame():
    frame = zstandard.ZstdCompressor().compress(bytes(16))
    tensor = torch.frombuffer(bytearray(frame + b"more"), dtype=torch.uint8)
    with pytest.raises(UpdateError, match="ann: mask cannot be decompressed"):
        compression.inflated({"mask": tensor, "zstd": ["mask"]}, "mask", "ann", 16, torch.uint8)


class Odd(torch.Tensor):
    """A subclass may answer anything."""


def freed(tensor):
    tensor.untyped_storage().resize_(0)
    return tensor


def cut(tensor):
    tensor.untyped_storage().resize_(tensor.nbytes - 1)
    return tensor


@pytest.mark.parametrize("part", ["mask", "values"])
@pytest.mark.parametrize("make", [lambda t: t.as_subclass(Odd), torch.nn.Parameter, freed, cut])
@pytest.mark.parametrize("zstd", [False, True])
def test_subclasses_and_tensors_without_their_memory_are_refused(part, make, zstd):
    update = large("0.5", torch.float16)
    matrix = update["blocks"]["4"]["q"]
    if zstd:
        matrix.update(mask=framed(bytes(192)), values=framed(bytes(2 * 768)), zstd=["mask", "values"])
    if make is torch.nn.Parameter and not matrix[part].is_floating_point():
        make = partial(torch.nn.Parameter, requires_grad=False)
    matrix[part] = make(matrix[part].clone())
    with pytest.raises(UpdateError, match="client ann, block 4, q: mask and values must be tensors in memory"):
        checked(update)


def test_frames_have_checksums_that_show_a_flipped_bit():
    whole = compress(large("0.5", torch.float16))
    frame = whole["blocks"]["4"]["q"]["mask"] = framed(bytes(192))
    matrix = whole["blocks"]["4"]["q"]
    matrix["zstd"] = ["mask"]
    sent = compression.deflated({"mask": torch.zeros(4096, dtype=torch.uint8)})["mask"]
    assert zstandard.get_frame_parameters(sent.numpy().data).has_checksum
    frame[-1] ^= 1  # of the checksum itself
    with pytest.raises(UpdateError, match="block 4, q: mask cannot be decompressed"):
        checked(whole)
    matrix["mask"] = framed(bytes(192), write_checksum=False)
    with pytest.raises(UpdateError, match="block 4, q: mask: the frame has no checksum"):
        checked(whole)


def test_a_frame_that_is_longer_than_any_of_its_content_is_not_copied():
    endless = torch.zeros(1, dtype=torch.uint8).expand(10**13)
    with pytest.raises(UpdateError, match="block 4, q: mask: the frame takes 10000000000000 bytes, 705 are enough"):
        checked(hostile("mask", endless))


def test_a_negated_view_counts_as_what_it_shows():
    mask = torch.tensor([[True, False], [False, True]])
    packed = pack(torch.ones(2, 2), mask, torch.float32)
    update = make_update(0, {0: {"q": replace(packed, values=torch._neg_view(packed.values))}})
    [(_, _, taken)] = check_update(update, "ann", 0, 0, expected({0: {"q": (2, 2)}}, torch.float32, "0.5"))
    assert not taken.values.is_neg()
    assert taken.values.tolist() == [-1.0, -1.0]


AGREED = pack_mask(HALF)


def values_update(change=None):
    """Values for an agreed mask in exchange 1 of round 2, with one part of the matrix changed."""
    packed = pack_values(torch.arange(9.0).view(3, 3), AGREED.mask, torch.float16)
    update = make_update(2, {3: {"q": packed}}, exchange=1)
    update["blocks"]["3"]["q"] |= change or {}
    return update


def taken_values(update):
    checks = {3: {"q": lambda packed, where: check_values(packed, where, AGREED, torch.float16)}}
    [(block, name, taken)] = check_update(update, "client ann", 2, 1, checks)
    assert (block, name) == (3, "q")
    return taken


def test_values_under_an_agreed_mask_are_taken_with_that_mask():
    ones = {"values": framed(bytes([0] * 5 + [0x3C] * 5)), "zstd": ["values"]}
    for change, values in (({}, [0.0, 2.0, 4.0, 6.0, 8.0]), (ones, [1.0] * 5)):
        taken = taken_values(values_update(change))
        assert taken.values.tolist() == values
        assert torch.equal(unpack_mask(taken), HALF)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": AGREED.mask}, "a matrix has the keys shape, values, and `zstd` if compressed"),
        ({"shape": [9, 1]}, "the shape is [9, 1], expected [3, 3]"),
        ({"values": [1.0] * 5}, "values must be a tensor in memory"),
        ({"values": torch.ones(5)}, "values must be 5 entries of torch.float16, got torch.float32 of shape (5,)"),
        (
            {"values": torch.ones(4).half()},
            "values must be 5 entries of torch.float16, got torch.float16 of shape (4,)",
        ),
        ({"values": torch.full((5,), torch.nan).half()}, "the values hold NaN or infinity"),
        ({"zstd": ["mask"]}, "`zstd` lists which of the parts are compressed, got ['mask']"),
        ({"values": claiming(10**9), "zstd": ["values"]}, "values: the frame holds 1000000000 bytes, expected 10"),
    ],
)
def test_values_that_do_not_fit_under_the_agreed_mask_are_refused(change, message):
    with pytest.raises(UpdateError) as refusal:
        taken_values(values_update(change))
    assert str(refusal.value) == f"refused an update from client ann, block 3, q: {message}"


def test_what_travels_of_a_matrix_is_mask_and_values_or_one_of_the_two():
    sizes = [packed_sizes({"q": (3, 3)}, parse_target("0.5"), torch.float16, parts) for parts in ("masks", "values")]
    assert sizes == [{"q": 2}, {"q": 10}]
    assert packed_sizes({"q": (3, 3)}, parse_target("0.5"), torch.float16) == {"q": 12}
    assert pack_mask(HALF).nbytes == 2
    assert pack_values(torch.ones(3, 3), AGREED.mask, torch.float16).nbytes == 10
