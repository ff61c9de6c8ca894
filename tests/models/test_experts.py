"""Mixtures of experts: what is pruned in them, by which tokens, and where it goes on disk."""

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from fedspallm_appfl.errors import ModelError
from fedspallm_appfl.models.inputs import shared_inputs
from fedspallm_appfl.models.lazy_model import LazyModel, Skeleton
from fedspallm_appfl.models.perplexity import perplexities
from fedspallm_appfl.models.storage.export import save_model
from fedspallm_appfl.settings.schema import Prune, Pruning
from fedspallm_appfl.tensors.target import parse_target
from fedspallm_appfl.wire.packed import Unreached, pack
from fedspallm_appfl.wire.store import PackedStore
from helpers.families import MIXTURES, save_family, windows
from helpers.oracles import column_blocks, sparsegpt
from helpers.rounds import dense_grams, prune_blocks, swept_grams

HALF = Pruning("sparsegpt", parse_target(0.5), min_tokens=1)


@pytest.fixture(scope="module", params=MIXTURES)
def folder(request, tmp_path_factory):
    return save_family(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return save_family("mixtral", tmp_path_factory.mktemp("mixtral"))


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def whole_model_inputs(model, block, ids):
    """What each expert of a block multiplies with its matrices, in the order of the calls: [(weight, inputs)].

    The model runs whole with the loop over experts of its own class, and every product is looked at.
    """
    model.set_experts_implementation("eager")
    seen, linear = [], functional.linear
    experts = next(
        m for m in block.modules() if hasattr(m, "down_proj") and m.down_proj.__class__.__name__ == "Parameter"
    )
    inside = []

    def watched(inputs, weight, bias=None):
        if inside:
            seen.append((weight.detach(), inputs.detach()))
        return linear(inputs, weight, bias)

    before = experts.register_forward_pre_hook(lambda *_: inside.append(1))
    after = experts.register_forward_hook(lambda *_: inside.clear())
    functional.linear = torch.nn.functional.linear = watched
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    finally:
        functional.linear = torch.nn.functional.linear = linear
        before.remove()
        after.remove()
    return experts, seen


def test_the_forward_pass_is_the_models(folder):
    ids = windows()
    with torch.no_grad():
        logits = load(folder)(input_ids=ids, use_cache=False).logits[:, :-1]
    expected = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).exp()
    assert perplexities(LazyModel(str(folder)), {"text": ids}, batch=4)["text"] == pytest.approx(
        float(expected), rel=1e-5
    )


def test_an_expert_is_pruned_by_the_tokens_that_reach_it(mixtral):
    """SparseGPT of each expert's matrices, with the inputs that the model's own loop multiplies with them."""
    lazy, ids, model = LazyModel(str(mixtral)), windows(), load(mixtral)
    experts, seen = whole_model_inputs(model, model.model.layers[0], ids)
    got = dict(prune_blocks(lazy, ids, {0}, HALF, batch=6))[0]
    for expert in range(4):
        gate_up = next(inputs for weight, inputs in seen if torch.equal(weight, experts.gate_up_proj[expert]))
        down = next(inputs for weight, inputs in seen if torch.equal(weight, experts.down_proj[expert]))
        gate, up = experts.gate_up_proj[expert].data.chunk(2)
        for name, weight, inputs in (
            ("gate_proj", gate, gate_up),
            ("up_proj", up, gate_up),
            ("down_proj", experts.down_proj[expert].data, down),
        ):
            one, x = got[f"mlp.experts.{expert}.{name}"], inputs.double()
            pruned, mask = sparsegpt(weight, x.T @ x, column_blocks(*weight.shape, 0.5), 0.01)
            assert torch.equal(one.mask, mask), (expert, name)
            torch.testing.assert_close(one.weight, pruned.float(), atol=1e-4, rtol=1e-3)
            assert one.tokens == len(x)


