"""`fedspallm compare`."""

import argparse
from pathlib import Path
from typing import Any

from fedspallm_appfl.cli.arguments import command
from fedspallm_appfl.cli.checked import console
from fedspallm_appfl.cli.finished.report import require_at_rest
from fedspallm_appfl.settings.imports import importing


def add(verbs: Any) -> None:
    """Declare the verb."""
    parser = command(
        verbs,
        "compare",
        "Put finished runs side by side on one page: quality, bytes, time and the settings that differ.",
        "fedspallm compare runs/demo runs/demo-70",
        "fedspallm compare runs/demo runs/gram runs/best --out runs/three.html",
    )
    parser.add_argument("runs", metavar="RUN_DIR", type=Path, nargs="+", help="run_dirs of finished runs")
    parser.add_argument(
        "--out", type=Path, default=Path("compare.html"), metavar="FILE", help="the page (default: compare.html)"
    )
    parser.set_defaults(work=work)


def work(args: argparse.Namespace) -> int:
    """Do it."""
    with importing("transformers"):
        from fedspallm_appfl.reports.pages.comparison import write_comparison
        from fedspallm_appfl.reports.terminal import upright

    for run in args.runs:
        require_at_rest(run)
    summary, words = write_comparison(args.out, list(dict.fromkeys(args.runs)))
    shown = console()
    shown.print(upright(summary))
    for line in (*(word.replace("**", "") for word in words), f"page    {args.out}"):
        shown.print(line, highlight=False, markup=False)
    return 0
