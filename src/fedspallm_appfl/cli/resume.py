"""`fedspallm resume`: go on with a run that was cut off."""

import argparse
from pathlib import Path
from typing import Any

from fedspallm_appfl.cli import run
from fedspallm_appfl.cli.arguments import command
from fedspallm_appfl.errors import ConfigError, shortened
from fedspallm_appfl.settings.paths import is_file


def add(verbs: Any) -> None:
    """Declare the verb."""
    parser = command(
        verbs,
        "resume",
        "Go on with a run that was cut off, where it stood. It ends with the model of one that was not.",
        "fedspallm resume runs/demo",
        "mpiexec --oversubscribe -n 3 fedspallm resume runs/demo --launcher mpi",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="run_dir of a run that was cut off")
    run.add_launcher(parser)
    parser.set_defaults(work=work)


def work(args: argparse.Namespace) -> int:
    """Do it."""
    if not is_file(Path(args.run_dir) / "config.yaml"):
        folder = shortened(args.run_dir)
        raise ConfigError(f"{folder} holds no run (no config.yaml); name its run_dir, or begin one with fedspallm run")
    args.config, args.overrides = str(Path(args.run_dir) / "config.yaml"), [f"run_dir={args.run_dir}"]
    args.overwrite, args.resume, args.change = False, True, None
    return run.work(args)
