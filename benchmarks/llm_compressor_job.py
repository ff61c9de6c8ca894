"""The same job by llm-compressor, under the interpreter that has it: see `jobs` for arguments and result.

llm-compressor wants a processor even for tokens, so it gets a tokenizer of one word.
"""

import json
import sys
import time
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama import modeling_llama  # noqa: F401 - imported late otherwise, and counted with the model

from benchmarks import memory

MODIFIERS = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}


def prune(model: Any, windows: torch.Tensor, pruner: str) -> None:
    """Prune all linears of the blocks to one half, block by block."""
    processor = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"word": 0}, unk_token="word")), pad_token="word"
    )
    ids = windows.tolist()
    oneshot(
        model=model,
        processor=processor,
        dataset=Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}),
        recipe=MODIFIERS[pruner](sparsity=0.5, mask_structure="0:0", ignore=["re:.*lm_head"]),
        pipeline="sequential",
        num_calibration_samples=len(ids),
        max_seq_length=len(ids[0]),
        shuffle_calibration_samples=False,
    )


def main() -> None:
    _, pruner, folder, count, length, vocabulary = sys.argv[1:]
    torch.set_num_threads(1)
    shape = int(count), int(length)
    windows = torch.randint(0, int(vocabulary), shape, generator=torch.Generator().manual_seed(1))
    imports = memory.resident()
    model = AutoModelForCausalLM.from_pretrained(folder)
    loaded = memory.resident()
    memory.reset_peak()
    started = time.process_time()
    prune(model, windows, pruner)
    took = time.process_time() - started
    print(json.dumps({"seconds": took, "imports": imports, "loaded": loaded, "peak": memory.peak()}))


if __name__ == "__main__":
    main()
