"""`python -m benchmarks [NAME ...] [--quick] [--out FOLDER]`: run benchmarks and write a table of each."""

import argparse
import importlib
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

NAMES = (
    "solve",
    "admm",
    "block_statistics",
    "whole_job",
    "layer_share",
    "aggregation",
    "payload",
    "codec",
    "secure",
    "scale",
    "large_block",
    "mpi",
    "overhead",
)
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


def main() -> int:
    """Run what the command line names; returns the number of benchmarks that failed."""
    options = _parse()
    os.environ.update(ONE_THREAD)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    options.out.mkdir(parents=True, exist_ok=True)
    names = options.names or NAMES
    if len(names) == 1:
        _run(names[0], options)
        return 0
    return sum(_run_apart(name, options) for name in names)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything works")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), metavar="FOLDER", help="default: runs/bench")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in NAMES]:
        parser.error(f"there is no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}")
    return options


def _run_apart(name: str, options: argparse.Namespace) -> bool:
    """Run one benchmark in a process of its own, so that none leaves memory to the next; returns whether it failed."""
    quick = ["--quick"] if options.quick else []
    return bool(subprocess.run([sys.executable, "-m", "benchmarks", name, "--out", options.out, *quick]).returncode)


def _run(name: str, options: argparse.Namespace) -> None:
    import torch

    from benchmarks.context import Context
    from fedspallm_appfl.tensors import native

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="fedspallm-bench-") as scratch:
        found = importlib.import_module(f"benchmarks.{name}").run(Context(options.quick, options.out, Path(scratch)))
    tables = found if isinstance(found, list) else [found]
    where = (
        f"{platform.machine()}, {os.cpu_count()} cores",
        "one thread",
        f"torch {torch.__version__}",
        native.description(),
        "quick sizes, ratios mean little" if options.quick else "full sizes",
    )
    text = "\n".join([*(table.markdown() for table in tables), f"{', '.join(where)}.\n"])
    (options.out / f"{name}.md").write_text(text, "utf-8")
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
