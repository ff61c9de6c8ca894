"""One whole pruning job in a process of its own: `python -m benchmarks.jobs ours|reference PRUNER MODEL WINDOWS LENGTH`.

The last line is JSON: CPU seconds of the pruning, and resident MB after the imports, after loading, and at most.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama  # noqa: F401 - imported late otherwise, and counted with the model

from benchmarks import memory
from benchmarks.measure import seconds
from benchmarks.models import random_windows
from benchmarks.reference import driver
from fedspallm_appfl.models.lazy_model import LazyModel
from fedspallm_appfl.rounds.pruning import prune_blocks
from fedspallm_appfl.rounds.source import Source
from fedspallm_appfl.settings.schema import ClientSettings


def measured(load: Callable[[], Any], work: Callable[[Any], Any]) -> dict[str, float]:
    """Time and memory of some work on a model."""
    imports = memory.resident()
    model = load()
    loaded = memory.resident()
    memory.reset_peak()
    took = seconds(lambda: work(model))
    return {"seconds": took, "imports": imports, "loaded": loaded, "peak": memory.peak()}


def ours(pruner: str, folder: str, windows: torch.Tensor, blocks: list[int] | None = None) -> dict[str, float]:
    """Prune all blocks, or some; results are dropped as they come, as a client drops them once they are sent."""
    settings = ClientSettings(pruner, client_id="client")  # to one half

    def work(model: LazyModel) -> None:
        assigned = range(len(model.layout.blocks)) if blocks is None else blocks
        for _ in prune_blocks(Source(model, windows, settings), set(assigned)):
            pass

    return measured(lambda: LazyModel(folder), work)


def reference(pruner: str, folder: str, windows: torch.Tensor) -> dict[str, float]:
    """Prune all blocks as the authors' scripts do."""
    return measured(
        lambda: AutoModelForCausalLM.from_pretrained(folder), lambda model: driver.prune(model, windows, pruner, 0.5)
    )


def main() -> None:
    who, pruner, folder, count, length, vocabulary, *blocks = sys.argv[1:]
    torch.set_num_threads(1)
    windows = random_windows(int(count), int(length), int(vocabulary))
    if who == "reference":
        result = reference(pruner, folder, windows)
    else:
        result = ours(pruner, folder, windows, [int(block) for block in blocks] or None)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
