"""`fedspallm prune`: further models from the statistics of a run."""

import argparse
from pathlib import Path
from typing import Any

from fedspallm_appfl.cli.arguments import command
from fedspallm_appfl.cli.checked import console
from fedspallm_appfl.settings.imports import importing


def add(verbs: Any) -> None:
    """Declare the verb."""
    parser = command(
        verbs,
        "prune",
        "Make further models from the statistics that a run with algorithm gram has gathered.",
        "fedspallm prune runs/demo-gram --sparsity 0.6 0.7 2:4",
        "fedspallm prune runs/demo-gram --sparsity 0.7 --pruner admm",
    )
    parser.add_argument("run", metavar="RUN_DIR", type=Path, help="run_dir of the finished run")
    parser.add_argument("--sparsity", nargs="+", required=True, metavar="TARGET", help="ratios in [0, 1), or n:m")
    parser.add_argument("--pruner", default=None, help="one that needs statistics (default: that of the run)")
    parser.add_argument("--overwrite", action="store_true", help="replace models that are there already")
    parser.set_defaults(work=work)


def work(args: argparse.Namespace) -> int:
    """Do it."""
    with importing("transformers"):
        from fedspallm_appfl.runs import further_models

    further_models.prune(args.run, args.sparsity, args.pruner, console(), args.overwrite)
    return 0
