"""`python -m benchmarks [NAME ...] [--quick] [--out FOLDER]`: run benchmarks, write tables of each and a page of all."""

import argparse
import importlib
import os
import platform
import subprocess
import sys
import tempfile
import time
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
BY_NAME = ("admm_block",)  # half an hour alone, so that it runs if it is asked for
PAGE = "page.md"
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


def main() -> int:
    """Run what the command line names; returns the number of benchmarks that failed."""
    options = _parse()
    os.environ.update(ONE_THREAD)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    options.out = options.out or Path("runs/bench-quick" if options.quick else "runs/bench")
    options.out.mkdir(parents=True, exist_ok=True)
    names = options.names or NAMES
    if len(names) == 1:
        _run(names[0], options)
        failed = 0
    else:
        failed = sum(_run_apart(name, options) for name in names)
    _write_page(options.out)
    return failed


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; by name alone {', '.join(BY_NAME)}"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything works")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: runs/bench, or runs/bench-quick")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in NAMES + BY_NAME]:
        parser.error(f"there is no benchmark {', '.join(unknown)}; there are {', '.join(NAMES + BY_NAME)}")
    return options


def _run_apart(name: str, options: argparse.Namespace) -> bool:
    """Run one benchmark in a process of its own, so that none leaves memory to the next; returns whether it failed."""
    quick = ["--quick"] if options.quick else []
    return bool(subprocess.run([sys.executable, "-m", "benchmarks", name, "--out", options.out, *quick]).returncode)


def _processor() -> str:
    """The processor's name as Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _write_page(folder: Path) -> None:
    """All tables that lie there, in the order of the benchmarks; each says what it was measured on."""
    files = [folder / f"{name}.md" for name in NAMES + BY_NAME]
    tables = [file.read_text("utf-8") for file in files if file.exists()]
    (folder / PAGE).write_text("\n".join(["# Benchmarks\n", *tables]), "utf-8")


def _run(name: str, options: argparse.Namespace) -> None:
    import torch

    from benchmarks.context import Context
    from fedspallm_appfl.tensors import native

    torch.set_num_threads(1)
    (options.out / f"{name}.md").unlink(missing_ok=True)  # so that one that fails leaves no table of an earlier time
    with tempfile.TemporaryDirectory(prefix="fedspallm-bench-") as scratch:
        found = importlib.import_module(f"benchmarks.{name}").run(Context(options.quick, options.out, Path(scratch)))
    tables = found if isinstance(found, list) else [found]
    where = (
        time.strftime("%Y-%m-%d"),
        f"{_processor()}, {os.cpu_count()} cores",
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