def test_gram_matrices_are_those_of_the_tokens_that_reach_an_expert(mixtral):
    lazy, ids, model = LazyModel(str(mixtral)), windows(), load(mixtral)
    _, seen = whole_model_inputs(model, model.model.layers[1], ids)
    groups = shared_inputs(mixtral, lazy.layout)
    assert groups[1][-8:-6] == (("mlp.experts.0.gate_proj", "mlp.experts.0.up_proj"), ("mlp.experts.0.down_proj",))
    found = dict(dense_grams(lazy, ids, {1}, groups, settings=HALF))[1]
    for expert, (first, last) in enumerate(zip(seen[::2], seen[1::2], strict=True)):
        for name, (_, inputs) in (("gate_proj", first), ("down_proj", last)):
            sums = found[f"mlp.experts.{expert}.{name}"]
            if isinstance(sums, Unreached):
                assert len(inputs) < inputs.shape[1]
                continue
            expected = (inputs.double().T @ inputs.double()).triu()
            torch.testing.assert_close(sums.upper.double().triu(), expected, atol=1e-3, rtol=1e-4)
            assert sums.tokens == len(inputs)
    for stride in (1, 2):
        swept = dict(swept_grams(lazy, ids, {1}, groups, {}, stride=stride, settings=HALF))[1]
        assert swept.keys() == found.keys()
        for name, sums in found.items():
            assert isinstance(sums, Unreached) or torch.equal(swept[name].upper, sums.upper)


def test_what_is_written_is_what_was_pruned_and_nothing_else_changes(folder, tmp_path):
    """Whatever the layout on disk: a matrix an expert, or one tensor, transposed or not."""
    lazy = LazyModel(str(folder))
    store, dense = PackedStore(tmp_path / "state"), load(folder).state_dict()
    results = dict(prune_blocks(lazy, windows(), {0, 1, 2}, HALF))
    for block, linears in results.items():
        store.add(block, {name: pack(one.weight, one.mask, torch.float32) for name, one in linears.items()})
    matrices = save_model(lazy.skeleton, store, tmp_path / "model")
    assert all(one.zeros == one.entries // 2 for one in matrices)
    written = load(tmp_path / "model").state_dict()
    for block, linears in results.items():
        for linear in lazy.layout.blocks[block]:
            name = lazy.layout.parameter(block, linear)
            assert torch.equal(linear.view(written[name]), linears[linear.name].weight), (block, linear.name)
            linear.view(dense[name]).copy_(linears[linear.name].weight)
    assert all(torch.equal(written[name], dense[name]) for name in dense)
    ids = windows()
    pruned = {block: store.get(block) for block in results}
    expected = perplexities(LazyModel(str(tmp_path / "model")), {"text": ids})["text"]
    assert perplexities(lazy, {"text": ids}, pruned.get)["text"] == pytest.approx(expected, rel=1e-6)


def test_routers_and_gates_are_never_pruned(folder):
    names = {linear.name for block in Skeleton(str(folder)).layout.blocks for linear in block}
    assert not [name for name in names if "router" in name or name.endswith(("mlp.gate", "shared_expert_gate"))]
    assert any(".experts." in name for name in names)


def test_an_expert_that_too_few_tokens_reach_stays_dense(mixtral):
    lazy, ids = LazyModel(str(mixtral)), windows()
    tokens = {
        name: one.tokens for name, one in dict(prune_blocks(lazy, ids, {0}, HALF))[0].items() if one.tokens is not None
    }
    least = sorted(set(tokens.values()))[1]
    few = Pruning("sparsegpt", parse_target(0.5), min_tokens=least)
    for name, one in dict(prune_blocks(lazy, ids, {0}, few))[0].items():
        left = name in tokens and tokens[name] < least
        assert isinstance(one, Unreached) == left, name
        assert one.tokens == tokens.get(name)


def test_experts_whose_inputs_cannot_be_seen_are_refused_unless_they_are_ignored(tmp_path):
    folder = save_family("llama4", tmp_path)
    with pytest.raises(ModelError, match=r"block 0 of Llama4ForCausalLM holds .* feed_forward.experts.gate_up_proj"):
        Skeleton(str(folder))
    skeleton = Skeleton(str(folder), prune=Prune(ignore=["*.experts.*"]))
    names = {linear.name for block in skeleton.layout.blocks for linear in block}
    assert "self_attn.q_proj" in names
    assert not [name for name in names if "router" in name or ".experts." in name]
