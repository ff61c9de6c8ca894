"""`python -m benchmarks.gpu [--rehearse] [--out FOLDER]`: check and measure the package on one GPU, in about eight minutes.

First the tests that need a GPU, and the demo on both devices; then what a client and a server do with matrices of
LLaMA-2-7B. Rates stand beside what the card reaches in a plain product and a plain copy. `--rehearse` does all of it with
small shapes on the CPU, so that the program itself can be tested where there is no card.
"""

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.children import ROOT
from benchmarks.models import random_windows, save_llama
from benchmarks.reference.sparsegpt import SparseGPT
from benchmarks.tables import Table
from benchmarks.uploads import SEVEN_B, SMALL, one_block, upload
from fedspallm_appfl.estimates.memory import pruning_bytes
from fedspallm_appfl.models.lazy_model import LazyModel
from fedspallm_appfl.pruning import triton_block
from fedspallm_appfl.pruning.registry import prepare
from fedspallm_appfl.pruning.statistics import InputGram
from fedspallm_appfl.rounds.folds.context import Context
from fedspallm_appfl.rounds.pruning import prune_blocks
from fedspallm_appfl.rounds.server import GlobalModel
from fedspallm_appfl.rounds.source import Source
from fedspallm_appfl.settings.schema import ClientSettings, OwnData, Pruning, ServerSettings
from fedspallm_appfl.tensors.sparsity import by_digits
from fedspallm_appfl.tensors.target import parse_target

CLIENTS = 16
LONGEST = 240  # seconds of one command


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        device: where.
        square: side of the plain product, and bytes of the plain copy.
        matrices: (O, I) that are solved.
        tokens: of a Gram matrix.
        select: entries among which some are chosen.
        shapes: linears of the block.
        block: hidden size, MLP, vocabulary, windows, tokens in a window.
        demo: windows of a client, and of a text of the evaluation.
    """

    device: str
    square: int
    matrices: tuple[tuple[int, int], ...]
    tokens: int
    select: tuple[int, ...]
    shapes: dict[str, tuple[int, int]]
    block: tuple[int, int, int, int, int]
    demo: int


CARD = Sizes(
    "cuda",
    8192,
    ((4096, 4096), (11008, 4096), (4096, 11008)),
    16384,
    (128 * 4096, 4096 * 11008),
    SEVEN_B,
    (4096, 11008, 1024, 128, 2048),
    64,
)
REHEARSAL = Sizes("cpu", 128, ((64, 64), (64, 128)), 256, (128 * 64,), SMALL, (64, 128, 1024, 2, 32), 2)


def main() -> int:
    """Run everything; returns 1 if something failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="small shapes on the CPU")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), metavar="FOLDER", help="default: runs/bench")
    options = parser.parse_args()
    if not (options.rehearse or torch.cuda.is_available()):
        sys.stderr.write("error: no CUDA device can be seen here; --rehearse runs small shapes on the CPU\n")
        return 2
    sizes, failed, parts = REHEARSAL if options.rehearse else CARD, [], [f"# {_card(options.rehearse)}\n"]
    with tempfile.TemporaryDirectory() as scratch:
        for step in (tests, demo, plain, gram, solve, select, block, folding):
            started = time.monotonic()
            try:
                table = step(sizes, Path(scratch))
            except Exception as error:  # noqa: BLE001 - the other steps say something still
                failed.append(step.__name__)
                table = Table(step.__name__, ("failed",), [(f"{type(error).__name__}: {error}".splitlines()[0],)])
            table.notes.append(f"{time.monotonic() - started:.0f} s")
            parts.append(table.markdown())
            print(parts[-1], flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu.md").write_text("\n".join(parts), "utf-8")
    return int(bool(failed))


def _card(rehearsed: bool) -> str:
    if rehearsed:
        return "A rehearsal on the CPU: the figures mean nothing"
    facts = torch.cuda.get_device_properties(0)
    memory = f"{facts.total_memory / 1e9:.0f} GB"
    return f"{facts.name}, {memory}, {facts.multi_processor_count} multiprocessors, torch {torch.__version__}"


def seconds(work: Callable[[], Any], device: str, turns: int = 3) -> float:
    """The shortest of some turns, of which the first, that compiles, does not count."""
    work()
    found = []
    for _ in range(turns):
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        found.append(time.perf_counter() - started)
    return min(found)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _tera(operations: float, of: float) -> str:
    return f"{operations / of / 1e12:.1f} TFLOP/s"


def tests(sizes: Sizes, scratch: Path) -> Table:
    """The tests that need a GPU."""
    if sizes.device == "cpu":
        return Table("Tests", ("not on a CPU",))
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "gpu", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LONGEST, check=False)
    if done.returncode:
        raise RuntimeError(f"tests failed: {done.stdout[-2000:]}")
    return Table("Tests that need a GPU", ("result",), [(done.stdout.strip().splitlines()[-1],)])


