"""`fedspallm functions`: register what endpoints may run."""

import argparse
from typing import Any

from fedspallm_appfl.cli.arguments import command
from fedspallm_appfl.cli.checked import console


def add(verbs: Any) -> None:
    """Declare the verb."""
    parser = command(
        verbs,
        "functions",
        "Register our functions with Globus Compute, so that sites can allow them alone; prints where to write their ids.",
        "fedspallm functions",
    )
    parser.set_defaults(work=work)


def work(args: argparse.Namespace) -> int:
    """Do it."""
    from fedspallm_appfl.globus.server.run import registered_functions

    ids = registered_functions()
    lines = ["# in the configuration of every run", "server_configs:", "  functions:"]
    lines += [f"    {kind}: {registered}" for kind, registered in ids.items()]
    lines += ["", "# at each site, in ~/.globus_compute/NAME/config.yaml", "allowed_functions:"]
    lines += [f"  - {registered}" for registered in ids.values()]
    console().print("\n".join(lines), highlight=False, soft_wrap=True)
    return 0
