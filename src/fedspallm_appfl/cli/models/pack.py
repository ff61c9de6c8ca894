"""`fedspallm pack`."""

import argparse
from typing import Any

from fedspallm_appfl.cli.arguments import command
from fedspallm_appfl.cli.checked import console
from fedspallm_appfl.settings.imports import importing


def add(verbs: Any) -> None:
    """Declare the verb."""
    parser = command(
        verbs,
        "pack",
        "Write a model folder with masks and kept values in the place of zeros.",
        "fedspallm pack runs/demo/model runs/demo/packed",
    )
    parser.add_argument("model", metavar="MODEL", help="model folder, run_dir of a finished run, or hub name")
    parser.add_argument("out", metavar="OUT", help="the new folder")
    parser.set_defaults(work=work)


def work(args: argparse.Namespace) -> int:
    """Do it."""
    with importing("transformers"):
        from fedspallm_appfl.models.storage.packing import pack

    size = pack(args.model, args.out)
    console().print(
        f"{args.out}: {size.packed:,} bytes of weights, {size.dense / size.packed:.2f} times fewer than {size.dense:,}",
        highlight=False,
        markup=False,
    )
    return 0
