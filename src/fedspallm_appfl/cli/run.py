"""`fedspallm run`: in one process, under mpiexec, or over Globus Compute."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from fedspallm_appfl.cli.arguments import add_config, command
from fedspallm_appfl.cli.checked import checked, console, introduce
from fedspallm_appfl.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from fedspallm_appfl.globus.server.preflight import Findings
    from fedspallm_appfl.globus.server.run import Connection
    from fedspallm_appfl.settings.schema import Config


def add(verbs: Any) -> None:
    """Declare the verb."""
    parser = command(
        verbs,
        "run",
        "Run an experiment and write model, report and metrics to its run_dir.",
        "fedspallm run configs/demo.yaml",
        "fedspallm run configs/demo.yaml client_configs.train_configs.sparsity=2:4 run_dir=runs/demo-2-4",
        "mpiexec --oversubscribe -n 5 fedspallm run configs/demo.yaml --launcher mpi --overwrite",
        "fedspallm run configs/llama2_7b_globus.yaml --launcher globus",
    )
    add_config(parser)
    add_options(parser)
    parser.set_defaults(work=work)


def add_options(parser: argparse.ArgumentParser) -> None:
    """How and where it runs."""
    parser.add_argument(
        "--launcher",
        choices=("serial", "mpi", "globus"),
        default="serial",
        help="serial (default): one process; mpi: under mpiexec; globus: clients at their own sites, over Globus Compute",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the results of an earlier run in run_dir")
    parser.set_defaults(change=None)


def work(args: argparse.Namespace) -> int:
    """Do it."""
    if args.launcher == "mpi":
        return _under_mpi(args)
    globus = args.launcher == "globus"
    config, shown = _checked(args, globus), console()
    introduce(config, shown)
    (_over_globus if globus else _serial)(config, shown, args.overwrite)
    return 0


def _checked(args: argparse.Namespace, globus: bool) -> "Config":
    return checked(args.config, args.overrides, True, args.overwrite, globus, args.change)


def _serial(config: "Config", shown: "Console", overwrite: bool) -> None:
    from fedspallm_appfl.runs import experiment, serial

    experiment.run(config, serial.run, shown, overwrite)


def _over_globus(config: "Config", shown: "Console", overwrite: bool) -> None:
    from fedspallm_appfl.globus.server import preflight, run
    from fedspallm_appfl.runs import experiment

    with run.connected(config) as connection:
        preflight.require(look_at_endpoints(connection, shown), config.server_configs.min_clients)
        experiment.run(config, lambda c, state, log: run.run(c, connection, state, log), shown, overwrite)


def look_at_endpoints(connection: "Connection", shown: "Console") -> "Findings":
    """Ask every endpoint whether its client can take part, and show what was found."""
    from fedspallm_appfl.globus.server import preflight

    endpoints, patience = len(connection.config.clients), connection.config.server_configs.preflight_deadline
    asking = f"asking {endpoints} endpoints, up to {patience:.0f} s"
    if not shown.is_terminal:
        shown.print(asking, highlight=False)
    with shown.status(asking):
        findings = preflight.look(connection)
    shown.print(preflight.table(findings))
    return findings


def _under_mpi(args: argparse.Namespace) -> int:
    from fedspallm_appfl.runs import mpi

    try:
        comm = mpi.communicator()
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return mpi.abort_on_failure(comm, lambda: _rank(args, comm))


def _rank(args: argparse.Namespace, comm: object) -> int:
    """What one MPI rank does: rank 0 checks the configuration for all."""
    from fedspallm_appfl.runs import experiment, mpi
    from fedspallm_appfl.texts.windows import forget_windows

    if not mpi.is_server(comm):
        config = mpi.receive_config(comm)
        mpi.run_clients(config, comm)
        return 0
    config = _checked(args, False)
    mpi.check_ranks(comm, config)
    forget_windows()  # those of the clients, which other ranks draw
    shown = console(plain=True)
    introduce(config, shown)
    experiment.run(config, lambda c, state, log: mpi.run_server(c, comm, state, log), shown, args.overwrite)
    return 0
