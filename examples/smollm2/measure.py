"""Measure what pruning by four clients costs a pretrained model, and write a page about it.

    python examples/smollm2/measure.py runs/smollm2/model
    python examples/smollm2/measure.py runs/smollm2/model --texts TEXTS --clients bible manpages pgdocs pycode

TEXTS holds a folder for each domain with calib.txt and test.txt; without it the bundled texts are used. Every domain is
measured, whether a client holds it or not. This takes hours on two cores. The same command resumes what was interrupted.
"""

import argparse
import shlex
import shutil
import sys
from pathlib import Path

import yaml
from get_model import continued
from transformers.utils import logging

from fedspallm_appfl import cli
from fedspallm_appfl.algorithms import registry
from fedspallm_appfl.estimates.job import Job
from fedspallm_appfl.estimates.memory import client_memory, serial_memory, server_memory
from fedspallm_appfl.reports.parts import markdown
from fedspallm_appfl.reports.report import bytes_text
from fedspallm_appfl.study.cells import DENSE, Cell, opened
from fedspallm_appfl.study.plan import Plan, parse_method, planned

BUNDLED = Path(__file__).parents[1] / "demo" / "text"
METHODS = [
    f"{name}{more}" for more in ("", "+admm") for name in ("standalone", "fedavg", "fedspallm", "consensus", "gram")
]
SHOWN = ["fedspallm", "gram+admm"]  # their sentences
PLOTS = ("perplexity_sparsity", "perplexity_bytes")
PROMPTS = (
    "The most important thing about the sea is",
    "In order to sort a list of numbers, you should",
    "Once upon a time there was a king who",
)


def options() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="what get_model.py has made")
    parser.add_argument("--title", default="SmolLM2-135M-Instruct", help="the model's name, for the page")
    parser.add_argument("--texts", type=Path, default=BUNDLED, help="folder of domains with calib.txt and test.txt")
    parser.add_argument("--clients", nargs="+", default=["austen", "bible", "csource", "sqldocs"], metavar="DOMAIN")
    parser.add_argument("--sparsity", nargs="+", default=["0.5", "0.6", "0.7", "2:4"], metavar="TARGET")
    parser.add_argument("--algorithms", nargs="+", default=METHODS, metavar="NAME", help="as for fedspallm study")
    parser.add_argument("--length", type=int, default=512, help="tokens in a window")
    parser.add_argument("--windows", type=int, default=16, help="calibration windows a client")
    parser.add_argument("--evaluation-windows", type=int, default=10, metavar="N", help="windows of each text")
    parser.add_argument("--batch", type=int, default=4, help="windows in a forward pass; a large vocabulary wants few")
    parser.add_argument("--dtype", default="auto", help="arithmetic: auto (as stored) or float32")
    parser.add_argument("--out", type=Path, default=Path("runs/real"), help="the folder of the study")
    parser.add_argument("--page", type=Path, default=Path("runs/smollm2/results.md"), help="the page to write")
    return parser.parse_args()


