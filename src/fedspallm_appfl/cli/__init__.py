"""The command line: `fedspallm run`, `validate`, `doctor`, `functions`, `site`, `estimate`, `study`, `prune`, `evaluate`.

Import rule: modules imported at the top of this file, and what they import, must be light. Help, a mistyped command
and the form of a configuration need no torch; `validate`, `estimate` and `site` import torch and transformers, but not
APPFL.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedspallm_appfl import __version__
from fedspallm_appfl.errors import ConfigError, FedSpaLLMError

if TYPE_CHECKING:
    from rich.console import Console

    from fedspallm_appfl.globus.server.preflight import Findings
    from fedspallm_appfl.globus.server.run import Connection
    from fedspallm_appfl.settings.schema import Config

OVERRIDES = "key=value arguments replace single values: client_configs.train_configs.sparsity=0.7 run_dir=runs/70"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 success, 2 an error that the message explains."""
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    takes_overrides = "overrides" in args
    late = [word for word in rest if takes_overrides and "=" in word and not word.startswith("-")]
    if len(late) < len(rest):
        parser.error(f"unrecognized arguments: {' '.join(word for word in rest if word not in late)}")
    if late:  # overrides may follow options, too
        args.overrides = [*args.overrides, *late]
    if args.command == "run" and args.launcher == "mpi":
        return _run_mpi(args)
    try:
        return args.work(args)
    except FedSpaLLMError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = _command(
        None,
        "fedspallm",
        "Prune a large language model with private text that stays at each client (FedSpaLLM on APPFL).",
        "fedspallm run configs/demo.yaml\n"
        "  fedspallm run configs/demo.yaml client_configs.train_configs.sparsity=0.7 run_dir=runs/demo-70\n"
        "  mpiexec -n 5 fedspallm run configs/demo.yaml --launcher mpi --overwrite",
    )
    parser.add_argument("--version", action="version", version=f"fedspallm-appfl {__version__}")
    verbs = parser.add_subparsers(dest="command", required=True, metavar="VERB")

    run = _command(
        verbs,
        "run",
        "Run an experiment; writes model, report and metrics to its run_dir.",
        "fedspallm run configs/demo.yaml\n"
        "  fedspallm run configs/demo.yaml client_configs.train_configs.sparsity=2:4 run_dir=runs/demo-2-4\n"
        "  mpiexec -n 5 fedspallm run configs/demo.yaml --launcher mpi --overwrite\n"
        "  fedspallm run configs/llama2_7b_globus.yaml --launcher globus",
    )
    _config_arguments(run)
    run.add_argument(
        "--launcher",
        choices=("serial", "mpi", "globus"),
        default="serial",
        help="serial (default): one process; mpi: under mpiexec; globus: clients at their own sites, over Globus Compute",
    )
    run.add_argument("--overwrite", action="store_true", help="replace the results of an earlier run in run_dir")
    run.set_defaults(work=_run)

    validate = _command(
        verbs,
        "validate",
        "Check a configuration and report all problems; opens model and text, runs nothing.",
        "fedspallm validate configs/demo.yaml\n  fedspallm validate configs/llama2_7b_4_clients.yaml --no-files",
    )
    _config_arguments(validate)
    validate.add_argument("--no-files", action="store_true", help="check only the values, not model and text")
    validate.set_defaults(work=_validate)

    doctor = _command(
        verbs,
        "doctor",
        "Check that the client of every Globus Compute endpoint can take part; prints a table, runs nothing.",
        "fedspallm doctor configs/llama2_7b_globus.yaml",
    )
    _config_arguments(doctor)
    doctor.set_defaults(work=_doctor)

    site = _command(
        verbs,
        "site",
        "Check a site file on its own machine: text, model, what may leave; sends nothing and shows real paths.",
        "fedspallm site examples/globus/site.yaml\n"
        "  fedspallm site examples/globus/site.yaml --model examples/demo/model --length 256",
    )
    site.add_argument("site", metavar="SITE.yaml", type=Path, help="the file that FEDSPALLM_SITE names at the endpoint")
    site.add_argument(
        "--model",
        type=Path,
        metavar="FOLDER",
        help="model whose tokenizer counts windows (default: the file's `model`)",
    )
    site.add_argument(
        "--length", type=_positive, default=2048, help="tokens per window, the server's data.length (default: 2048)"
    )
    site.set_defaults(work=_site)

    functions = _command(
        verbs,
        "functions",
        "Register our functions with Globus Compute. Sites can then allow only these; prints where to write the ids.",
        "fedspallm functions",
    )
    functions.set_defaults(work=_functions)

    estimate = _command(
        verbs,
        "estimate",
        "Estimate bytes, disk and memory of a run; opens the model, needs no text.",
        "fedspallm estimate configs/demo.yaml\n"
        "  fedspallm estimate configs/demo.yaml client_configs.data.batch=1 server_configs.num_global_epochs=2",
    )
    _config_arguments(estimate)
    estimate.set_defaults(work=_estimate)

    study = _command(
        verbs,
        "study",
        "Compare algorithms and targets on the same clients with several seeds: tables and plots (docs/study.md).",
        "fedspallm study configs/demo.yaml --sparsity 0.5 0.7 --seeds 0 1\n"
        "  fedspallm study configs/demo.yaml --algorithms standalone fedspallm gram gram+admm --out runs/four",
    )
    _config_arguments(study)
    study.add_argument(
        "--algorithms",
        nargs="+",
        metavar="NAME",
        help="NAME or NAME+PRUNER: the algorithms, gram-sweep, gram-dense, magnitude (default: nine of them)",
    )
    study.add_argument("--sparsity", nargs="+", default=[], metavar="TARGET", help="default: that of CONFIG.yaml")
    study.add_argument("--seeds", nargs="+", default=[], metavar="SEED", help="default: that of CONFIG.yaml")
    study.add_argument("--out", type=Path, metavar="DIR", help="folder for the results (default: RUN_DIR-study)")
    study.add_argument("--keep-models", action="store_true", help="keep the pruned models in DIR/runs")
    study.add_argument("--overwrite", action="store_true", help="start over instead of resuming")
    study.set_defaults(work=_study)

    prune = _command(
        verbs,
        "prune",
        "Make more models from the statistics of a finished run with algorithm gram.",
        "fedspallm prune runs/demo-gram --sparsity 0.6 0.7 2:4\n"
        "  fedspallm prune runs/demo-gram --sparsity 0.7 --pruner admm",
    )
    prune.add_argument("run", metavar="RUN_DIR", type=Path, help="run_dir of the finished run")
    prune.add_argument("--sparsity", nargs="+", required=True, metavar="TARGET", help="ratios in [0, 1), or n:m")
    prune.add_argument("--pruner", default=None, help="sparsegpt, admm or wanda (default: that of the run)")
    prune.add_argument("--overwrite", action="store_true", help="replace existing models")
    prune.set_defaults(work=_prune)

    evaluate = _command(
        verbs,
        "evaluate",
        "Print the perplexity of a model folder on text files.",
        "fedspallm evaluate runs/demo/model --text examples/demo/text/austen/test.txt --length 256",
    )
    evaluate.add_argument("model", help="model folder, or hub name")
    evaluate.add_argument("--text", nargs="+", required=True, metavar="FILE", help="UTF-8 text files, one row each")
    evaluate.add_argument(
        "--length", type=_positive, default=None, help="tokens per window (default: 2048, or the model's maximum)"
    )
    evaluate.add_argument(
        "--windows", type=_positive, default=None, help="maximum number of windows of each text (default: all)"
    )
    evaluate.add_argument("--batch", type=_positive, default=8, help="windows per forward pass (default: 8)")
    evaluate.add_argument(
        "--dtype",
        choices=("auto", "float32", "float16", "bfloat16"),
        default="auto",
        help="arithmetic (default: as stored, but float32 for float16 on a CPU)",
    )
    evaluate.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    evaluate.set_defaults(work=_evaluate)
    return parser


