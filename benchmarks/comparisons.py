"""What the number of clients, the split of the text, the target and layer sampling do to the pruned model.

    python -m benchmarks.comparisons [GROUP ...] [--out FOLDER]

Each row is a study on the bundled model; docs/comparisons.md has the tables. An hour on one core; a run that was
interrupted goes on.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from fedspallm_appfl import cli

DEMO = Path("configs/demo.yaml")
TEXT = Path("examples/demo/text")
DOMAINS = ("austen", "bible", "csource", "sqldocs")
WINDOWS = 128  # of all clients together
SHARED = ("evaluation.windows=30",)
TRAIN, SERVER = "client_configs.train_configs", "server_configs"


@dataclass(frozen=True)
class Variant:
    """One study.

    Attributes:
        name: what it is called in the table.
        methods: as `fedspallm study --algorithms` takes them.
        targets: sparsities.
        seeds: seeds.
        overrides: changes of the demo's configuration.
        clients: how many; with 4 by domain the configuration stays as it is.
        iid: every client draws from the text of all domains.
    """

    name: str
    methods: tuple[str, ...]
    targets: tuple[str, ...] = ("0.7",)
    seeds: tuple[int, ...] = (0, 1)
    overrides: tuple[str, ...] = ()
    clients: int = 4
    iid: bool = False


def _layers() -> Iterator[Variant]:
    """Layer shares, rounds, sampling and folding."""

    def variant(share: str, rounds: int, sampling: str, fold: str = "latest") -> Variant:
        words = f"share {share}, {rounds} round{'s' * (rounds > 1)}, {sampling}" + (f", {fold}" if rounds > 1 else "")
        changes = (f"{TRAIN}.resource_share={share}", f"{TRAIN}.layer_sampling={sampling}")
        changes += (f"{SERVER}.num_global_epochs={rounds}", f"{SERVER}.aggregator_kwargs.fold={fold}")
        return Variant(words, ("fedspallm",), overrides=changes)

    yield variant("1.0", 1, "balanced")
    for share, rounds in (("0.5", 2), ("0.25", 4)):
        yield variant(share, 1, "uniform")
        yield variant(share, 1, "balanced")
        for fold in ("latest", "cumulative"):
            yield variant(share, rounds, "uniform", fold)
            yield variant(share, rounds, "balanced", fold)
        yield variant(share, rounds, "sweep")


def _clients() -> Iterator[Variant]:
    """Numbers of clients, and how the text is split among them."""
    for clients in (4, 8, 16):
        for iid in (False, True):
            name = f"{clients} clients, {'iid' if iid else 'by domain'}"
            yield Variant(name, ("standalone", "fedspallm", "gram+admm"), seeds=(0,), clients=clients, iid=iid)


def _targets() -> Iterator[Variant]:
    """Targets."""
    methods = ("standalone", "fedavg", "fedspallm", "consensus", "gram", "gram+admm", "centralized")
    yield Variant("targets", methods, ("0.5", "0.6", "0.7", "0.8", "2:4", "4:8"), (0,))


GROUPS = {"layers": _layers, "clients": _clients, "targets": _targets}


def main() -> int:
    """Run the groups that the command line names, and write a table of each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.comparisons", description=__doc__)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--out", type=Path, default=Path("runs/comparisons"), metavar="FOLDER")
    options = parser.parse_args()
    if unknown := [name for name in options.groups if name not in GROUPS]:
        parser.error(f"there is no group {', '.join(unknown)}; there are {', '.join(GROUPS)}")
    for group in options.groups or GROUPS:
        folder = options.out / group
        folder.mkdir(parents=True, exist_ok=True)
        rows = [row for variant in GROUPS[group]() for row in _run(variant, folder)]
        (folder / "table.md").write_text("\n".join(_table(rows)) + "\n", "utf-8")
        sys.stdout.write((folder / "table.md").read_text("utf-8"))
    return 0


def _run(variant: Variant, folder: Path) -> Iterator[tuple[str, str, str, str]]:
    """(variant, method, target, mean and spread of the geometric mean) for each method and target."""
    name = variant.name.replace(", ", "-").replace(" ", "-")
    out = folder / name
    arguments = ["study", str(_config(variant, folder / f"{name}.yaml")), "--out", str(out)]
    arguments += ["--algorithms", *variant.methods, "--sparsity", *variant.targets]
    arguments += ["--seeds", *map(str, variant.seeds), *SHARED, *variant.overrides]
    if cli.main(arguments):
        raise SystemExit(f"{variant.name} failed")
    cells = [json.loads(line) for line in (out / "cells.jsonl").read_text("utf-8").splitlines()[1:]]
    for method in variant.methods:
        for target in variant.targets:
            means = [
                statistics.geometric_mean(cell["perplexity"].values())
                for cell in cells
                if (cell["method"], cell["target"]) == (method, target)
            ]
            spread = f" ± {statistics.stdev(means):.2f}" if len(means) > 1 else ""
            yield variant.name, method, target, f"{statistics.mean(means):.2f}{spread}"


def _config(variant: Variant, file: Path) -> Path:
    """The demo's configuration with other clients."""
    if variant.clients == 4 and not variant.iid:
        return DEMO
    config = yaml.safe_load(DEMO.read_text("utf-8").replace("${here:../", f"{Path.cwd()}/").replace(".txt}", ".txt"))
    config["model"]["path"] = str(Path.cwd() / "examples/demo/model")
    texts = {domain: str(Path.cwd() / TEXT / domain / "calib.txt") for domain in DOMAINS}
    config["server_configs"]["num_clients"] = variant.clients
    config["client_configs"]["data"]["windows"] = WINDOWS // variant.clients
    config["clients"] = [
        {
            "client_id": f"client-{number:02}",
            "data": {"text": list(texts.values()) if variant.iid else texts[DOMAINS[number % len(DOMAINS)]]},
        }
        for number in range(variant.clients)
    ]
    file.write_text(yaml.safe_dump(config), "utf-8")
    return file


def _table(rows: list[tuple[str, str, str, str]]) -> Iterator[str]:
    """Variants down, methods and targets across."""
    columns = list(dict.fromkeys((method, target) for _, method, target, _ in rows))
    if len({name for name, *_ in rows}) == 1:  # one study: methods down, targets across
        rows = [(method, "", target, value) for _, method, target, value in rows]
        columns = list(dict.fromkeys((method, target) for _, method, target, _ in rows))
    yield "| | " + " | ".join(f"{method} {target}".strip() for method, target in columns) + " |"
    yield "| --- |" + " ---: |" * len(columns)
    for name in dict.fromkeys(name for name, *_ in rows):
        found = {(method, target): value for row, method, target, value in rows if row == name}
        yield f"| {name} | " + " | ".join(found[column] for column in columns) + " |"


if __name__ == "__main__":
    sys.exit(main())
