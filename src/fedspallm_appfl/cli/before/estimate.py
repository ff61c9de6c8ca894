"""`fedspallm estimate`."""

import argparse
from typing import Any

from fedspallm_appfl.cli.arguments import add_config, command
from fedspallm_appfl.cli.checked import checked, console


def add(verbs: Any) -> None:
    """Declare the verb."""
    parser = command(
        verbs,
        "estimate",
        "Say what a run would send, how much memory it would take and how long; opens the model, needs no text.",
        "fedspallm estimate configs/demo.yaml",
        "fedspallm estimate configs/demo.yaml client_configs.data.batch=1 server_configs.num_global_epochs=2",
    )
    add_config(parser)
    parser.set_defaults(work=work)


def work(args: argparse.Namespace) -> int:
    """Do it."""
    config = checked(args.config, args.overrides, files=False, overwrite=True)

    from fedspallm_appfl.estimates.job import Job
    from fedspallm_appfl.estimates.tables import tables

    console().print(tables(Job.of(config)))
    return 0
