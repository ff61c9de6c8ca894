"""What a client makes for each kind of upload: packed like the sweep it is made of, in the sizes that were planned."""

import tempfile
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedspallm_appfl.algorithms.algorithm import SQUARES, UPLOADS, Exchange
from fedspallm_appfl.algorithms.registry import BUILT_IN, find
from fedspallm_appfl.errors import DataError
from fedspallm_appfl.models.inputs import shared_inputs
from fedspallm_appfl.models.lazy_model import LazyModel
from fedspallm_appfl.rounds import pruning
from fedspallm_appfl.rounds.uploads import sizes, sweep
from fedspallm_appfl.settings.schema import Gram, Pruning
from fedspallm_appfl.tensors.target import parse_target
from fedspallm_appfl.wire.grams import pack_gram
from fedspallm_appfl.wire.packed import pack_mask
from fedspallm_appfl.wire.store import AgreedBlocks
from fedspallm_appfl.wire.update import make_update
from helpers import rounds
from helpers.families import save_family, windows
from helpers.packed import parts, unpack, unpack_mask
from helpers.rounds import dense_grams

CAME_DOWN = tempfile.TemporaryDirectory(prefix="came-down-")
TEXT = windows(4, 20)  # 80 tokens, 48 features at most


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return LazyModel(str(save_family("llama", tmp_path_factory.mktemp("llama"), torch.float16)), None, "float32")


def groups_of(model):
    return shared_inputs(model.skeleton.folder, model.layout)


def source(model, pruner="sparsegpt", target="0.5", text=TEXT, *, client="ann", gram=None, seed=0, **changes):
    folder = Path(tempfile.mkdtemp(dir=CAME_DOWN.name))
    came_down = {kind: AgreedBlocks(model.skeleton.stored_dtype, folder / kind) for kind in ("pruned", "masks")}
    settings = Pruning(pruner, parse_target(target), **changes)
    told = {"batch": 2, "client": client, "gram": gram or Gram(), "seed": seed}
    return rounds.source(model, text, settings, groups=groups_of(model), **came_down, **told)


def made(source, up, blocks=frozenset({0, 2})):
    return {
        (block, name): unit
        for block, units in sweep(source, Exchange(up, None), set(blocks))
        for name, unit in units.items()
    }


def shapes(model):
    return {block: model.layout.shapes(block) for block in range(3)}


@pytest.mark.parametrize("pruner", ["sparsegpt", "admm"])
def test_weights_are_masks_and_kept_values(model, pruner):
    of = source(model, pruner)
    found = made(of, "weights")
    assert {block for block, _ in found} == {0, 2}
    for block, linears in pruning.prune_blocks(of, {0, 2}):
        for name, one in linears.items():
            weight, mask = unpack(found[block, name][0])
            assert torch.equal(mask, one.mask)
            assert torch.equal(weight, one.weight)
            assert weight.dtype is torch.float16


def outputs(model, layer):
    """(input, output) of a layer of a whole model for the first batch."""
    seen = []
    hook = layer.register_forward_hook(lambda _, args, out: seen.append((args[0], pruning.output_of(out))))
    with torch.no_grad():
        model(TEXT[:2])
    hook.remove()
    return seen[0]


def test_the_output_error_is_that_of_blocks_in_a_whole_model(model):
    """Block 0, and block 2, the last, behind it."""
    of = source(model)
    whole = AutoModelForCausalLM.from_pretrained(model.skeleton.folder, dtype=torch.float32).eval()
    for block, linears in pruning.prune_blocks(of, {0, 2}):
        layer = whole.model.layers[block]
        given, dense = outputs(whole, layer)
        for name, one in linears.items():
            layer.get_submodule(name).weight.data.copy_(one.weight)
        _, pruned = outputs(whole, layer)
        [note] = [one.notes for one in linears.values() if one.notes]
        assert note == {
            pruning.OUTPUT_ERROR: pytest.approx(float((pruned - dense).norm() / (dense - given).norm()), rel=1e-4)
        }
        assert 0.01 < note[pruning.OUTPUT_ERROR] < 2


def test_no_output_error_leaves_where_the_server_is_to_learn_sums_only_or_no_inputs_are_needed(model):
    of = source(model)
    secret = replace(of, settings=replace(of.settings, secure_sums=True))
    for one in (secret, source(model, "magnitude")):
        assert [note for _, note in made(one, "weights").values() if note] == []
    assert len([note for _, note in made(of, "weights").values() if note]) == 2


