"""`fedspallm unpack`."""

import argparse
from typing import Any

from fedspallm_appfl.cli.arguments import command
from fedspallm_appfl.cli.checked import console
from fedspallm_appfl.settings.imports import importing


def add(verbs: Any) -> None:
    """Declare the verb."""
    parser = command(
        verbs,
        "unpack",
        "Write the dense model folder of a packed one.",
        "fedspallm unpack runs/demo/packed runs/demo/dense",
    )
    parser.add_argument("packed", metavar="PACKED", help="folder that `fedspallm pack` made, or hub name")
    parser.add_argument("out", metavar="OUT", help="the new folder")
    parser.set_defaults(work=work)


def work(args: argparse.Namespace) -> int:
    """Do it."""
    with importing("transformers"):
        from fedspallm_appfl.models.storage.packing import unpack

    unpack(args.packed, args.out)
    console().print(f"{args.out}: dense, for from_pretrained", highlight=False, markup=False)
    return 0