def _command(verbs: "argparse._SubParsersAction | None", name: str, what: str, example: str) -> argparse.ArgumentParser:
    words: Any = {
        "description": what,
        "epilog": f"example:\n  {example}",
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }
    if verbs is None:
        return argparse.ArgumentParser(prog=name, **words)
    return verbs.add_parser(name, help=what, **words)


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help="the experiment")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"at least 1, got {text}")
    return int(text)


def _run(args: argparse.Namespace) -> int:
    config, console = _checked(args, files=True, overwrite=args.overwrite), _console()
    _introduce(config, console)
    run = _run_globus if args.launcher == "globus" else _run_serial
    run(config, console, args.overwrite)
    return 0


def _run_serial(config: "Config", console: "Console", overwrite: bool) -> None:
    from fedspallm_appfl.runs import experiment, serial

    experiment.run(config, serial.run, console, overwrite)


def _run_globus(config: "Config", console: "Console", overwrite: bool) -> None:
    from fedspallm_appfl.globus.server import preflight as globus_preflight
    from fedspallm_appfl.globus.server import run as globus
    from fedspallm_appfl.runs import experiment

    with globus.connected(config) as connection:
        findings = _preflight(connection, console)
        globus_preflight.require(findings, config.server_configs.min_clients)
        experiment.run(config, lambda c, state, log: globus.run(c, connection, state, log), console, overwrite)