def demo(sizes: Sizes, scratch: Path) -> Table:
    """The demo on the CPU and on the device: perplexities and seconds."""
    table, words = Table("Demo", ("device", "seconds", "mean perplexity", "zeros")), []
    for device in dict.fromkeys(("cpu", sizes.device)):
        words = [f"run_dir={scratch / device}", "server_configs.device=" + device, "evaluation.device=" + device]
        words += ["client_configs.train_configs.device=" + device, "evaluation.compare=[]"]
        words += [f"evaluation.windows={sizes.demo}", f"client_configs.data.windows={sizes.demo}"]
        command = [sys.executable, "-m", "fedspallm_appfl", "run", str(ROOT / "configs/demo.yaml"), *words]
        started = time.monotonic()
        subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LONGEST, check=True)
        spent = time.monotonic() - started
        events = [json.loads(line) for line in (scratch / device / "metrics.jsonl").read_text().splitlines()]
        last = [event["perplexity"] for event in events if event["event"] == "evaluation"][-1]
        zeros = json.loads((scratch / device / "manifest.json").read_text())["zeros"]
        table.add(device, spent, sum(last.values()) / len(last), zeros)
    return table


def plain(sizes: Sizes, scratch: Path) -> Table:
    """What the card does at its best: products of square matrices, and copies."""
    table, side = Table("The card", ("what", "rate")), sizes.square
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        one = torch.randn(side, side, device=sizes.device).to(dtype)
        table.add(f"product, {str(dtype)[6:]}", _tera(2 * side**3, seconds(lambda one=one: one @ one, sizes.device)))
    data = torch.empty(side, side, device=sizes.device)
    table.add("copy on the card", f"{2 * data.nbytes / seconds(data.clone, sizes.device) / 1e9:.0f} GB/s")
    here = torch.empty(side, side)
    taking = seconds(lambda: here.to(sizes.device, copy=True), sizes.device)
    table.add("copy from the host", f"{here.nbytes / taking / 1e9:.1f} GB/s")
    return table


def gram(sizes: Sizes, scratch: Path) -> Table:
    """Gram matrices of half-precision inputs, against products in float32 and tf32."""
    table = Table("Gram matrix", ("features", "inputs", "seconds", "rate, as a whole product", "error"))
    for features in sorted({shape[1] for shape in sizes.matrices}):
        rows = torch.randn(sizes.tokens, features, device=sizes.device).half()
        exact = rows[:, :64].double().T @ rows.double()
        for name, inputs, tf32 in (
            ("float16", rows, False),
            ("float32", rows.float(), False),
            ("tf32", rows.float(), True),
        ):
            torch.backends.cuda.matmul.allow_tf32 = tf32
            made = InputGram(features, sizes.device)
            spent = seconds(lambda made=made, inputs=inputs: made.add(inputs), sizes.device)
            fresh = InputGram(features, sizes.device)
            fresh.add(inputs)
            off = float((fresh.upper[:64].triu().double() - exact.triu()).norm() / exact.triu().norm())
            table.add(features, name, spent, _tera(2 * sizes.tokens * features**2, spent), f"{off:.1e}")
        torch.backends.cuda.matmul.allow_tf32 = False
    table.notes.append(
        "Error: of 64 rows, relative, against float64. The package takes half-precision inputs as they are."
    )
    return table


def solve(sizes: Sizes, scratch: Path) -> Table:
    """SparseGPT of one matrix, from its Gram matrix: the Triton kernel, the loop in torch, and the authors' algorithm."""
    table = Table(
        "SparseGPT, one matrix", ("shape", "target", "seconds", "loop in torch", "authors' algorithm", "same mask")
    )
    for rows, features in sizes.matrices:
        weight = 0.02 * torch.randn(rows, features, device=sizes.device)
        inputs = torch.randn(sizes.tokens, features, device=sizes.device)
        inputs += 0.5 * inputs.roll(1, 1)
        base = InputGram(features, sizes.device)
        base.add(inputs)
        for text in ("0.5", "2:4"):
            job = _solving(weight, base, text)
            ours, mask = seconds(job, sizes.device), job()
            usual, triton_block.available = triton_block.available, lambda: False
            try:
                loop, other = seconds(job, sizes.device, 1), job()
            finally:
                triton_block.available = usual
            theirs = seconds(_reference(weight, inputs, text), sizes.device, 1)
            same = f"{100 * float((mask == other).float().mean()):.3f} %"
            table.add(f"{rows} x {features}", text, ours, loop, theirs, same)
        del weight, inputs, base
    return table


def _solving(weight: Tensor, base: InputGram, text: str) -> Callable[[], Tensor]:
    settings = Pruning("sparsegpt", parse_target(text))
    return lambda: prepare(settings, InputGram.of(base.upper.clone(), base.tokens)).prune(weight)[1]


