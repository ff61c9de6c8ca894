"""`fedspallm recover`: fit the kept weights of a model that was pruned before."""

import argparse
from typing import TYPE_CHECKING, Any

from fedspallm_appfl.cli import run
from fedspallm_appfl.cli.arguments import add_config, command
from fedspallm_appfl.cli.checked import console

if TYPE_CHECKING:
    from fedspallm_appfl.settings.schema import Config


def add(verbs: Any) -> None:
    """Declare the verb."""
    parser = command(
        verbs,
        "recover",
        "Fit the kept weights of a model that was pruned before, by whatever tool, to the texts of the clients.",
        "fedspallm recover runs/demo configs/demo.yaml run_dir=runs/demo-recovered",
        "fedspallm recover models/wanda-70 configs/demo.yaml run_dir=runs/recovered recovery.steps=32",
    )
    parser.add_argument("pruned", metavar="RUN_DIR_OR_MODEL", help="run_dir of a finished run, or a model folder")
    add_config(parser)
    run.add_options(parser)
    parser.set_defaults(work=work)


def work(args: argparse.Namespace) -> int:
    """Do it."""

    def change(config: "Config") -> "Config":
        from fedspallm_appfl.rounds.beginning import to_recover

        made = to_recover(config, args.pruned)
        asked, found = (str(one.client_configs.train_configs.sparsity) for one in (config, made))
        if asked != found:
            words = f"the zeros of {args.pruned} stay: sparsity {found}; {asked}, of the configuration, is not used"
            console().print(words, highlight=False, markup=False)
        return made

    args.change = change
    return run.work(args)