def experiment(asked: argparse.Namespace) -> Path:
    """Write the configuration of the experiment beside the study's folder; returns the file."""
    domains = sorted(file.parent.name for file in asked.texts.glob("*/test.txt"))
    texts = {name: str((asked.texts / name / "test.txt").resolve()) for name in domains}
    clients = {name: str((asked.texts / name / "calib.txt").resolve()) for name in asked.clients}
    config = {
        "run_dir": str(asked.out),
        "model": {"path": str(asked.model), "dtype": asked.dtype},
        "client_configs": {"data": {"windows": asked.windows, "length": asked.length, "batch": asked.batch}},
        "clients": [{"client_id": name, "data": {"text": text}} for name, text in clients.items()],
        "evaluation": {
            "texts": texts,
            "length": asked.length,
            "windows": asked.evaluation_windows,
            "batch": asked.batch,
        },
    }
    file = asked.out.with_name(f"{asked.out.name}.yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(config, sort_keys=False), "utf-8")
    return file


def geometric_means(cells: dict[tuple[str, str, int], Cell], asked: argparse.Namespace, seed: int) -> str:
    """The geometric mean over all texts: methods by targets, and bits that a client sends for a weight."""
    ends = list(dict.fromkeys((asked.sparsity[0], asked.sparsity[-1])))
    dense = f"{cells[DENSE, '', 0].mean:.2f}"
    rows = [[DENSE, *[dense] * len(asked.sparsity), *[""] * len(ends)]]
    for method in asked.algorithms:
        row = {target: cells[method, target, seed] for target in asked.sparsity}
        sends = registry.find(parse_method(method).algorithm).federates
        sent = [f"{row[target].bits_up:.2f}" if sends else "" for target in ends]
        rows.append([method, *(f"{cell.mean:.2f}" for cell in row.values()), *sent])
    return markdown(["", *asked.sparsity, *(f"bits up, {target}" for target in ends)], rows)


def memory(plan: Plan, cells: dict[tuple[str, str, int], Cell]) -> str:
    """The peak of the process beside what `fedspallm estimate` says, for the first target."""
    target, seed = plan.targets[0], plan.seeds[0]
    rows = []
    for method in plan.methods:
        cell = cells[method.name, str(target), seed]
        if cell.stored or cell.run_of or cell.memory_bytes is None:
            continue
        job = Job.of(plan.experiment(method, target, seed))
        together = serial_memory(job).resident
        apart = [client_memory(job, job.clients[0]).resident, server_memory(job).resident]
        ratio = f"{cell.memory_bytes / together:.2f}"
        rows.append([method.name, *map(bytes_text, (cell.memory_bytes, together)), ratio, *map(bytes_text, apart)])
    head = ["", "measured", "estimated", "ratio", "a client alone, estimated", "the server alone, estimated"]
    return markdown(head, rows)


def sentences(plan: Plan, model: Path) -> str:
    """What the dense model and pruned ones make of a few prompts."""
    folders = {DENSE: model}
    for method, target, seed in ((m, t, plan.seeds[0]) for m in plan.methods for t in plan.targets):
        folder = Path(plan.experiment(method, target, seed).run_dir) / "model"
        if (folder / "config.json").is_file():
            folders[f"{method.name}, {target}"] = folder
    parts = []
    for prompt in PROMPTS:
        said = {name: continued(folder, prompt).removeprefix(prompt) for name, folder in folders.items()}
        rows = [[name, text.replace("|", "\\|")] for name, text in said.items()]
        parts += [f"**{prompt}** ...", markdown(["", "continued"], rows).replace("---:", "---")]
    return "\n\n".join(parts)


def page(plan: Plan, asked: argparse.Namespace) -> str:
    """The page, from the study's folder."""
    with opened(plan.out, plan.settings()) as file:
        cells = file.cells
    job = Job.of(plan.experiment(plan.methods[0], plan.targets[0], plan.seeds[0]))
    prunable = sum(job.model.entries(block) for block in range(len(job.model.blocks)))
    size = sum(file.stat().st_size for file in asked.model.glob("*.safetensors"))
    whose = "the bundled texts" if asked.texts == BUNDLED else "texts that the repository does not hold"
    tables = (plan.out / "study.md").read_text("utf-8").split("\n## ")[1:]
    measured = [f"### {table}" for table in tables]
    words = [
        "python",
        "examples/smollm2/measure.py",
        *("TEXTS" if word == str(asked.texts) else word for word in sys.argv[1:]),
    ]
    pictures = [f"![{name.replace('_', ' against ')}](images/real_{name}.png)" for name in PLOTS]
    return "\n\n".join(
        [
            "# A pretrained model",
            f"{asked.title} ([how to get it](../examples/smollm2/README.md)): {len(job.model.blocks)} blocks of "
            f"width {job.model.hidden}, {prunable / 1e6:.0f} M prunable weights, {bytes_text(size)} on disk before and "
            f"after pruning. {len(asked.clients)} clients, {', '.join(asked.clients)}, with {whose}; "
            f"{asked.windows} windows of {asked.length} tokens a client; perplexity on the first "
            f"{asked.evaluation_windows} windows of {asked.length} tokens of each text. One seed.",
            f"    {shlex.join(words)}",
            "## Geometric mean of the perplexities",
            geometric_means(cells, asked, plan.seeds[0]),
            "A method without `+` prunes with SparseGPT. `standalone` is the geometric mean over the clients' own models. "
            "Bits up are those that a client sends for a prunable weight, which has 16.",
            *pictures,
            "## Memory",
            "The peak of the one process that ran server and clients, above what it held when the cell began, beside what "
            f"`fedspallm estimate` says of it, at {plan.targets[0]}. The estimate does not count the tokenizer and what it "
            "makes of the texts:",
            memory(plan, cells),
            "## Sentences",
            "The likeliest token each time, 40 of them:",
            sentences(plan, asked.model),
            "## Each target",
            *(part.rstrip() for part in measured),
        ]
    )


def main() -> int:
    """Do what the command line asks."""
    asked = options()
    logging.disable_progress_bar()
    file, keep = experiment(asked), [name for name in SHOWN if name in asked.algorithms]
    choice = [
        "--algorithms",
        *asked.algorithms,
        "--sparsity",
        *asked.sparsity,
        "--out",
        str(asked.out),
        "--share-uploads",
    ]
    failed = cli.main(["study", str(file), *choice, *(["--keep-models", *keep] if keep else [])])
    if failed:
        return failed
    plan, _ = planned(file, [], asked.algorithms, asked.sparsity, out=asked.out, share_uploads=True)
    images = asked.page.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    for name in PLOTS:
        shutil.copyfile(asked.out / f"{name}.png", images / f"real_{name}.png")
    asked.page.write_text(page(plan, asked) + "\n", "utf-8")
    print(f"page    {asked.page}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