def _reference(weight: Tensor, inputs: Tensor, text: str) -> Callable[[], None]:
    made = SparseGPT(weight)
    made.add(inputs.unsqueeze(0))
    return lambda: copy.deepcopy(made).prune(**({"share": 0.5} if text == "0.5" else {"pattern": (2, 4)}))


def select(sizes: Sizes, scratch: Path) -> Table:
    """The score of a rank: `torch.kthvalue`, sorting, and counting digits."""
    table = Table("Selection, half of the entries", ("entries", "kthvalue", "sort", "topk", "digits"))
    for entries in sizes.select:
        scores = torch.rand(entries, device=sizes.device)
        rank = entries // 2
        ways = (
            lambda scores=scores, rank=rank: scores.kthvalue(rank),
            lambda scores=scores: scores.sort(),
            lambda scores=scores, rank=rank: scores.topk(rank, largest=False, sorted=False),
            lambda scores=scores, rank=rank: by_digits(scores, rank),
        )
        table.add(entries, *(seconds(way, sizes.device) for way in ways))
    return table


def block(sizes: Sizes, scratch: Path) -> Table:
    """One block by one client, two passes and pruning, with all of its tokens."""
    hidden, mlp, vocabulary, windows, length = sizes.block
    folder = save_llama(scratch / "block", hidden, mlp, 1, vocabulary, torch.float16)
    dtype = "float16" if sizes.device == "cuda" else "float32"
    table = Table(
        f"One block, {hidden} / {mlp}, {windows} x {length} tokens, {dtype}",
        ("pruner", "seconds", "rate of two passes", "most memory", "estimate of pruning alone"),
    )
    ids, entries = random_windows(windows, length, vocabulary), sum(rows * columns for rows, columns in _linears(sizes))
    for pruner in ("sparsegpt", "wanda", "admm"):
        model = LazyModel(str(folder), dtype=dtype, device=sizes.device)
        settings = Pruning(pruner, parse_target("0.5"))
        told = ClientSettings(**vars(settings), client_id="card", data=OwnData(batch=4))
        for _ in range(2):  # the first turn compiles
            if sizes.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            _wait(sizes.device)
            started = time.perf_counter()
            for _, made in prune_blocks(Source(model, ids, told, (), {}, {}), {0}, None):
                del made
            _wait(sizes.device)
            spent = time.perf_counter() - started
        most = torch.cuda.max_memory_allocated() if sizes.device == "cuda" else 0
        table.add(
            pruner,
            spent,
            _tera(4 * windows * length * entries, spent),
            f"{most / 1e9:.1f} GB",
            _estimated(folder, settings),
        )
    table.notes.append(
        "Most memory holds the hidden states of all windows; the rate is of the products with weights alone."
    )
    return table


def _linears(sizes: Sizes) -> Iterator[tuple[int, int]]:
    hidden, mlp = sizes.block[:2]
    yield from [(hidden, hidden)] * 4 + [(mlp, hidden)] * 3


def _estimated(folder: Path, settings: Pruning) -> str:
    from fedspallm_appfl.estimates.job import open_outline
    from fedspallm_appfl.settings.schema import Model, TrainConfigs

    train = TrainConfigs(pruner=settings.pruner)
    return f"{pruning_bytes(open_outline(Model(str(folder))), train, 0, 1) / 1e9:.1f} GB"


def folding(sizes: Sizes, scratch: Path) -> Table:
    """The uploads of 16 clients of one block: folding them, and closing the block."""
    uploads = [upload(sizes.shapes, seed) for seed in range(2)]
    made = Context(
        one_block(sizes.shapes), torch.float16, ServerSettings(screening="off"), scratch, sizes.device, _no_dense
    )
    server = GlobalModel(made)
    server.begin_round(0, {f"client-{number}": [0] for number in range(CLIENTS)})
    size, spent = sum(part.nbytes for part in _tensors(uploads[0])), []
    for number in range(CLIENTS):
        _wait(sizes.device)
        started = time.perf_counter()
        server.receive(f"client-{number}", uploads[number % 2], 1)
        _wait(sizes.device)
        spent.append(time.perf_counter() - started)
    table = Table(f"{CLIENTS} uploads of a block on the server", ("what", "seconds", "rate"))
    usual = sorted(spent[1:-1])[len(spent) // 2 - 1]
    table.add("one upload", usual, f"{size / usual / 1e9:.2f} GB/s")
    table.add("the last one, with the result", spent[-1], "")
    return table


def _no_dense(block: int, name: str) -> Tensor:
    raise RuntimeError("these uploads bring their values, so the server needs no dense weights")


def _tensors(part: Any) -> Iterator[Tensor]:
    if isinstance(part, Tensor):
        yield part
    for one in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        yield from _tensors(one)


if __name__ == "__main__":
    sys.exit(main())
