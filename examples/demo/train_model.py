"""Train the demo's language model from random weights: LLaMA architecture, 1.58 M parameters, two cores, half an hour.

    python examples/demo/train_model.py WORK examples/demo/model
    python examples/demo/train_model.py WORK runs/tiny-opt --architecture opt --steps 1200

`WORK/train/*.txt` comes from `make_text.py`.  A vocabulary of 1024 and many passes of the gradient matter more here than
width: the model has to be good enough that pruning hurts it.  Everything is seeded; two machines agree to rounding.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCABULARY = 1024
WINDOW = 256
BATCH = 16
PEAK_RATE = 3e-3
WARMUP = 50


def train_tokenizer(files: list[Path]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over equal shares of every domain."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    bpe.train_from_iterator((file.read_text("utf-8")[:1_000_000] for file in files), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


def windows(files: list[Path], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """All training tokens of all domains as (windows, WINDOW) int64, domain after domain."""
    rows = []
    for file in files:
        ids = torch.tensor(tokenizer(file.read_text("utf-8"))["input_ids"])
        rows.append(ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW))
    return torch.cat(rows)


def new_opt() -> OPTForCausalLM:
    """Eight blocks of width 128 with ReLU, learned positions, biases and tied embeddings."""
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        word_embed_proj_dim=128,
        ffn_dim=512,
        num_hidden_layers=8,
        num_attention_heads=4,
        max_position_embeddings=512,
        dropout=0.0,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=1,
    )
    return OPTForCausalLM(config)


def new_llama() -> LlamaForCausalLM:
    """Eight blocks of width 128 with grouped-query attention and tied embeddings."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


ARCHITECTURES = {"llama": new_llama, "opt": new_opt}


def rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a fiftieth."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.02 + 0.49 * (1 + math.cos(math.pi * (step - WARMUP) / (steps - WARMUP)))


def train(model: PreTrainedModel, data: torch.Tensor, steps: int) -> None:
    """AdamW over windows in an order drawn anew for each pass."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    order, started = torch.empty(0, dtype=torch.int64), time.monotonic()
    for step in range(steps):
        if len(order) < BATCH:
            order = torch.cat([order, torch.randperm(len(data))])
        rows, order = order[:BATCH], order[BATCH:]
        loss = model(input_ids=data[rows], labels=data[rows]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:5}/{steps}  loss {loss.item():.3f}  {time.monotonic() - started:5.0f} s", flush=True)


def main() -> None:
    """Train and save the model in float16 with its tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder that make_text.py filled")
    parser.add_argument("model", type=Path, help="folder to write the model to")
    parser.add_argument("--steps", type=int, default=2000, help="gradient steps of 16 x 256 tokens")
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="llama")
    args = parser.parse_args()
    torch.manual_seed(0)
    files = sorted((args.work / "train").glob("*.txt"))
    tokenizer = train_tokenizer(files)
    data = windows(files, tokenizer)
    print(f"{data.numel():,} training tokens, {args.steps * BATCH * WINDOW:,} seen", flush=True)
    model = ARCHITECTURES[args.architecture]()
    train(model, data, args.steps)
    model.half().save_pretrained(args.model)
    tokenizer.save_pretrained(args.model)


if __name__ == "__main__":
    main()
