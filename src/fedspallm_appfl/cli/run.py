"""`fedspallm run`: in one process, under mpiexec, or over Globus Compute."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedspallm_appfl.cli.arguments import add_config, command
from fedspallm_appfl.cli.checked import checked, console, introduce
from fedspallm_appfl.errors import ConfigError, FedSpaLLMError, Terminated
from fedspallm_appfl.settings.imports import importing

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
    add_launcher(parser)
    earlier = parser.add_mutually_exclusive_group()
    earlier.add_argument("--overwrite", action="store_true", help="replace the results of an earlier run in run_dir")
    earlier.add_argument(
        "--resume", action="store_true", help="go on with a run that was cut off, if there is one in run_dir"
    )
    parser.set_defaults(change=None)


def add_launcher(parser: argparse.ArgumentParser) -> None:
    """Where it runs."""
    parser.add_argument(
        "--launcher",
        choices=("serial", "mpi", "globus"),
        default="serial",
        help="serial (default): this machine, in one process or several (`workers`); mpi: under mpiexec; globus: clients "
        "at their own sites, over Globus Compute",
    )


def work(args: argparse.Namespace) -> int:
    """Do it."""
    if args.launcher == "mpi":
        return _under_mpi(args)
    globus = args.launcher == "globus"
    config, shown = _checked(args, globus), console()
    if _is_finished(config, args, shown):
        return 0
    config = config if globus else _settled(config)
    introduce(config, shown)
    _say_needs(config, args.launcher, shown)
    with _telling_how_to_go_on(config, args.launcher):
        (_over_globus if globus else _serial)(config, shown, args)
    return 0


def _settled(config: "Config") -> "Config":
    from fedspallm_appfl.estimates.processes import settled

    return settled(config)


def _is_finished(config: "Config", args: argparse.Namespace, shown: "Console") -> bool:
    """Whether a run that is to go on has ended already, so that a job that is started again does no harm."""
    from fedspallm_appfl.runs import run_dir

    folder = Path(config.run_dir).expanduser()
    if not (args.resume and run_dir.finished(folder)):
        return False
    run_dir.tidy(folder)
    shown.print(f"{folder} is finished: {folder / 'report.md'}", highlight=False, markup=False)
    return True


def _say_needs(config: "Config", launcher: str, shown: "Console") -> None:
    """Say what this process will take at most, before it takes it."""
    from fedspallm_appfl.estimates import memory, over_globus, traffic
    from fedspallm_appfl.estimates.job import Job
    from fedspallm_appfl.reports.parts import bytes_text

    job = Job.of(config)
    of = {"serial": memory.serial_memory, "mpi": memory.server_memory, "globus": over_globus.receiving_memory}
    needed, (disk, free) = of[launcher](job).needed, traffic.room(job)
    where, count = "here beside its packages", int(config.workers) if launcher == "serial" else 1
    if count > 1:
        needed, where = memory.workers_memory(job, count), f"in {count + 1} processes beside their packages"
    shown.print(
        f"needs at most {bytes_text(needed)} of memory {where}, and {bytes_text(disk)} of disk in "
        f"{config.run_dir}, where {bytes_text(free)} are free",
        highlight=False,
        markup=False,
    )


@contextmanager
def _telling_how_to_go_on(config: "Config", launcher: str) -> Iterator[None]:
    """Say what stays of a run that ends before its time."""
    from fedspallm_appfl.runs import run_dir

    try:
        yield
    except (FedSpaLLMError, KeyboardInterrupt, Terminated):
        folder = Path(config.run_dir).expanduser()
        if run_dir.is_cut_off(folder) and not run_dir.at_work(folder):  # by another run, which goes on
            how = "" if launcher == "serial" else f" --launcher {launcher}"
            sys.stderr.write(
                f"what was done stays in {folder}: fedspallm resume {folder}{how} goes on with it; a run with "
                "another configuration begins anew, with --overwrite\n"
            )
        raise


def _checked(args: argparse.Namespace, globus: bool) -> "Config":
    return checked(args.config, args.overrides, True, args.overwrite, globus, args.change, args.resume, announce=True)


def _serial(config: "Config", shown: "Console", args: argparse.Namespace) -> None:
    from fedspallm_appfl.runs import experiment, serial
    from fedspallm_appfl.runs.processes import Workers

    with Workers(int(config.workers)) as among:
        experiment.run(config, partial(serial.run, among=among), shown, args.overwrite, args.resume, among)


def _over_globus(config: "Config", shown: "Console", args: argparse.Namespace) -> None:
    from fedspallm_appfl.globus.server import preflight, run
    from fedspallm_appfl.runs import experiment, run_dir

    folder = Path(config.run_dir).expanduser()
    goes_on = args.resume and run_dir.is_cut_off(folder)  # tasks may be out, and endpoints busy
    with run.connected(config, folder / run_dir.STATE, goes_on) as connection:
        if not goes_on:
            preflight.require(look_at_endpoints(connection, shown), config.server_configs.min_clients)
        launch = partial(run.run, connection=connection)
        experiment.run(config, launch, shown, args.overwrite, args.resume)


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
    with importing("transformers"):
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
        if config := mpi.receive_config(comm):
            mpi.take_part(config, comm)
        return 0
    config = _checked(args, False)
    mpi.check_ranks(comm, config)
    forget_windows()  # those of the clients, which other ranks draw
    shown = console(plain=True)
    introduce(config, shown)
    if _is_finished(config, args, shown):
        mpi.send_home(comm)
        return 0
    _say_needs(config, args.launcher, shown)
    with _telling_how_to_go_on(config, args.launcher):
        launch = partial(mpi.run_server, comm=comm)
        experiment.run(config, launch, shown, args.overwrite, args.resume)
    return 0
