"""`fedspallm study`."""

import argparse
from pathlib import Path
from typing import Any

from fedspallm_appfl.cli.arguments import add_config, command
from fedspallm_appfl.cli.checked import console, well_formed
from fedspallm_appfl.errors import refuse
from fedspallm_appfl.settings.imports import importing


def add(verbs: Any) -> None:
    """Declare the verb."""
    parser = command(
        verbs,
        "study",
        "Compare algorithms and targets on the same clients with several seeds: tables and plots (docs/study.md).",
        "fedspallm study configs/demo.yaml --sparsity 0.5 0.7 --seeds 0 1",
        "fedspallm study configs/demo.yaml --algorithms standalone fedspallm gram gram+admm --out runs/four",
    )
    add_config(parser)
    parser.add_argument(
        "--algorithms",
        nargs="+",
        metavar="NAME",
        help="NAME, with +PRUNER, +fisher, +recovery, or a preset; docs/study.md (default: eleven methods)",
    )
    parser.add_argument("--sparsity", nargs="+", default=[], metavar="TARGET", help="default: that of CONFIG.yaml")
    parser.add_argument("--seeds", nargs="+", default=[], metavar="SEED", help="default: that of CONFIG.yaml")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the results (default: RUN_DIR-study)")
    parser.add_argument(
        "--keep-models", nargs="*", metavar="NAME", help="leave the pruned models in DIR/runs; of these methods only"
    )
    parser.add_argument(
        "--share-uploads",
        action="store_true",
        help="make models of standalone and fedavg of the uploads in the run of fedspallm, which saves their runs",
    )
    parser.add_argument("--overwrite", action="store_true", help="start over instead of continuing an earlier study")
    parser.set_defaults(work=work)


def work(args: argparse.Namespace) -> int:
    """Do it."""
    lists = {name: getattr(args, name) or [] for name in ("algorithms", "sparsity", "seeds", "keep_models")}
    late = [word for words in lists.values() for word in words if "=" in word]  # overrides after a list of names
    names, targets, seeds, keep = ([word for word in words if "=" not in word] for words in lists.values())
    overrides = [*args.overrides, *late]
    well_formed(args.config, overrides)

    with importing("transformers"):
        from fedspallm_appfl.study import measure, plan

    kept = None if args.keep_models is None else keep
    found, problems = plan.planned(
        Path(args.config), overrides, names or plan.DEFAULT, targets, seeds, args.out, kept, args.share_uploads
    )
    refuse(args.config, problems)
    measure.study(found, console(), args.overwrite)
    return 0
