"""The command line `fedspallm`, one file a verb; some kinds of verbs in folders of their own.

Rule of imports: what a verb's file imports at its top is light. Help, a mistyped command and a wrong key or value of a
configuration need no torch; `validate`, `estimate` and `site` import torch and transformers, but not APPFL. Verbs that
import them say so with `importing`.
"""

import argparse
import sys
from collections.abc import Sequence

from fedspallm_appfl import __version__
from fedspallm_appfl.cli import completion, recover, resume, run, study, watch
from fedspallm_appfl.cli.arguments import command
from fedspallm_appfl.cli.before import estimate, init, validate
from fedspallm_appfl.cli.finished import compare, prune, push, report
from fedspallm_appfl.cli.globus import doctor, functions, site
from fedspallm_appfl.cli.models import check, evaluate, pack, unpack
from fedspallm_appfl.cli.signals import ending
from fedspallm_appfl.errors import FedSpaLLMError, Terminated

VERBS = (
    init,
    run,
    resume,
    watch,
    validate,
    doctor,
    site,
    functions,
    estimate,
    study,
    prune,
    recover,
    evaluate,
    check,
    pack,
    unpack,
    report,
    compare,
    push,
    completion,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit code: 0 done, 2 a mistake that the message explains, 130 and 143 ended from outside.
    """
    parser = parser_of_all()
    if not (sys.argv[1:] if arguments is None else arguments):
        parser.print_help(sys.stderr)
        return 2
    args, rest = parser.parse_known_args(arguments)
    takes_overrides = "overrides" in args
    late = [word for word in rest if takes_overrides and "=" in word and not word.startswith("-")]
    if len(late) < len(rest):
        strange = " ".join(word for word in rest if word not in late)
        parser.error(f"unrecognized arguments: {strange}; see fedspallm {args.command} --help")
    if late:  # overrides may stand after options too
        args.overrides = [*args.overrides, *late]
    try:
        with ending():
            return args.work(args)
    except FedSpaLLMError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    except Terminated as signal:
        sys.stderr.write(f"ended by {signal}\n")
        return Terminated.code


def parser_of_all() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = command(
        None,
        "fedspallm",
        "Prune one large language model on text that stays where it is (FedSpaLLM on APPFL).",
        "fedspallm run configs/demo.yaml",
        "fedspallm run configs/demo.yaml client_configs.train_configs.sparsity=0.7 run_dir=runs/demo-70",
        "mpiexec --oversubscribe -n 5 fedspallm run configs/demo.yaml --launcher mpi --overwrite",
    )
    parser.add_argument("--version", action="version", version=f"fedspallm-appfl {__version__}")
    verbs = parser.add_subparsers(dest="command", required=True, metavar="VERB")
    for verb in VERBS:
        verb.add(verbs)
    return parser