def _doctor(args: argparse.Namespace) -> int:
    config = _checked(args, files=True, overwrite=True)

    from fedspallm_appfl.globus.server import preflight as globus_preflight
    from fedspallm_appfl.globus.server import run as globus

    with globus.connected(config) as connection:
        console = _console()
        findings = _preflight(connection, console)
        for line in globus_preflight.problems(findings):
            console.print(line, highlight=False, markup=False)
    return 0 if all(cell.ok for cells in findings.values() for cell in cells.values()) else 2


def _site(args: argparse.Namespace) -> int:
    from fedspallm_appfl.globus.site import check as site_check

    table, problems = site_check.check(args.site, args.model, args.length)
    _console().print(table)
    _refuse(args.site, problems)
    return 0


def _functions(args: argparse.Namespace) -> int:
    from fedspallm_appfl.globus.server.run import registered_functions

    ids = registered_functions()
    lines = ["# in the configuration of every run", "server_configs:", "  functions:"]
    lines += [f"    {kind}: {registered}" for kind, registered in ids.items()]
    lines += ["", "# at each site, in ~/.globus_compute/NAME/config.yaml", "allowed_functions:"]
    lines += [f"  - {registered}" for registered in ids.values()]
    _console().print("\n".join(lines), highlight=False, soft_wrap=True)
    return 0


def _preflight(connection: "Connection", console: "Console") -> "Findings":
    from fedspallm_appfl.globus.server import preflight as globus_preflight

    endpoints, patience = len(connection.config.clients), connection.config.server_configs.preflight_deadline
    asking = f"asking {endpoints} endpoints, up to {patience:.0f} s"
    if not console.is_terminal:
        console.print(asking, highlight=False)
    with console.status(asking):
        findings = globus_preflight.look(connection)
    console.print(globus_preflight.table(findings))
    return findings


def _introduce(config: "Config", console: "Console") -> None:
    """Print what the run will do."""
    from fedspallm_appfl.validation.rules import forecast

    for line in forecast(config):
        console.print(line, highlight=False, markup=False)


def _run_mpi(args: argparse.Namespace) -> int:
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

    if not mpi.is_server(comm):
        config = mpi.receive_config(comm)
        mpi.run_clients(config, comm)
        return 0
    config = _checked(args, files=True, overwrite=args.overwrite)
    if config.algorithm == "centralized":
        raise ConfigError(
            "algorithm centralized pools the text of all clients in one process; run it without --launcher mpi"
        )
    mpi.send_config(comm, config)
    console = _console(plain=True)
    _introduce(config, console)
    experiment.run(config, lambda c, state, log: mpi.run_server(c, comm, state, log), console, args.overwrite)
    return 0


def _validate(args: argparse.Namespace) -> int:
    config, console = _checked(args, files=not args.no_files, overwrite=True), _console()
    console.print(f"{args.config}: no problem found", highlight=False, markup=False)
    if not args.no_files:
        _introduce(config, console)
    return 0


