"""`fedspallm doctor`: the preflight of a run over Globus Compute."""

import argparse
from typing import Any

from fedspallm_appfl.cli.arguments import add_config, command
from fedspallm_appfl.cli.checked import checked, console
from fedspallm_appfl.cli.run import look_at_endpoints


def add(verbs: Any) -> None:
    """Declare the verb."""
    parser = command(
        verbs,
        "doctor",
        "Ask every Globus Compute endpoint whether its client can take part; prints one table, sends nothing else.",
        "fedspallm doctor configs/llama2_7b_globus.yaml",
    )
    add_config(parser)
    parser.set_defaults(work=work)


def work(args: argparse.Namespace) -> int:
    """Do it."""
    config = checked(args.config, args.overrides, files=True, overwrite=True, globus=True)

    from fedspallm_appfl.globus.server import preflight, run

    with run.connected(config) as connection:
        shown = console()
        findings = look_at_endpoints(connection, shown)
        for line in preflight.problems(findings):
            shown.print(line, highlight=False, markup=False)
    return 0 if all(cell.ok for cells in findings.values() for cell in cells.values()) else 2
