"""`fedspallm check`."""

import argparse
import json
import sys
from typing import Any

from fedspallm_appfl.cli.arguments import command
from fedspallm_appfl.cli.checked import console
from fedspallm_appfl.settings.imports import importing


def add(verbs: Any) -> None:
    """Declare the verb."""
    parser = command(
        verbs,
        "check",
        "Count the zeros of a model folder, by matrix and pattern (2:4, 4:8).",
        "fedspallm check runs/demo",
        "fedspallm check runs/demo --matrices",
    )
    parser.add_argument("model", help="model folder, run_dir of a finished run, or hub name")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--matrices", action="store_true", help="a row for each matrix (default: for each kind)")
    shown.add_argument("--json", action="store_true", help="everything, as JSON")
    parser.add_argument(
        "--blocks", metavar="NAME", help="dotted name of the list of decoder blocks (default: a search)"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that the model folder brings along"
    )
    parser.set_defaults(work=work)


def work(args: argparse.Namespace) -> int:
    """Do it."""
    with importing("transformers"):
        from fedspallm_appfl.reports.sparsity import check

    found = check(args.model, args.blocks, args.trust_remote_code)
    if args.json:
        sys.stdout.write(f"{json.dumps(found.to_dict(), indent=1)}\n")
    else:
        console().print(found.each() if args.matrices else found)
    return 0
