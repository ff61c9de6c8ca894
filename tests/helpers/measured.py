"""A model whose memory can be measured."""

import shutil

from helpers.paths import DEMO

FREED_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": str(2**17)}  # of the environment: glibc gives back all that is freed


def save_measured(folder):
    """Save a model whose tensors outweigh the noise of a process."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 2, "num_attention_heads": 16}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8000, max_position_embeddings=512, **size)).half()
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "model" / name, folder)
