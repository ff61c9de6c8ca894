"""Which models can be run block by block, seen without weights; and linears whose inputs nobody can see."""

import pytest
import torch
import transformers as t
from torch import nn
from transformers import AutoModelForCausalLM

from fedspallm_appfl.errors import ConfigError, ModelError
from fedspallm_appfl.models.choice import choose, left_dense
from fedspallm_appfl.models.layout import find_layout
from fedspallm_appfl.models.lazy_model import LazyModel, Skeleton
from fedspallm_appfl.models.perplexity import perplexities
from fedspallm_appfl.models.probe import probe
from fedspallm_appfl.settings.schema import Prune, Pruning
from fedspallm_appfl.tensors.target import parse_target
from helpers.families import save_family, windows
from helpers.rounds import prune_blocks

SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
OTHERS = {
    "openai-gpt": lambda: t.OpenAIGPTConfig(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64),  # lists
    "bamba": lambda: t.BambaConfig(  # two values, and two kinds of block
        **SIZES, **MAMBA, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, attn_layer_indices=[1]
    ),
    "mamba": lambda: t.MambaConfig(**SIZES, state_size=8),  # the weight of dt_proj is used without a call
    "rwkv": lambda: t.RwkvConfig(**SIZES, attention_hidden_size=32, intermediate_size=48, context_length=64),
}


def save(name, folder):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(OTHERS[name](), dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["openai-gpt", "bamba", "mamba"])
def test_blocks_that_return_lists_or_several_values_run_one_by_one_as_the_whole_model_does(name, tmp_path):
    folder, ids = save(name, tmp_path), windows()
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder).eval()(input_ids=ids, use_cache=False).logits[:, :-1]
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).exp()
    lazy = LazyModel(str(folder))
    assert perplexities(lazy, {"text": ids}, batch=4)["text"] == pytest.approx(float(expected), rel=1e-5)
    pruned = dict(prune_blocks(lazy, ids, {0, 1}, Pruning("sparsegpt", parse_target(0.5))))
    assert all(pruned[block].keys() == {one.name for one in lazy.layout.blocks[block]} for block in (0, 1))


def test_a_linear_whose_weight_is_used_without_a_call_stays_dense_and_is_named(tmp_path):
    skeleton = Skeleton(str(save("mamba", tmp_path)))
    assert [one.name for one in skeleton.layout.blocks[0]] == ["mixer.in_proj", "mixer.x_proj", "mixer.out_proj"]
    why = {one.name: one.why for one in left_dense(skeleton.model, skeleton.found, skeleton.layout)[1]}
    assert "never called" in why["mixer.dt_proj.weight"]
    assert why["mixer.A_log"] == "MambaMixer, no linear"


def test_blocks_that_carry_state_are_refused_by_name(tmp_path):
    with pytest.raises(ModelError, match=r"RwkvForCausalLM \(model type rwkv\) is not supported: .* carry state"):
        Skeleton(str(save("rwkv", tmp_path)))


class Block(nn.Module):
    def __init__(self, experts=1):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(experts))

    def forward(self, hidden, bias=None):
        return self.experts[0](hidden), hidden.mean()


class Model(nn.Module):
    """A model of two blocks whose hidden states go through `between`."""

    def __init__(self, between, experts=1):
        super().__init__()
        self.layers = nn.ModuleList(Block(experts) for _ in range(2))
        self.between, self.config = between, t.PretrainedConfig()
        self.model, self.blocks, self.layout = self, self.layers, find_layout(self)

    def forward(self, input_ids, use_cache):
        hidden, extra = input_ids.float().unsqueeze(-1).expand(*input_ids.shape, 4), None
        for block in self.layers:
            hidden, extra = self.between(block, hidden, extra)


def test_an_expert_that_no_token_reaches_is_no_linear_without_a_call():
    found = probe(Model(lambda block, hidden, extra: block(hidden), experts=3), 96)
    assert found.returns == (2, 2)
    assert not found.uncalled


@pytest.mark.parametrize(
    ("between", "says"),
    [
        (lambda block, hidden, extra: block(hidden / 2), "changes hidden states between blocks 0 and 1"),
        (lambda block, hidden, extra: block(hidden, extra), "carry state: what block 0 returns goes into block 1"),
        (lambda block, hidden, extra: block(hidden[..., :3]), r"block 0 \(Block\) fails: RuntimeError"),
        (lambda block, hidden, extra: (*block(hidden), 0), "does not run without weights: ValueError"),
    ],
)
def test_what_cannot_be_replayed_is_refused_with_the_reason(between, says):
    with pytest.raises(ModelError, match=says):
        probe(Model(between), 96)


def test_code_of_a_block_that_fails_in_a_run_names_the_block(tmp_path, monkeypatch):
    model = LazyModel(str(save_family("llama", tmp_path)))
    monkeypatch.setattr(model.blocks[1].mlp, "forward", lambda hidden: {}["gone"])
    with pytest.raises(ModelError, match=r"block 1 \(LlamaDecoderLayer\) fails: KeyError: 'gone'"):
        list(prune_blocks(model, windows(), {2}, Pruning("wanda", parse_target(0.5))))


@pytest.mark.parametrize(
    ("prune", "says"),
    [
        (Prune(["self_atn"]), "prune.include: 'self_atn' means no matrix; did you mean self_attn"),
        (Prune(ignore=["blocks.3"]), "prune.ignore: 'blocks.3' goes beyond the last block, 2"),
        (Prune(["lm_head"]), "prune.include: 'lm_head' means no matrix"),
        (Prune(["0"], ["self_attn", "mlp"]), "leave no matrix to prune"),
    ],
)
def test_a_choice_of_nothing_is_refused(tmp_path, prune, says):
    with pytest.raises(ConfigError, match=says):
        Skeleton(str(save_family("llama", tmp_path)), prune=prune)


def test_ignored_linears_are_none_of_the_layout(tmp_path):
    skeleton = Skeleton(str(save_family("llama", tmp_path)))
    chosen = choose(skeleton.found, Prune(["mlp", "2"], ["0", "*.up_proj", "lm_head"]), skeleton.model)
    mlp, attention = ["mlp.gate_proj", "mlp.down_proj"], [f"self_attn.{one}_proj" for one in "qkvo"]
    assert [[one.name for one in block] for block in chosen.blocks] == [[], mlp, attention + mlp]
    assert list(chosen.pruned) == [1, 2]
