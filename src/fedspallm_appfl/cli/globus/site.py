"""`fedspallm site`: an institution looks at its own file."""

import argparse
from pathlib import Path
from typing import Any

from fedspallm_appfl.cli.arguments import command, positive
from fedspallm_appfl.cli.checked import console
from fedspallm_appfl.errors import refuse
from fedspallm_appfl.settings.imports import importing


def add(verbs: Any) -> None:
    """Declare the verb."""
    parser = command(
        verbs,
        "site",
        "Check a site file where it lies: texts, model, what may leave; sends nothing, and shows real paths.",
        "fedspallm site examples/globus/site.yaml",
        "fedspallm site examples/globus/site.yaml --model examples/demo/model --length 256",
        "fedspallm site site.yaml --approve 0123456789abcdef",
        "fedspallm site site.yaml --keys",
    )
    parser.add_argument("site", metavar="SITE.yaml", type=Path, help="what FEDSPALLM_SITE names at the endpoint")
    parser.add_argument(
        "--model",
        type=Path,
        metavar="FOLDER",
        help="model whose tokenizer counts windows (default: the file's `model`)",
    )
    parser.add_argument(
        "--length", type=positive, default=2048, help="tokens in a window, the server's data.length (default: 2048)"
    )
    parser.add_argument("--approve", metavar="HASH", help="from now on serve a configuration that waits for it")
    parser.add_argument(
        "--keys",
        action="store_true",
        help="make the secret keys that `identity` of each client names, and print the lines for the sites' roster",
    )
    parser.set_defaults(work=work)


def work(args: argparse.Namespace) -> int:
    """Do it."""
    with importing("transformers"):
        from fedspallm_appfl.globus.site import check

    if args.approve:
        console().print(check.approve(args.site, args.approve), highlight=False, markup=False)
        return 0
    if args.keys:
        console().print(check.keys(args.site), highlight=False, markup=False, soft_wrap=True)
        return 0
    table, problems = check.check(args.site, args.model, args.length)
    console().print(table)
    refuse(args.site, problems)
    return 0
