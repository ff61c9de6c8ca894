"""Tiny random instances of the model families, saved as the user's folders would be."""

from pathlib import Path

import torch
import transformers as t

SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "max_position_embeddings": 64}
HEADS = {"num_attention_heads": 4, "intermediate_size": 48}
GROUPED = {**SIZES, **HEADS, "num_key_value_heads": 2, "head_dim": 8}

FAMILIES = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**GROUPED, tie_word_embeddings=False)),
    "llama-tied": lambda: t.LlamaForCausalLM(t.LlamaConfig(**GROUPED, tie_word_embeddings=True)),
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**GROUPED, sliding_window=8)),
    "qwen2": lambda: t.Qwen2ForCausalLM(
        t.Qwen2Config(
            **{k: v for k, v in GROUPED.items() if k != "head_dim"},
            use_sliding_window=True,
            sliding_window=8,
            max_window_layers=1,
        )
    ),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**GROUPED)),
    "opt": lambda: t.OPTForCausalLM(
        t.OPTConfig(**SIZES, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=True)
    ),
    "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=64)),
    "gpt-neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**SIZES, **HEADS, rotary_pct=0.5)),
}

EXPERTS = {**GROUPED, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MIXTURES = {
    "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**GROUPED, num_local_experts=4)),
    "qwen2-moe": lambda: t.Qwen2MoeForCausalLM(
        t.Qwen2MoeConfig(**EXPERTS, num_experts=4, shared_expert_intermediate_size=24)
    ),
    "gpt-oss": lambda: t.GptOssForCausalLM(t.GptOssConfig(**GROUPED, num_local_experts=4, pad_token_id=0)),
    "granite-moe": lambda: t.GraniteMoeForCausalLM(
        t.GraniteMoeConfig(**{k: v for k, v in GROUPED.items() if k != "head_dim"}, num_local_experts=4)
    ),
}
REFUSED = {
    "llama4": lambda: t.Llama4ForCausalLM(
        t.Llama4TextConfig(**GROUPED, intermediate_size_mlp=48, num_local_experts=4, pad_token_id=0)
    ),
}


def save_family(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Save a random instance with biases and norms that are not trivial."""
    torch.manual_seed(len(name))
    model = (FAMILIES | MIXTURES | REFUSED)[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    return folder


def windows(count: int = 6, length: int = 24) -> torch.Tensor:
    """Random token ids, (count, length)."""
    return torch.randint(0, 96, (count, length), generator=torch.Generator().manual_seed(1))
