"""Whole runs in a fraction of a second: a random LLaMA of three narrow blocks that takes the tokens of the bundled one."""

import json
from pathlib import Path

import torch
import transformers as t
import yaml
from safetensors.torch import load_file

from fedspallm_appfl.cli import main
from helpers.experiments import DOMAINS, first_pages, merge
from helpers.paths import DEMO

HIDDEN, WIDE, BLOCKS = 32, 48, 3
INPUTS = {"self_attn.q_proj": HIDDEN, "self_attn.o_proj": HIDDEN, "mlp.gate_proj": HIDDEN, "mlp.down_proj": WIDE}


def save_tiny(folder: Path, dtype: torch.dtype = torch.float16, blocks: int = BLOCKS) -> Path:
    """Save the model with the tokenizer of the bundled one."""
    vocabulary = json.loads((DEMO / "model" / "config.json").read_text())["vocab_size"]
    config = t.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=WIDE,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model = t.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((DEMO / "model" / file).read_bytes())
    return folder


def tiny_config(folder: Path, model: Path, algorithm: str, count: int = 3, **changes) -> Path:
    """Write a configuration; clients have unequal numbers of windows, all together and each alone enough for any input."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "run_dir": str(folder / "run"),
        "algorithm": algorithm,
        "model": {"path": str(model), "dtype": "float32"},
        "client_configs": {
            "train_configs": {"threads": 1, "device": "cpu"},
            "data": {"windows": 6, "length": 24, "batch": 4},
        },
        "server_configs": {"device": "cpu"},
        "clients": [
            {"client_id": name, "data": {"text": str(first_pages(name)), "windows": 6 + number}}
            for number, name in enumerate(DOMAINS[:count])
        ],
    }
    merge(config, changes)
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def run(config: Path, *overrides: str) -> Path:
    """Run it; returns its run_dir."""
    assert main(["run", str(config), *overrides]) == 0
    return config.parent / "run"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of `model/` in a folder."""
    return load_file(folder / "model" / "model.safetensors")


def linears(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The prunable ones."""
    return {name: tensor for name, tensor in tensors.items() if "_proj" in name}


def events(folder: Path, kind: str) -> list[dict]:
    """Events of a kind, in order."""
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [event for event in found if event["event"] == kind]
