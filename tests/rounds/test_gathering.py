"""Statistics of a client's inputs, dense or in a sweep, against models that are whole in memory and hooks."""

import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from fedspallm_appfl.errors import PruningError
from fedspallm_appfl.models.inputs import shared_inputs
from fedspallm_appfl.models.layout import find_layout
from fedspallm_appfl.models.lazy_model import LazyModel
from fedspallm_appfl.pruning.from_sums import Sums, prune
from fedspallm_appfl.pruning.statistics import mirror
from fedspallm_appfl.settings.schema import Pruning
from fedspallm_appfl.tensors.target import parse_target
from fedspallm_appfl.wire.packed import pack
from helpers.families import FAMILIES, save_family, windows
from helpers.paths import DEMO
from helpers.rounds import dense_grams, swept_grams

LLAMA = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
GROUPS = {
    "opt": (
        ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"),
        ("self_attn.out_proj",),
        ("fc1",),
        ("fc2",),
    ),
    "gpt2": (("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
    "gpt-neox": (
        ("attention.query_key_value",),
        ("attention.dense",),
        ("mlp.dense_h_to_4h",),
        ("mlp.dense_4h_to_h",),
    ),
}
TEXT = windows(5, 23)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    return request.param, save_family(request.param, tmp_path_factory.mktemp(request.param))


def groups_of(model):
    return shared_inputs(model.skeleton.folder, model.layout)


def whole(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def caught(model, path, block, names, ids=TEXT):
    """What goes into linears of a block in a full forward pass: name -> (tokens, I) float64, in the order of the calls."""
    inputs = {}
    hooks = [
        model.get_submodule(f"{path}.{block}.{name}").register_forward_pre_hook(
            lambda module, args, name=name: inputs.update({name: args[0].flatten(0, -2).double()})
        )
        for name in names
    ]
    model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return inputs


def close(found, expected):
    """Equal but for the rounding of float32 sums."""
    tolerance = 2e-5 * expected.diagonal().abs().max().sqrt() * expected.diagonal().abs().sqrt().clamp(min=1e-3)
    return bool(((found.double() - expected).abs() <= tolerance[:, None]).all())


def test_the_bundled_model_has_four_inputs_a_block():
    assert groups_of(LazyModel(str(DEMO / "model"))) == (LLAMA,) * 8


def test_linears_that_share_an_input_are_those_that_take_equal_ones_in_the_order_of_calls(family):
    name, folder = family
    groups = groups_of(LazyModel(str(folder)))
    assert groups == (GROUPS.get(name, LLAMA),) * 3
    model = whole(folder)
    layout = find_layout(model)
    inputs = caught(model, layout.path, 0, [linear.name for linear in layout.blocks[0]])
    equal = {a: {b for b in inputs if torch.equal(inputs[a], inputs[b])} for a in inputs}
    assert {frozenset(names) for names in groups[0]} == {frozenset(names) for names in equal.values()}
    first_calls = list(dict.fromkeys(next(g for g in groups[0] if n in g) for n in inputs))
    assert first_calls == list(groups[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_arithmetic_does_not_change_who_shares(tmp_path, dtype):
    folder = save_family("llama", tmp_path, dtype)
    assert groups_of(LazyModel(str(folder))) == groups_of(LazyModel(str(folder), None, "float32"))


@pytest.mark.parametrize("assigned", [{0, 2}, {1}])
def test_dense_statistics_are_those_of_the_whole_model(family, assigned):
    _, folder = family
    model = LazyModel(str(folder))
    groups = groups_of(model)
    oracle, path = whole(folder), model.layout.path
    seen = []
    for block, found in dense_grams(model, TEXT, assigned, groups, batch=2):
        seen.append(block)
        leaders = [names[0] for names in groups[block]]
        assert list(found) == leaders
        inputs = caught(oracle, path, block, leaders)
        for name, sums in found.items():
            assert sums.tokens == TEXT.numel()
            assert sums.drift is None
            assert close(mirror(sums.upper.clone()), inputs[name].T @ inputs[name]), (block, name)
    assert seen == sorted(assigned)


def test_what_single_tokens_decide_is_never_of_the_private_text(family):
    """Such a Gram matrix is a sum over the vocabulary: how often each token occurs can be solved for."""
    name, folder = family
    model, oracle = LazyModel(str(folder)), whole(folder)
    groups, other = groups_of(model), TEXT.clone()
    other[:, :-1] = (other[:, :-1] + 5) % 96
    leaders = [names[0] for names in groups[0]]
    last = [caught(oracle, model.layout.path, 0, leaders, ids) for ids in (TEXT, other)]
    of_one_token = [
        leader
        for leader in leaders
        if torch.allclose(*(inputs[leader].view(*TEXT.shape, -1)[:, -1] for inputs in last), atol=1e-6)
    ]
    # In GPT-NeoX the MLP stands beside the attention and sees single tokens too.
    expected = [leaders[0], "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"] if name == "gpt-neox" else leaders[:1]
    assert of_one_token == expected
    public = [dict(dense_grams(model, text, {0}, groups, public_first=3))[0] for text in (TEXT, other)]
    for leader in leaders:
        assert torch.equal(*(sums[leader].upper for sums in public)) is (leader in of_one_token), leader


def decided(weight, seed):
    """A pruned matrix, as a server may make one: half of the entries, and not the values they had."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(weight.shape, generator=generator) < 0.5
    return (weight + 0.1 * torch.randn(weight.shape, generator=generator)) * mask, mask


def put(model, path, block, name, weight):
    module = model.get_submodule(f"{path}.{block}.{name}")
    module.weight.data = (weight.T if isinstance(module, Conv1D) else weight).contiguous()


@pytest.mark.parametrize(
    ("assigned", "stride", "dense_target", "activations"),
    [
        ({0, 1, 2}, 0, True, "memory"),
        ({0, 2}, 0, True, "file"),
        ({0, 2}, 0, False, "memory"),
        ({0, 1, 2}, 2, False, "file"),
        ({0, 2}, 3, False, "memory"),
        ({1, 2}, 2, False, "memory"),
    ],
    ids=["all", "some", "own target", "by two blocks", "all but the second of three", "second of two"],
)
def test_a_sweep_sees_the_inputs_of_the_model_that_is_pruned_so_far(
    family, assigned, stride, dense_target, activations
):
    """Block 1, where it is not assigned, was pruned before; others are pruned part by part while the sweep goes on."""
    _, folder = family
    model = LazyModel(str(folder))
    groups, path = groups_of(model), model.layout.path
    dense, partly, agreed, count, pending = whole(folder), whole(folder), {}, 0, {}

    def agree(block, names):
        for linear in names:
            weight, mask = decided(model.skeleton.dense_matrix(block, linear).float(), 10 * block + len(agreed))
            agreed.setdefault(block, {})[linear] = pack(weight, mask, torch.float32)
            put(partly, path, block, linear, weight)

    if 1 not in assigned:
        agree(1, [linear for names in groups[1] for linear in names])
    sweep = swept_grams(
        model,
        TEXT,
        assigned,
        groups,
        agreed,
        dense_target=dense_target,
        stride=stride,
        batch=2,
        activations=activations,
    )
    for block, found in sweep:
        assert len(found) == (len(groups[block]) if stride else 1)
        for leader, sums in found.items():
            now = caught(partly, path, block, [leader])[leader]
            assert sums.tokens == len(now)
            assert close(mirror(sums.upper.clone()), now.T @ now), (block, leader)
            if dense_target:
                before = caught(dense, path, block, [leader])[leader]
                drift = (before - now).T @ now
                norms = (before - now).square().sum(0).sqrt()[:, None] * now.square().sum(0).sqrt()
                assert bool(((sums.drift.double() - drift).abs() <= 1e-4 * norms + 1e-4).all()), (block, leader)
            else:
                assert sums.drift is None
            pending.setdefault(block, []).extend(next(names for names in groups[block] if names[0] == leader))
            count += 1
        part = range(block - block % stride, block - block % stride + stride) if stride else (block,)
        if block == max(assigned & set(part)):
            for one in list(pending):
                agree(one, pending.pop(one))
    assert count == sum(len(groups[block]) for block in assigned)


def test_the_first_input_has_not_drifted_and_later_ones_have(tmp_path):
    model = LazyModel(str(save_family("llama", tmp_path)))
    groups, agreed, drifts = groups_of(model), {}, []
    for block, found in swept_grams(model, TEXT, {0, 1}, groups, agreed, dense_target=True):
        [(leader, sums)] = found.items()
        drifts.append(float(sums.drift.abs().max()))
        for linear in next(names for names in groups[block] if names[0] == leader):
            made = decided(model.skeleton.dense_matrix(block, linear).float(), 1)
            agreed.setdefault(block, {})[linear] = pack(*made, torch.float32)
    assert drifts[0] == 0.0
    assert all(drift > 0 for drift in drifts[1:])


def test_who_has_no_block_sends_nothing(tmp_path):
    model = LazyModel(str(save_family("llama", tmp_path)))
    groups = groups_of(model)
    assert list(dense_grams(model, TEXT, set(), groups)) == list(swept_grams(model, TEXT, set(), groups, {})) == []


def test_a_sweep_that_prunes_nothing_gives_the_dense_statistics(family):
    _, folder = family
    model = LazyModel(str(folder))
    groups = groups_of(model)
    dense = {
        (block, name): sums
        for block, found in dense_grams(model, TEXT, {0, 1, 2}, groups, batch=2)
        for name, sums in found.items()
    }
    for block, found in swept_grams(model, TEXT, {0, 1, 2}, groups, {}, dense_target=True, batch=2):
        for name, sums in found.items():
            assert torch.equal(sums.upper, dense[block, name].upper)
            assert sums.tokens == dense[block, name].tokens
            assert not sums.drift.any()


BLAMED = r"client ann, block 1, mlp.down_proj: its inputs .* NaN or infinity, because model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("which", ["dense", "sweep"])
def test_inputs_that_are_not_finite_name_client_block_and_linear(tmp_path, which):
    folder = save_family("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = LazyModel(str(folder))
    groups = groups_of(model)
    with pytest.raises(PruningError, match=BLAMED):
        if which == "dense":
            list(dense_grams(model, TEXT, {0, 1, 2}, groups, client="ann"))
        else:
            list(swept_grams(model, TEXT, {0, 1, 2}, groups, {}, client="ann"))


def test_the_model_is_as_it_was_after_a_sweep_that_nobody_finished(tmp_path):
    model = LazyModel(str(save_family("llama", tmp_path)))
    groups = groups_of(model)
    for sweep in (
        dense_grams(model, TEXT, {0, 1}, groups),
        swept_grams(model, TEXT, {0, 1}, groups, {}, dense_target=True),
    ):
        next(sweep)
        assert all(parameter.is_meta for parameter in model.blocks.parameters())  # stands still with no block loaded
        sweep.close()
        assert not any(module._forward_pre_hooks for module in model.blocks.modules())


def damped_least_squares(weight, dense, inputs, damping):
    """Oracle: the Q with the least |W X_dense - Q X|^2 + damping * mean(diag G) |Q - W|^2, by lstsq in float64."""
    weight, dense, inputs = weight.double(), dense.double(), inputs.double()
    strength = damping * inputs.square().sum(0).mean()
    stacked = torch.cat([inputs, strength.sqrt() * torch.eye(inputs.shape[1], dtype=torch.float64)])
    wanted = torch.cat([dense @ weight.T, strength.sqrt() * weight.T])
    return torch.linalg.lstsq(stacked, wanted).solution.T


@pytest.mark.parametrize("damping", [0.01, 0.3])
@pytest.mark.parametrize("pruner", ["sparsegpt", "wanda", "admm"])
def test_with_nothing_pruned_the_dense_output_is_met_as_well_as_it_can_be(pruner, damping):
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(200, 20, generator=generator) * torch.linspace(0.2, 3, 20)
    dense = inputs + 0.3 * torch.randn(200, 20, generator=generator) + 0.2 * inputs.roll(1, 1)
    weight = torch.randn(9, 20, generator=generator)
    sums = Sums((inputs.T @ inputs).triu(), 200, (dense - inputs).T @ inputs)
    made, mask = prune({"q": weight}, sums, Pruning(pruner, parse_target("0"), damping), rounded=False)["q"]
    assert bool(mask.all())
    expected = damped_least_squares(weight, dense, inputs, damping)
    assert float((made - expected).abs().max()) < 1e-4 * float(expected.abs().max())
    assert float((weight - expected).abs().max()) > 0.05


@pytest.mark.parametrize("pruner", ["sparsegpt", "admm"])
def test_a_target_helps_pruned_matrices_too(pruner):
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(400, 64, generator=generator)
    dense = inputs + 0.5 * inputs.roll(1, 1)
    weight, settings = torch.randn(16, 64, generator=generator), Pruning(pruner, parse_target(0.5))

    def loss(drift):
        made, _ = prune({"q": weight}, Sums((inputs.T @ inputs).triu(), 400, drift), settings, False)["q"]
        return float((dense @ weight.T - inputs @ made.T).square().sum())

    assert loss((dense - inputs).T @ inputs) < 0.6 * loss(None)


@pytest.mark.parametrize("pruner", ["sparsegpt", "wanda", "admm"])
@pytest.mark.parametrize("precision_rounded", [False, True])
def test_an_input_that_is_always_zero_is_no_reason_to_stop(pruner, precision_rounded):
    sums = Sums(torch.zeros(8, 8), 50, torch.zeros(8, 8))
    weight = nn.Linear(8, 4, bias=False).weight.data
    made, mask = prune({"q": weight}, sums, Pruning(pruner, parse_target(0.5)), precision_rounded)["q"]
    assert made.isfinite().all()
    assert int(mask.sum()) == 16


def test_a_client_that_stands_still_holds_no_statistics_that_it_has_given(tmp_path):
    model = LazyModel(str(save_family("opt", tmp_path)))
    given = dense_grams(model, TEXT, {0, 1}, groups_of(model))
    _, sums = next(given)
    kept = [weakref.ref(sums.pop(name).upper) for name in list(sums)]
    assert kept and all(one() is None for one in kept)
