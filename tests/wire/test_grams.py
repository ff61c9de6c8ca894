"""Statistics as they travel: exact, or within bounds that can be counted; sizes; sums in any order; what is refused."""

import io
import itertools
import math
import random
from fractions import Fraction

import pytest
import torch
import zstandard

from fedspallm_appfl.aggregation.gram_sum import GramSum
from fedspallm_appfl.errors import UpdateError
from fedspallm_appfl.pruning.from_sums import Sums, prune
from fedspallm_appfl.pruning.statistics import mirror
from fedspallm_appfl.settings.schema import Pruning
from fedspallm_appfl.tensors.target import parse_target
from fedspallm_appfl.wire import compression
from fedspallm_appfl.wire.compression import deflated
from fedspallm_appfl.wire.grams import LEVELS, MOST_TOKENS, PRECISIONS, PackedGram, gram_size, pack_gram, parts_of
from fedspallm_appfl.wire.update import check_gram

SIDES = [1, 2, 7, 300]
LONGEST_TIME = 40  # tokens


def statistics(side, seed=0, drift=False, dead=(), tokens=LONGEST_TIME):
    """Sums of inputs whose features are of very different magnitudes; what is below the diagonal is noise."""
    generator = torch.Generator().manual_seed(seed)
    scales = 10.0 ** torch.empty(side).uniform_(-3, 3, generator=generator)
    inputs = torch.randn(tokens, side, generator=generator) * scales
    inputs[:, list(dead)] = 0
    upper = (inputs.T @ inputs).triu() + torch.randn(side, side, generator=generator).tril(-1)
    other = torch.randn(tokens, side, generator=generator) * scales * 0.1
    return Sums(upper, tokens, other.T @ inputs if drift else None)


def arrived(packed, side, precision, drift=False):
    """What one client's upload says, as the server reads it."""
    total = GramSum(side, drift)
    read(packed, side, precision, drift).add_to(total)
    return total.result()


def read(packed, side, precision, drift=False):
    """What one client's upload holds once it was checked."""
    plain = packed.to_dict() if isinstance(packed, PackedGram) else packed
    return check_gram(plain, "ann", parts_of(side, precision, drift))


def correlations(matrix, diagonal):
    """Oracle in float64: entries divided by the norms of their features, 0 where a feature is always zero."""
    norms = diagonal.double().sqrt()
    inverse = torch.where(norms > 0, 1 / norms, 0.0)
    return matrix.double() * inverse[:, None] * inverse


@pytest.mark.parametrize("drift", [False, True], ids=["", "drift"])
@pytest.mark.parametrize("side", SIDES)
def test_fp32_comes_back_bit_for_bit(side, drift):
    sums = statistics(side, drift=drift)
    back = arrived(pack_gram(sums, "fp32"), side, "fp32", drift)
    assert torch.equal(back.upper, sums.upper.triu())
    assert back.tokens == LONGEST_TIME
    assert torch.equal(back.drift, sums.drift) if drift else back.drift is None


@pytest.mark.parametrize("side", SIDES)
def test_bf16_rounds_to_eight_bits_and_leaves_the_diagonal(side):
    sums = statistics(side, drift=True)
    back = arrived(pack_gram(sums, "bf16"), side, "bf16", drift=True)
    assert torch.equal(back.upper.diagonal(), sums.upper.diagonal())
    above = sums.upper.triu(1)
    assert bool(((back.upper.triu(1) - above).abs() <= above.abs() * 2.0**-8).all())
    assert torch.equal(back.upper.triu(1), above.bfloat16().float())
    assert torch.equal(back.drift, sums.drift.bfloat16().float())


