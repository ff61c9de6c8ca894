"""`fedspallm validate`."""

import argparse
from typing import Any

from fedspallm_appfl.cli.arguments import add_config, command
from fedspallm_appfl.cli.checked import checked, console, introduce


def add(verbs: Any) -> None:
    """Declare the verb."""
    parser = command(
        verbs,
        "validate",
        "Report all problems of a configuration together; opens model and text, runs nothing.",
        "fedspallm validate configs/demo.yaml",
        "fedspallm validate configs/llama2_7b_4_clients.yaml --no-files",
    )
    add_config(parser)
    parser.add_argument("--no-files", action="store_true", help="look at the values only, not at model and text")
    parser.set_defaults(work=work)


def work(args: argparse.Namespace) -> int:
    """Do it."""
    config, shown = checked(args.config, args.overrides, files=not args.no_files, overwrite=True), console()
    shown.print(f"{args.config}: no problem found", highlight=False, markup=False)
    if not args.no_files:
        from fedspallm_appfl.runs.run_dir import problem

        introduce(config, shown)
        if occupied := problem(config, overwrite=False):
            shown.print(f"note: {occupied}", highlight=False, markup=False)
    return 0
