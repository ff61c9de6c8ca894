"""Random LLaMA models and random text: speed does not depend on what a model knows."""

import shutil
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from benchmarks.children import ROOT

DEMO = ROOT / "examples" / "demo"


def save_llama(
    folder: Path, hidden: int, mlp: int, blocks: int, vocabulary: int, dtype: torch.dtype = torch.float32
) -> Path:
    """Save a random LLaMA with heads of 64 (fewer features where it is narrower than that)."""
    disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=blocks,
        num_attention_heads=max(1, hidden // 64),
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


def add_demo_tokenizer(folder: Path) -> Path:
    """Give a model of 1024 tokens or more the tokenizer of the bundled model, so that it can read text."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "model" / name, folder)
    return folder


def random_windows(count: int, length: int, vocabulary: int) -> Tensor:
    """Random token ids, (count, length) int64."""
    return torch.randint(0, vocabulary, (count, length), generator=torch.Generator().manual_seed(1))


def correlated(rows: int, features: int, seed: int = 0) -> Tensor:
    """Inputs whose features depend on each other, as those of a real layer do, (rows, features) float32."""
    generator = torch.Generator().manual_seed(seed)
    rank = max(1, features // 8)
    shared = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, features, generator=generator)
    return shared / rank**0.5 + torch.randn(rows, features, generator=generator)


def random_mask(shape: tuple[int, int], zeros: int, seed: int) -> Tensor:
    """A random mask with an exact number of zeros, (O, I) bool, True = kept."""
    scores = torch.rand(shape[0] * shape[1], generator=torch.Generator().manual_seed(seed))
    mask = scores > scores.kthvalue(zeros).values if zeros else torch.ones_like(scores, dtype=torch.bool)
    mask[(~mask).nonzero().flatten()[zeros:]] = True  # scores may be equal
    return mask.view(shape)
