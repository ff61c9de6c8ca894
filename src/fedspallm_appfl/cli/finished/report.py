"""`fedspallm report`."""

import argparse
from pathlib import Path
from typing import Any

from fedspallm_appfl.cli.arguments import command
from fedspallm_appfl.cli.checked import console
from fedspallm_appfl.errors import ConfigError
from fedspallm_appfl.settings.imports import importing


def add(verbs: Any) -> None:
    """Declare the verb."""
    parser = command(
        verbs,
        "report",
        "Make report.html and report.md of a finished run anew, from the files in its directory.",
        "fedspallm report runs/demo",
    )
    parser.add_argument("run", metavar="RUN_DIR", type=Path, help="run_dir of the finished run")
    parser.set_defaults(work=work)


def work(args: argparse.Namespace) -> int:
    """Do it."""
    with importing("transformers"):
        from fedspallm_appfl.reports import finished

    require_at_rest(args.run)
    finished.write(args.run, *finished.opened(args.run))
    for name in (finished.PAGE, finished.REPORT):
        console().print(f"report  {args.run / name}", highlight=False, markup=False)
    return 0


def require_at_rest(folder: Path) -> None:
    """See that nobody is writing what is to be read.

    Raises:
        ConfigError: a run or `fedspallm prune` is at work there.
    """
    from fedspallm_appfl.runs import run_dir

    if run_dir.at_work(folder):
        raise ConfigError(f"another run or fedspallm prune is using {folder}; wait until it is done")