@pytest.mark.parametrize("pruner", ["wanda", "magnitude"])
def test_weights_that_nothing_changed_are_masks_alone(model, pruner):
    for packed, _ in made(source(model, pruner), "weights").values():
        assert parts(packed) == {"shape", "mask"}
    for packed, _ in made(source(model, "wanda", refit=True), "weights", {0}).values():
        assert parts(packed) == {"shape", "mask", "values"}


def test_masks_are_those_of_the_weights(model):
    weights, masks = made(source(model), "weights"), made(source(model), "masks")
    assert weights.keys() == masks.keys()
    for key, (packed, _) in masks.items():
        assert parts(packed) == {"shape", "mask"}
        assert torch.equal(packed.mask, weights[key][0].mask)


@pytest.mark.parametrize("pruner", ["sparsegpt", "admm"])
def test_values_are_solved_under_the_masks_that_came_down(model, pruner):
    of, generator = source(model, pruner), torch.Generator().manual_seed(0)
    given = {}
    for block in (0, 2):
        for name, shape in model.layout.shapes(block).items():
            mask = torch.rand(shape, generator=generator) < 0.6
            given.setdefault(block, {})[name] = mask
    packed_masks = {b: {n: pack_mask(m) for n, m in linears.items()} for b, linears in given.items()}
    of.masks.take(make_update(0, packed_masks) | {"piece": 0, "pieces": 1})
    found = made(of, "values")
    expected = dict(pruning.prune_blocks(of, {0, 2}, packed_masks))
    for (block, name), (packed, _) in found.items():
        assert parts(packed) == {"shape", "values"}
        mask = given[block][name]
        assert torch.equal(packed.values, expected[block][name].weight[mask])
        assert not expected[block][name].weight[~mask].any()
        dense = model.skeleton.dense_matrix(block, name)[mask]
        assert not torch.equal(packed.values, dense)  # they make up for what is gone


def test_grams_are_packed_statistics(model):
    of = source(model, gram=Gram(precision="fp32", first_input="private"))
    expected = dict(dense_grams(model, TEXT, {0, 2}, of.groups, batch=2))
    for (block, name), (packed, notes) in made(of, "grams").items():
        wanted = pack_gram(expected[block][name], "fp32")
        assert notes == {}
        assert packed.tokens == 80
        assert torch.equal(packed.diagonal, wanted.diagonal)
        assert torch.equal(packed.upper, wanted.upper)


FIRST = (0, "self_attn.q_proj")


@pytest.mark.parametrize("propagate", ["dense", "pruned"])
def test_a_first_input_of_public_tokens_says_nothing_of_the_text_and_all_others_are_of_it(model, propagate):
    gram = Gram("fp32", propagate, "dense" if propagate == "pruned" else "own")
    found = [made(source(model, text=text, gram=gram), "grams") for text in (TEXT, (TEXT + 1) % 96)]
    private = made(source(model, gram=replace(gram, first_input="private")), "grams")
    for key, (packed, _) in found[0].items():
        others = found[1][key][0], private[key][0]
        assert [torch.equal(packed.upper, other.upper) for other in others] == (
            [True, False] if key == FIRST else [False, True]
        )
        assert packed.tokens == others[0].tokens == 80
    drawn = torch.randint(96, TEXT.shape, generator=torch.Generator().manual_seed(0))
    expected = dict(dense_grams(model, drawn, {0}, groups_of(model), batch=2))[0][FIRST[1]]
    assert torch.equal(found[0][FIRST][0].upper, pack_gram(expected, "fp32").upper)
    if propagate == "pruned":
        assert not found[0][FIRST][0].drift.any()


def test_public_tokens_are_those_of_the_seed_whoever_sends_them(model):
    same = [made(source(model, client=name, seed=7), "grams", {0})[FIRST][0] for name in ("ann", "bob")]
    other = made(source(model, seed=8), "grams", {0})[FIRST][0]
    assert torch.equal(same[0].upper, same[1].upper)
    assert not torch.equal(same[0].upper, other.upper)


