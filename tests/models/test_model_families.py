"""Every model family: the lazy model is the real one, and the blockwise sweep is a whole-model oracle's."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from fedspallm_appfl.errors import ModelError, PruningError
from fedspallm_appfl.models.layout import find_layout
from fedspallm_appfl.models.lazy_model import LazyModel, Skeleton
from fedspallm_appfl.models.perplexity import perplexities
from fedspallm_appfl.settings.schema import Pruning
from fedspallm_appfl.tensors.target import parse_target
from fedspallm_appfl.wire.packed import pack
from helpers.families import FAMILIES, save_family, windows
from helpers.oracles import column_blocks, sparsegpt
from helpers.rounds import prune_blocks


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return save_family(request.param, tmp_path_factory.mktemp(request.param))


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_perplexity_block_by_block_is_that_of_the_whole_model(folder):
    ids = windows()
    with torch.no_grad():
        logits = load(folder)(input_ids=ids, use_cache=False).logits[:, :-1]
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).exp()
    got = perplexities(LazyModel(str(folder)), {"text": ids}, batch=4)["text"]
    assert got == pytest.approx(float(expected), rel=1e-5)


def test_a_skeleton_draws_no_weights(folder, monkeypatch):
    """But for those of modules that draw their own when they are made."""
    drawn, normal = [], torch.Tensor.normal_
    monkeypatch.setattr(torch.Tensor, "normal_", lambda *args, **more: drawn.append(1) or normal(*args, **more))
    model = Skeleton(str(folder)).model
    assert len(drawn) == sum(isinstance(module, nn.Embedding | Conv1D) for module in model.modules()) > 0


def whole_model_oracle(folder, ids, share, damping):
    """Prune block after block in a model that is whole in memory, with inputs that hooks catch in full forward passes."""
    model = load(folder)
    blocks = model.get_submodule(find_layout(model).path)
    masks = {}
    for index, block in enumerate(blocks):
        linears = {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear | Conv1D)}
        inputs = {name: [] for name in linears}
        hooks = [
            module.register_forward_pre_hook(lambda m, args, seen=inputs[name]: seen.append(args[0].flatten(0, -2)))
            for name, module in linears.items()
        ]
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        for name, module in linears.items():
            x = torch.cat(inputs[name]).double()
            weight = module.weight.data.T if isinstance(module, Conv1D) else module.weight.data
            pruned, mask = sparsegpt(weight, x.T @ x, column_blocks(*weight.shape, share), damping)
            module.weight.data = (pruned.T if isinstance(module, Conv1D) else pruned).float().contiguous()
            masks[index, name] = pruned, mask
    return masks


def test_the_pruned_model_equals_the_oracles(folder):
    expected = whole_model_oracle(folder, windows(), 0.5, 0.01)
    model, settings = LazyModel(str(folder)), Pruning("sparsegpt", parse_target(0.5))
    got = {
        (block, name): result
        for block, linears in prune_blocks(model, windows(), {0, 1, 2}, settings, batch=4)
        for name, result in linears.items()
    }
    assert got.keys() == expected.keys()
    for key, (weight, mask) in expected.items():
        assert torch.equal(got[key].mask, mask), key
        torch.testing.assert_close(got[key].weight, weight.float(), atol=1e-4, rtol=1e-3)
        assert int((~mask).sum()) == mask.numel() // 2


def test_blocks_are_dense_again_after_a_sweep(folder):
    model, settings = LazyModel(str(folder)), Pruning("magnitude", parse_target(0.5))
    before = perplexities(model, {"text": windows()})
    list(prune_blocks(model, windows(), {0, 2}, settings))
    assert perplexities(model, {"text": windows()}) == before


def test_agreed_blocks_are_used_pruned_in_the_forward_sweep(folder):
    """Pruning block 2 after blocks 0 and 1 were agreed on sees what a sweep over 0, 1, 2 sees."""
    model, settings = LazyModel(str(folder)), Pruning("sparsegpt", parse_target(0.5))
    all_three = dict(prune_blocks(model, windows(), {0, 1, 2}, settings))
    agreed = {b: {n: pack(r.weight, r.mask, torch.float32) for n, r in all_three[b].items()} for b in (0, 1)}
    alone = dict(prune_blocks(model, windows(), {2}, settings, pruned=agreed))
    for name, result in alone[2].items():
        assert torch.equal(result.weight, all_three[2][name].weight), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoints_are_pruned_in_their_own_dtype(dtype, tmp_path):
    model = LazyModel(str(save_family("llama", tmp_path, dtype)))
    results = dict(prune_blocks(model, windows(), {1}, Pruning("sparsegpt", parse_target("2:4"))))[1]
    assert model.dtype == dtype
    for result in results.values():
        assert result.weight.dtype == dtype
        assert (result.mask.view(-1, 4).sum(1) == 2).all()


def test_a_pickled_checkpoint_works(tmp_path):
    folder = save_family("llama-tied", tmp_path)
    expected = perplexities(LazyModel(str(folder)), {"text": windows()})
    whole = load(folder)
    (folder / "model.safetensors").unlink()
    torch.save(whole.state_dict(), folder / "pytorch_model.bin")
    assert perplexities(LazyModel(str(folder)), {"text": windows()}) == expected


def test_a_checkpoint_without_the_base_models_prefix_works(tmp_path):
    folder = save_family("gpt2", tmp_path)
    expected = perplexities(LazyModel(str(folder)), {"text": windows()})
    state = {name.removeprefix("transformer."): tensor for name, tensor in load(folder).state_dict().items()}
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert perplexities(LazyModel(str(folder)), {"text": windows()}) == expected


def test_blocks_that_cannot_be_found_are_an_error_that_names_the_key(tmp_path):
    two = nn.Module()
    two.left = nn.ModuleList(nn.TransformerEncoderLayer(8, 2) for _ in range(2))
    two.right = nn.ModuleList(nn.TransformerEncoderLayer(8, 2) for _ in range(2))
    with pytest.raises(ModelError, match=r"found 2: left, right; set `model.blocks`"):
        find_layout(two)
    assert len(find_layout(two, "right").blocks) == 2
    with pytest.raises(ModelError, match="found none; set `model.blocks`"):
        find_layout(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ModelError, match=r"`model.blocks` is 'middle', .* its lists are left, right"):
        find_layout(two, "middle")


def test_a_weight_tied_to_one_outside_the_blocks_is_not_pruned():
    model = nn.Module()
    model.outer = nn.Linear(4, 4)
    model.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2))
    model.blocks[1][0].weight = model.outer.weight
    layout = find_layout(model)
    assert [[linear.name for linear in block] for block in layout.blocks] == [["0", "1"], ["1"]]


def test_a_folder_that_lacks_weights_says_which(tmp_path):
    folder = save_family("llama", tmp_path)
    state = load(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save({k: v for k, v in state.items() if "q_proj" not in k}, folder / "pytorch_model.bin")
    with pytest.raises(
        ModelError, match=r"lacks 3 weights of LlamaForCausalLM, the first is model.layers.0.self_attn.q"
    ):
        Skeleton(str(folder))


def test_activations_that_are_not_finite_name_client_block_and_linear(tmp_path):
    folder = save_family("llama", tmp_path)
    whole = load(folder)
    whole.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("inf")
    whole.save_pretrained(folder)
    with pytest.raises(PruningError, match=r"client ward, block 1, mlp.down_proj: its inputs hold NaN or infinity"):
        list(
            prune_blocks(LazyModel(str(folder)), windows(), {1, 2}, Pruning("wanda", parse_target(0.5)), client="ward")
        )


def test_nothing_runs_after_the_last_sampled_block(tmp_path):
    model = LazyModel(str(save_family("llama", tmp_path)))
    ran = []
    for index, block in enumerate(model.blocks):
        block.self_attn.register_forward_hook(lambda *_, index=index: ran.append(index))
    list(prune_blocks(model, windows(2), {1}, Pruning("wanda", parse_target(0.5)), batch=2))
    assert ran == [0, 1]