@pytest.mark.parametrize("dead", [(), (0,), (3, 5)])
@pytest.mark.parametrize("side", [7, 300])
def test_int8_is_half_a_step_from_every_correlation(side, dead):
    sums = statistics(side, drift=True, dead=dead)
    packed = pack_gram(sums, "int8")
    back = arrived(packed, side, "int8", drift=True)
    diagonal = sums.upper.diagonal()
    assert torch.equal(back.upper.diagonal(), diagonal)
    above = torch.ones(side, side).bool().triu(1)
    for got, meant, scale, where in (
        (back.upper, sums.upper, packed.scale, above),
        (back.drift, sums.drift, packed.drift_scale, torch.ones(side, side).bool()),
    ):
        error = (correlations(got, diagonal) - correlations(meant, diagonal)).abs()[where]
        largest = correlations(meant, diagonal).abs()[where].max()
        assert float(error.max()) <= float(scale) * (0.5 + 1e-4)
        assert float(error.max()) > float(scale) * 0.4  # as large as rounding makes it, or the bound says nothing
        assert float(scale) == pytest.approx(float(largest) / LEVELS, rel=1e-6)
    for feature in dead:
        assert not back.upper[feature].any()
        assert not back.upper[:, feature].any()
        assert not back.drift[feature].any()


def test_int8_uses_all_levels_and_no_more():
    packed = pack_gram(statistics(300, drift=True), "int8")
    for name in ("upper", "drift"):
        assert int(getattr(packed, name).abs().max()) == LEVELS


@pytest.mark.parametrize("precision", PRECISIONS)
def test_inputs_that_are_always_zero_give_zeros(precision):
    sums = Sums(torch.zeros(5, 5), 9, torch.zeros(5, 5))
    back = arrived(pack_gram(sums, precision), 5, precision, drift=True)
    assert not back.upper.any()
    assert not back.drift.any()
    assert back.upper.isfinite().all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_feature_has_only_a_diagonal(precision):
    packed = pack_gram(Sums(torch.tensor([[3.0]]), 2), precision)
    assert packed.upper.shape == (0,)
    assert arrived(packed, 1, precision).upper.tolist() == [[3.0]]
    assert arrived(deflated(packed.to_dict()), 1, precision).upper.tolist() == [[3.0]]


