"""`fedspallm completion`: what a shell needs to complete verbs, options and files."""

import argparse
import sys
from pathlib import Path
from typing import Any

from fedspallm_appfl.cli.arguments import command

SHELLS = ("bash", "zsh", "tcsh")


def add(verbs: Any) -> None:
    """Declare the verb."""
    parser = command(
        verbs,
        "completion",
        "Print a script that lets a shell complete verbs, options and files, for its folder of such scripts.",
        "fedspallm completion bash",
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell")
    parser.set_defaults(work=work)


def work(args: argparse.Namespace) -> int:
    """Do it."""
    import shtab

    from fedspallm_appfl.cli import parser_of_all

    parser = parser_of_all()
    _take_files(parser, shtab.FILE)
    sys.stdout.write(shtab.complete(parser, shell=args.shell) + "\n")
    return 0


def _take_files(parser: argparse.ArgumentParser, files: Any) -> None:
    """Complete the names of files and folders wherever a path is expected."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                _take_files(verb, files)
        elif action.type is Path or str(action.metavar).endswith(".yaml"):
            action.complete = files  # type: ignore[attr-defined]