@pytest.mark.parametrize("algorithm", BUILT_IN)
@pytest.mark.parametrize("target", ["0.5", "0.7", "2:4"])
def test_bytes_are_those_that_were_planned(model, algorithm, target):
    groups = groups_of(model)
    for precision, drift in (
        (("int8", False), ("bf16", True), ("fp32", False)) if algorithm == "gram" else (("int8", False),)
    ):
        gram = Gram(precision, "pruned" if drift else "dense", "dense" if drift else "own")
        of, plan = source(model, "sparsegpt", target, gram=gram), {}
        for exchange in find(algorithm).exchanges(groups, gram):
            planned = sizes(exchange, shapes(model), of.settings.sparsity, torch.float16, groups, gram)
            if exchange.only is not None:
                assert [(block, name) for block, units in planned.items() for name in units] == list(exchange.only)
            for block, units in planned.items():
                plan.setdefault(exchange.up, {}).setdefault(block, {}).update(units)
            if exchange.down == "masks":
                masks = {
                    b: {n: pack_mask(unpack_mask(p)) for n, (p, _) in u.items()}
                    for b, u in sweep(of, exchange, {0, 1, 2})
                }
                of.masks.take(make_update(0, masks) | {"piece": 0, "pieces": 1})
        for up, planned in plan.items():
            found = made(of, up, {0, 1, 2})
            assert {(block, unit) for block in planned for unit in planned[block]} == set(found)
            assert all(packed.nbytes == planned[block][unit] for (block, unit), (packed, _) in found.items())


def test_every_algorithm_has_a_label_and_exchanges_of_known_kinds(model):
    groups = groups_of(model)
    assert len({find(algorithm).title for algorithm in BUILT_IN}) == len(BUILT_IN) == 7
    for algorithm in BUILT_IN:
        found = find(algorithm).exchanges(groups, Gram())
        assert all(exchange.up in UPLOADS for exchange in found)
        assert [exchange.up for exchange in found] == {"consensus": ["masks", "values"], "gram": ["grams"]}.get(
            algorithm, ["masks" if algorithm == "fedprllm" else "weights"]
        )
    swept = find("gram").exchanges(groups, Gram(propagate="pruned"))
    assert [exchange.only for exchange in swept] == [((b, names[0]),) for b in range(3) for names in groups[b]]
    assert [b for b in range(3) if swept[5].concerns(b)] == [1]


@pytest.mark.parametrize("propagate", ["dense", "pruned"])
@pytest.mark.parametrize(
    ("tokens", "min_tokens", "where"),
    [
        (31, None, "block 0, self_attn.q_proj: statistics of 31 tokens .* fewer than 32"),
        (47, None, "block 0, mlp.down_proj: statistics of 47 tokens .* fewer than 48"),
        (48, None, None),
        (48, 49, "block 0, self_attn.q_proj: statistics of 48 tokens .* fewer than 49"),
        (49, 49, None),
        (1, 1, None),
    ],
)
def test_too_few_tokens_are_not_sent(model, propagate, tokens, min_tokens, where):
    """32 features go into most linears, 48 into the last."""
    gram = Gram("fp32", propagate, min_tokens=min_tokens)
    of = source(model, text=windows(1, 49)[:, :tokens], gram=gram)
    if where is None:
        assert all(packed.tokens == tokens for packed, _ in made(of, "grams").values())
        return
    with pytest.raises(
        DataError, match=f"client ann, {where}; give more calibration windows, or lower gram.min_tokens"
    ):
        made(of, "grams")


def test_notes_travel_beside_the_matrix(model):
    """Two tokens give a Gram matrix of rank two, which needs more damping than next to none."""
    of = source(model, text=TEXT[:1, :2], damping=1e-12, damping_retries=12)
    notes = [notes for _, notes in made(of, "weights", {0}).values()]
    assert all(one["damping"] > 1e-12 for one in notes)


@pytest.mark.parametrize(
    "exchange",
    [
        Exchange("weights"),
        Exchange("masks"),
        Exchange("grams"),
        Exchange("masks", hidden=3),
        Exchange(SQUARES, hidden=3),
    ],
    ids=lambda exchange: f"{exchange.up}-{exchange.hidden}",
)
def test_a_client_that_waits_for_its_next_turn_does_not_keep_what_it_has_sent(model, exchange, tmp_path):
    going_on = sweep(replace(source(model, gram=Gram(min_tokens=1)), scratch=lambda: tmp_path), exchange, {0, 2})
    _, units = next(going_on)
    tensors = [
        tensor for unit, _ in units.values() for tensor in vars(unit).values() if isinstance(tensor, torch.Tensor)
    ]
    gone = [weakref.ref(tensor) for tensor in tensors]
    assert gone
    del units, tensors
    assert all(reference() is None for reference in gone)
    assert next(going_on)[0] == 2
