"""Every model family: the lazy model is the real one, and the blockwise sweep is a whole-model oracle's."""

import json
import re
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3Config
from transformers.pytorch_utils import Conv1D

from fedspallm_appfl.errors import ModelError, PruningError
from fedspallm_appfl.models.layout import find_layout
from fedspallm_appfl.models.lazy_model import LazyModel, Skeleton, replaced_attention
from fedspallm_appfl.models.perplexity import perplexities
from fedspallm_appfl.models.storage.checkpoint import allow_code_of
from fedspallm_appfl.settings import custom_code
from fedspallm_appfl.settings.schema import Model, Pruning
from fedspallm_appfl.tensors.target import parse_target
from fedspallm_appfl.wire.packed import pack
from helpers.families import FAMILIES, GROUPED, save_family, windows
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


def test_of_several_towers_the_text_model_is_pruned(tmp_path):
    """A text model beside one for images: blocks, limit and perplexity are those of the text model."""
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={**GROUPED, "num_hidden_layers": 2},
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    lazy, ids = LazyModel(str(tmp_path)), windows()
    assert lazy.layout.path == "model.language_model.layers"
    assert lazy.skeleton.longest_window == 64
    with torch.no_grad():
        logits = load(tmp_path)(input_ids=ids, use_cache=False).logits[:, :-1]
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).exp()
    assert perplexities(lazy, {"text": ids})["text"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "my_wrapper.inner."])
def test_names_with_the_prefix_of_a_wrapper_are_explained(wrapper, tmp_path):
    folder = save_family("llama", tmp_path)
    state = {f"{wrapper}{name}": tensor for name, tensor in load(folder).state_dict().items()}
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ModelError, match=rf"the prefix `{re.escape(wrapper)}` .* without it all of them match: save"):
        Skeleton(str(folder))
    save_file({name.replace(wrapper, ""): t for name, t in state.items()}, folder / "model.safetensors")
    assert Skeleton(str(folder)).find_key("lm_head.weight")


def test_a_model_that_is_called_quantized_is_refused_whatever_its_weights_are(tmp_path):
    folder = save_family("llama", tmp_path)
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match=r"quantization_config \(gptq\).* remove quantization_config from config.json"):
        Skeleton(str(folder))


def test_flash_attention_that_cannot_run_gives_way_to_sdpa(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    folder = save_family("llama", tmp_path)
    expected = perplexities(LazyModel(str(folder)), {"text": windows()})
    change_config(folder, attn_implementation="flash_attention_2")
    lazy = LazyModel(str(folder))
    assert replaced_attention(lazy.model) == "flash_attention_2"
    assert perplexities(lazy, {"text": windows()}) == expected


def with_code(folder):
    """Turn a model into one that needs a class of its own."""
    names = {"AutoConfig": "own_config.Own", "AutoModelForCausalLM": "own_model.OwnModel"}
    change_config(folder, model_type="own", auto_map=names)
    config = "from transformers import LlamaConfig\n\n\nclass Own(LlamaConfig):\n    model_type = 'own'\n"
    model = "from transformers import LlamaForCausalLM\nfrom .own_config import Own\n\n\n"
    (folder / "own_config.py").write_text(config)
    (folder / "own_model.py").write_text(model + "class OwnModel(LlamaForCausalLM):\n    config_class = Own\n")
    return folder


def test_code_of_a_model_folder_runs_only_where_it_is_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("nobody is asked"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.setattr(custom_code, "_allowed", set())
    folder = with_code(save_family("llama", tmp_path / "own"))
    expected = perplexities(LazyModel(str(save_family("llama", tmp_path / "llama"))), {"text": windows()})
    for settings in (Model(path=str(folder)), Model(path=str(tmp_path / "llama"), trust_remote_code=True)):
        allow_code_of(settings)
        with pytest.raises(ModelError, match="needs Python code of its own .* set model.trust_remote_code to true"):
            Skeleton(str(folder))
    assert not (tmp_path / "modules").exists()
    allow_code_of(Model(path=str(folder), trust_remote_code=True))
    lazy = LazyModel(str(folder))
    assert type(lazy.model).__name__ == "OwnModel"
    assert perplexities(lazy, {"text": windows()}) == expected


def change_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


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
    blamed = "block 1, mlp.down_proj: its inputs hold NaN or infinity, because model.layers.1.mlp.up_proj.weight in"
    with pytest.raises(PruningError, match=f"client ward, {blamed}"):
        list(
            prune_blocks(LazyModel(str(folder)), windows(), {1, 2}, Pruning("wanda", parse_target(0.5)), client="ward")
        )


def test_nothing_runs_after_the_last_sampled_block(tmp_path):
    model = LazyModel(str(save_family("llama", tmp_path)))
    ran = []
    for index, block in enumerate(model.blocks):
        block.self_attn.register_forward_hook(lambda *_, index=index: ran.append(index))
    list(prune_blocks(model, windows(2), {1}, Pruning("wanda", parse_target(0.5)), batch=2))
    assert ran == [0, 1, 1]  # a batch of it again, to see how far its outputs have moved