def _estimate(args: argparse.Namespace) -> int:
    config = _checked(args, files=False, overwrite=True)

    from fedspallm_appfl.estimate.tables import tables

    _console().print(tables(config))
    return 0


def _study(args: argparse.Namespace) -> int:
    lists = {name: getattr(args, name) or [] for name in ("algorithms", "sparsity", "seeds")}
    late = [word for words in lists.values() for word in words if "=" in word]  # overrides after a list of names
    names, targets, seeds = ([word for word in words if "=" not in word] for words in lists.values())
    overrides = [*args.overrides, *late]
    _well_formed(args.config, overrides)

    from fedspallm_appfl.study import plan as study

    plan, problems = study.planned(
        Path(args.config), overrides, names or study.DEFAULT, targets, seeds, args.out, args.keep_models
    )
    _refuse(args.config, problems)
    study.study(plan, _console(), args.overwrite)
    return 0


def _prune(args: argparse.Namespace) -> int:
    from fedspallm_appfl.runs import further_models

    further_models.prune(args.run, args.sparsity, args.pruner, _console(), args.overwrite)
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from rich.markup import escape
    from rich.table import Table

    from fedspallm_appfl.runs.experiment import evaluate_folder

    measured = evaluate_folder(args.model, args.text, args.length, args.windows, args.batch, args.dtype, args.device)
    table = Table(title=f"Perplexity of {escape(args.model)}", title_justify="left")
    table.add_column("text", overflow="fold")
    table.add_column("perplexity", justify="right")
    for text, value in measured.perplexity.items():
        table.add_row(escape(text), f"{value:.3f}")
    how = f"windows of {measured.length} tokens, {measured.windows} in total, {measured.dtype} arithmetic"
    console = _console()
    console.print(table)
    console.print(how, highlight=False)
    return 0


def _checked(args: argparse.Namespace, files: bool, overwrite: bool) -> "Config":
    """A configuration without problems.

    Raises:
        ConfigError: lists all that were found.
    """
    config = _well_formed(args.config, args.overrides)

    from fedspallm_appfl.runs import run_dir
    from fedspallm_appfl.validation import globus_rules
    from fedspallm_appfl.validation import rules as config_rules

    globus = _means_globus(args, config)
    problems = config_rules.check(config)
    config = globus_rules.prepared(config) if globus else config
    problems += globus_rules.check(config) if globus else globus_rules.check_on_this_machine(config)
    problem = run_dir.problem(config, overwrite) if config.run_dir else None
    problems += [problem] if problem else []
    if files:
        problems += config_rules.check_with_files(config)
        problems += _sizes(config) if globus and not problems else []
    _refuse(args.config, problems)
    return config


def _well_formed(file: str, overrides: Sequence[str]) -> "Config":
    """A configuration with valid keys and types, which the check of its values needs.

    Raises:
        ConfigError: lists every wrong key and value.
    """
    from fedspallm_appfl.settings.schema import load_config

    config, problems = load_config(Path(file), overrides)
    _refuse(file, problems)
    return config


def _refuse(config: str | Path, problems: list[str]) -> None:
    """Report all problems.

    Raises:
        ConfigError: lists the problems, if there are any.
    """
    if problems:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        raise ConfigError(f"{config}: {len(problems)} problem{'s' if len(problems) > 1 else ''}\n{lines}")


def _sizes(config: "Config") -> list[str]:
    from fedspallm_appfl.estimate import over_globus as estimate_globus

    return list(estimate_globus.check_sizes(config))


def _means_globus(args: argparse.Namespace, config: "Config") -> bool:
    """Whether a command is for a run over Globus Compute; some commands tell from the clients' endpoint ids."""
    if args.command == "run":
        return args.launcher == "globus"
    return args.command == "doctor" or config.over_globus()


def _console(plain: bool = False) -> "Console":
    """The console for results; `plain` under mpiexec, whose ranks may see a terminal although its output is not one."""
    from fedspallm_appfl.runs.progress import console

    return console(force_terminal=False) if plain else console()
