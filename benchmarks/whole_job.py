"""A whole pruning job: seconds and peak memory, against the authors' scheme and against llm-compressor."""

from typing import Any

from benchmarks import children
from benchmarks.context import Context
from benchmarks.measure import interleave
from benchmarks.models import save_llama
from benchmarks.tables import COMPARISON, Table, met

Runs = dict[str, list[dict[str, float]]]
TARGETS = {  # pruner -> (must, aim) against the authors' scheme, and against llm-compressor
    "sparsegpt": ((1.4, 2.6), (1.6, 3.1)),
    "wanda": ((1.3, None), (1.5, None)),
}
MEMORY = (
    *("job", "model", "after imports", "after loading", "peak"),
    *("above imports", "above the model", "scheme : ours", "must", "met"),
)
MISSING = "not installed: make bench-peers"


def run(context: Context) -> list[Table]:
    sizes = (64, 128, 2, 128) if context.quick else (768, 2048, 4, 4096)
    windows = (2, 16) if context.quick else (32, 512)
    folder = save_llama(context.scratch / "model", *sizes)
    model_mb = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6
    times = Table(f"Whole job, LLaMA {sizes[0]} / {sizes[1]}, {sizes[2]} blocks, {windows[0]} x {windows[1]} tokens")
    memory = Table("Whole job, memory in MB", MEMORY)
    for pruner in TARGETS:
        arguments = (pruner, folder, *windows, sizes[3])
        runs = _runs(arguments, 1 if context.quick else 2)
        _add_times(times, pruner, runs)
        _add_memory(memory, pruner, runs, model_mb)
    times.notes.append(
        "CPU seconds of pruning, each job in a process of its own. Models are loaded before; reading the blocks one by one "
        "counts in our time. The aim for SparseGPT is the least that this scheme can take on one core: its two forward "
        "passes are most of it."
    )
    memory.notes.append(
        "`peak` is the high-water mark of the resident set while pruning, in the turn where it was smallest. `above "
        "imports` is all that the job takes, and what the ratio is of. `above the model` is that less the bytes of the "
        "model, for every job: what never holds the whole model may come out below zero. transformers maps the file, so "
        "weights become resident when they are first used and not at loading. Mapped pages that were read count, too."
    )
    return [times, memory]


def _runs(arguments: tuple[Any, ...], turns: int) -> Runs:
    """The results of each job, which take turns."""
    runs: Runs = {"scheme": [], "ours": []}
    variants = [_job(runs["scheme"], "jobs", "reference", *arguments), _job(runs["ours"], "jobs", "ours", *arguments)]
    python = children.peers_python()
    if python:
        runs["llm-compressor"] = []
        variants.append(_job(runs["llm-compressor"], "llm_compressor_job", "llm-compressor", *arguments, python=python))
    interleave(turns, *variants)
    return runs


def _job(results: list[dict[str, float]], module: str, *arguments: Any, **options: str) -> Any:
    """A variant that keeps what its child says."""

    def variant() -> float:
        results.append(children.run(module, *arguments, **options))
        return results[-1]["seconds"]

    return variant


def _seconds(results: list[dict[str, float]]) -> list[float]:
    return [one["seconds"] for one in results]


def _add_times(table: Table, pruner: str, runs: Runs) -> None:
    against_scheme, against_peer = TARGETS[pruner]
    table.compare(f"{pruner}, authors' scheme", _seconds(runs["scheme"]), _seconds(runs["ours"]), *against_scheme)
    if "llm-compressor" in runs:
        peer = _seconds(runs["llm-compressor"])
        table.compare(f"{pruner}, llm-compressor", peer, _seconds(runs["ours"]), *against_peer)
    else:
        table.rows.append((f"{pruner}, llm-compressor", MISSING, *[""] * (len(COMPARISON) - 2)))


def _add_memory(table: Table, pruner: str, runs: Runs, model: float) -> None:
    least = {who: min(results, key=lambda one: one["peak"]) for who, results in runs.items()}
    above = {who: one["peak"] - one["imports"] for who, one in least.items()}
    ratio = above["scheme"] / above["ours"]
    for who, one in least.items():
        numbers = (model, one["imports"], one["loaded"], one["peak"], above[who], above[who] - model)
        verdict = (f"{ratio:.2f}x", "1x", met(ratio, 1.0)) if who == "ours" else ("", "", "")
        table.add(f"{pruner}, {who}", *(f"{number:.0f}" for number in numbers), *verdict)