@pytest.mark.parametrize("drift", [False, True], ids=["", "drift"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("side", SIDES)
def test_sizes_are_those_that_are_forecast(side, precision, drift):
    packed = pack_gram(statistics(side, drift=drift), precision)
    width = {"fp32": 4, "bf16": 2, "int8": 1}[precision]
    entries = side * (side - 1) // 2 + (side * side if drift else 0)
    scales = (1 + drift) * 4 if precision == "int8" else 0
    assert packed.nbytes == gram_size(side, precision, drift) == 4 * side + entries * width + scales


@pytest.mark.parametrize("drift", [False, True], ids=["", "drift"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_compressed_statistics_are_the_same_statistics(precision, drift):
    sums = statistics(130, drift=drift, dead=range(60))
    packed = pack_gram(sums, precision).to_dict()
    small = deflated(packed)
    assert sum(small[part].nbytes for part in packed if part != "tokens") < pack_gram(sums, precision).nbytes
    assert "upper" in small["zstd"]
    plain = read(small, 130, precision, drift).to_dict()
    assert plain.keys() == packed.keys()
    assert all(torch.equal(plain[name], packed[name]) for name in packed if name != "tokens")
    buffer = io.BytesIO()
    torch.save(small, buffer)
    buffer.seek(0)
    read(torch.load(buffer, weights_only=True), 130, precision, drift)


def entries(packed, side):
    """Oracle: what a checked upload says, each product in float32 and in the same order, by plain indexing."""
    roots = packed.diagonal.sqrt()

    def matrix(name, scale):
        values = getattr(packed, name).float()
        if scale is not None:
            rows, columns = where[name]
            values = values * scale * (roots[rows] * roots[columns])
        return values

    where = {
        "upper": torch.triu_indices(side, side, 1),
        "drift": torch.cartesian_prod(torch.arange(side), torch.arange(side)).T,
    }
    return {"upper": matrix("upper", packed.scale), "drift": matrix("drift", packed.drift_scale)}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_four_clients_in_any_order_give_the_same_bits_the_rounded_exact_sum(precision):
    side = 12
    uploads = [
        read(pack_gram(statistics(side, seed, True, tokens=20 + seed), precision), side, precision, True)
        for seed in range(4)
    ]
    results = []
    for order in itertools.permutations(uploads):
        total = GramSum(side, drift=True)
        for packed in order:
            packed.add_to(total)
        results.append(total.result())
    first = results[0]
    assert first.tokens == 20 + 21 + 22 + 23
    for other in results[1:]:
        assert torch.equal(other.upper, first.upper)
        assert torch.equal(other.drift, first.drift)

    def exact(columns):
        return [float(torch.tensor(float(sum(map(Fraction, terms)))).float()) for terms in columns]

    parts = [entries(packed, side) for packed in uploads]
    diagonals = torch.stack([packed.diagonal for packed in uploads])
    rows, columns = torch.triu_indices(side, side, 1)
    assert first.upper.diagonal().tolist() == exact(diagonals.T.tolist())
    assert first.upper[rows, columns].tolist() == exact(torch.stack([one["upper"] for one in parts]).T.tolist())
    assert first.drift.flatten().tolist() == exact(torch.stack([one["drift"] for one in parts]).T.tolist())


def test_the_sum_is_near_that_of_all_inputs_together():
    side, parts = 300, [statistics(300, seed, drift=True) for seed in range(4)]
    exact = sum(one.upper.triu().double() for one in parts)
    norms = exact.diagonal().sqrt()
    for precision, bound in (("fp32", 1e-7), ("bf16", 2.0**-8), ("int8", 0.5 / LEVELS)):
        total = GramSum(side, drift=True)
        for one in parts:
            read(pack_gram(one, precision), side, precision, True).add_to(total)
        error = (total.result().upper - exact).abs() / (norms[:, None] * norms)
        assert float(error.max()) <= bound


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("pruner", ["sparsegpt", "wanda", "admm"])
@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_a_rounded_sum_of_few_tokens_can_be_pruned_with(precision, pruner, seed):
    """Rank 20 of 90 features, some of them dead, and next to no damping: what rounding did makes the sum indefinite."""
    side, settings = 90, Pruning(pruner, parse_target(0.5), damping=1e-6, damping_retries=0)
    total = GramSum(side)
    for client in range(2):
        packed = pack_gram(statistics(side, 10 * seed + client, dead=(4, 70), tokens=10), precision)
        read(packed, side, precision).add_to(total)
    sums = total.result()
    symmetric = mirror(sums.upper.clone()).double()
    weight = torch.randn(24, side, generator=torch.Generator().manual_seed(seed))
    if precision == "int8":
        live = symmetric.diagonal() > 0
        assert float(torch.linalg.eigvalsh(correlations(symmetric, symmetric.diagonal())[live][:, live])[0]) < -1e-3
    made, mask = prune({"q": weight}, sums, settings, rounded=True)["q"]
    assert made.isfinite().all()
    assert int((~mask).sum()) == 24 * side // 2
    assert not made[~mask].any()


@pytest.mark.parametrize("pruner", ["sparsegpt", "wanda", "admm"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_rounded_drift_is_better_than_none(precision, pruner):
    """Eigenvalues that rounding made negative and damping near zero again would blow the drift up without bound."""
    side, tokens, generator = 120, 4000, torch.Generator().manual_seed(5)
    basis = torch.randn(side // 6, side, generator=generator)
    inputs = torch.randn(tokens, side // 6, generator=generator) @ basis
    inputs += 0.3 * torch.randn(tokens, side, generator=generator)
    dense = inputs + 0.2 * inputs.roll(1, 1) + 0.2 * torch.randn(tokens, side, generator=generator)
    weight = torch.randn(40, side, generator=generator)
    sums = Sums((inputs.T @ inputs).triu(), tokens, (dense - inputs).T @ inputs)
    back = arrived(pack_gram(sums, precision), side, precision, drift=True)

    def loss(known):
        made, _ = prune({"q": weight}, known, Pruning(pruner, parse_target(0.5)), precision != "fp32")["q"]
        return float((weight @ dense.T - made @ inputs.T).square().sum())

    without = loss(Sums(back.upper.clone(), back.tokens))
    assert loss(back) < 0.8 * without


def good(precision="int8", drift=False, side=6):
    """As it travels."""
    return pack_gram(statistics(side, drift=drift), precision).to_dict()


def refused(packed, words, precision="int8", drift=False, side=6):
    with pytest.raises(UpdateError, match=f"refused an update from client ann, block 0, q: .*{words}"):
        check_gram(packed, "client ann, block 0, q", parts_of(side, precision, drift))


@pytest.mark.parametrize(
    "tokens", [True, False, 0, -1, MOST_TOKENS + 1, 10**30, "40", 40.0, None, [40], torch.tensor(40)]
)
def test_tokens_are_a_whole_number_that_can_be(tokens):
    refused(good() | {"tokens": tokens}, f"they must be of 1 to {MOST_TOKENS} tokens, got ")


@pytest.mark.parametrize("tokens", [1, MOST_TOKENS])
def test_the_least_and_the_most_tokens_are_taken(tokens):
    assert read(good() | {"tokens": tokens}, 6, "int8").tokens == tokens


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("drift", [False, True])
def test_every_part_must_be_there_and_no_other(precision, drift):
    whole = good(precision, drift)
    for name in whole:
        refused(
            {key: value for key, value in whole.items() if key != name}, "statistics have the keys", precision, drift
        )
    refused(whole | {"mask": torch.zeros(1)}, "statistics have the keys", precision, drift)
    refused(whole | {1: torch.zeros(1)}, "statistics have the keys", precision, drift)


@pytest.mark.parametrize("packed", [None, [], "gram", 1, torch.zeros(3), {}])
def test_statistics_are_a_dict_of_parts(packed):
    refused(packed, "statistics have the keys diagonal, scale, tokens, upper, and `zstd` if compressed")


def test_what_another_setting_would_send_is_refused():
    refused(good("int8", drift=True), "statistics have the keys")
    refused(good("int8"), "statistics have the keys", "int8", drift=True)
    refused(good("fp32"), "statistics have the keys", "int8")
    refused(good("fp32"), r"upper must be 15 entries of torch\.bfloat16, got torch\.float32", "bf16")
    refused(good("bf16"), r"upper must be 15 entries of torch\.float32, got torch\.bfloat16", "fp32")


@pytest.mark.parametrize("name", ["diagonal", "upper", "scale", "drift", "drift_scale"])
def test_every_part_has_its_size_and_dtype(name):
    whole = good(drift=True)
    part = whole[name]
    for wrong in (part[:-1], torch.cat([part, part[:1]]), part[None], part.double(), part.view(torch.uint8)):
        refused(whole | {name: wrong}, f"{name} must be {len(part)} entries of {part.dtype}, got ", drift=True)


@pytest.mark.parametrize("name", ["diagonal", "upper", "scale", "drift", "drift_scale"])
@pytest.mark.parametrize("wrong", [None, [1.0], 1.0, b"1", "sparse", "meta", "quantized", "nested"])
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:The PyTorch API of nested tensors")
def test_every_part_is_a_tensor_in_memory(name, wrong):
    whole = good(drift=True)
    part = whole[name].float()
    made = {
        "sparse": part.to_sparse(),
        "meta": part.to("meta"),
        "quantized": torch.quantize_per_tensor(part, 0.1, 0, torch.qint8),
        "nested": torch.nested.nested_tensor([part]),
    }
    refused(whole | {name: made[wrong] if isinstance(wrong, str) else wrong}, "must be tensors in memory", drift=True)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["diagonal", "upper", "drift", "scale", "drift_scale"])
def test_what_is_not_finite_is_refused(name, precision, value):
    whole = good(precision, drift=True)
    if name not in whole or not whole[name].is_floating_point():
        return
    whole[name][-1] = value
    for sent in (whole, deflated(whole)):
        refused(sent, f"{name} holds NaN or infinity", precision, drift=True)


def test_the_diagonal_and_the_scales_are_not_negative():
    whole = good(drift=True)
    diagonal = whole["diagonal"].clone()
    diagonal[2] = -1e-30
    refused(whole | {"diagonal": diagonal}, "the diagonal of a Gram matrix is nowhere negative", drift=True)
    for name in ("scale", "drift_scale"):
        refused(whole | {name: torch.tensor([-1e-3])}, "a scale is not negative", drift=True)


def test_a_strange_but_right_tensor_counts_as_what_it_shows():
    whole = good("fp32")
    strided = torch.stack([whole["upper"], torch.zeros(15)], 1)[:, 0]
    sent = whole | {"upper": strided, "diagonal": torch._neg_view(-whole["diagonal"]).requires_grad_()}
    plain = read(sent, 6, "fp32").to_dict()
    assert all(torch.equal(plain[name], whole[name]) for name in ("upper", "diagonal"))
    assert not plain["diagonal"].requires_grad


def framed(data, **options):
    return torch.tensor(
        list(zstandard.ZstdCompressor(**({"write_checksum": True} | options)).compress(data)), dtype=torch.uint8
    )


def claiming(size):
    """The header of a frame that promises `size` bytes, and nothing after it."""
    return torch.tensor([0x28, 0xB5, 0x2F, 0xFD, 0xE0, *size.to_bytes(8, "little")], dtype=torch.uint8)


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (framed(bytes(16)), "upper: the frame holds 16 bytes, expected 15"),
        (framed(bytes(14)), "upper: the frame holds 14 bytes, expected 15"),
        (framed(bytes(15), write_content_size=False), "upper: the frame holds [0-9]+ bytes, expected 15"),
        (claiming(2**63), f"upper: the frame holds {2**63} bytes, expected 15"),
        (claiming(15), "upper cannot be decompressed"),
        (framed(bytes(range(15)))[:-3], "upper cannot be decompressed"),
        (torch.cat([framed(bytes(15)), torch.zeros(1, dtype=torch.uint8)]), "upper cannot be decompressed"),
        (torch.zeros(9, dtype=torch.uint8), "upper cannot be decompressed"),
        (torch.zeros(0, dtype=torch.uint8), "upper cannot be decompressed"),
        (framed(bytes(15)).to(torch.int8), r"upper: not a frame but torch\.int8"),
        (framed(bytes(15))[None], r"upper: not a frame but torch\.uint8 of shape \(1, "),
    ],
)
def test_frames_that_lie_are_refused(frame, words):
    refused(good() | {"upper": frame, "zstd": ["upper"]}, words)


@pytest.mark.parametrize("size", [0, 14, 16, 10**9, 2**64 - 1])
def test_a_frame_of_another_size_is_not_even_opened(monkeypatch, size):
    def decompressor(**_):
        raise AssertionError("a frame was opened that should have been refused by its header")

    monkeypatch.setattr(compression.zstandard, "ZstdDecompressor", decompressor)
    refused(good() | {"upper": claiming(size), "zstd": ["upper"]}, f"the frame holds {size} bytes, expected 15")


@pytest.mark.parametrize(
    "zstd",
    ["upper", ("upper",), {"upper": 1}, None, True, 1, [0], [None], [["upper"]], ["tokens"], ["mask"], ["zstd"]],
)
def test_zstd_is_a_list_of_parts_that_are_there(zstd):
    refused(good() | {"zstd": zstd}, "`zstd` lists which of the parts are compressed, got ")


def test_a_part_that_is_no_frame_although_it_is_said_so_and_the_reverse():
    refused(good() | {"zstd": ["upper"]}, r"upper: not a frame but torch\.int8")
    frame = framed(bytes(15))
    refused(good() | {"upper": frame, "zstd": []}, "upper must be 15 entries of torch.int8, got torch.uint8")


def test_random_rubbish_is_refused_or_read_and_never_worse():
    dice, values = random.Random(3), [None, True, -1, 2**70, "x", [], {}, torch.zeros(15), torch.zeros(6)]
    values += [torch.zeros(6, 6).to_sparse(), ["upper"], torch.full((15,), math.nan), framed(bytes(15))]
    keys = ["tokens", "diagonal", "upper", "scale", "zstd", "drift", 3, ("a",)]
    for _ in range(500):
        packed = good() | {dice.choice(keys): dice.choice(values) for _ in range(dice.randrange(1, 3))}
        try:
            read(packed, 6, "int8")
        except UpdateError:
            continue
        assert packed.keys() - {"zstd"} == good().keys()
