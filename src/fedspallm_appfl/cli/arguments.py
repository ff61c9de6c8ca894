"""What verbs share: how their arguments are declared."""

import argparse
from typing import Any

OVERRIDES = "key=value arguments replace single values: client_configs.train_configs.sparsity=0.7 run_dir=runs/70"


def command(verbs: Any, name: str, what: str, *examples: str) -> argparse.ArgumentParser:
    """A parser with a sentence and examples.

    Args:
        verbs: what the verb is added to; None for the command itself.
        name: of the verb.
        what: it does, in a sentence.
        *examples: whole commands.
    """
    words: Any = {
        "description": what,
        "epilog": "\n  ".join(["example:", *examples]),
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }
    if verbs is None:
        return argparse.ArgumentParser(prog=name, **words)
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=what, **words)
    return parser


def add_config(parser: argparse.ArgumentParser) -> None:
    """CONFIG.yaml and overrides."""
    parser.add_argument("config", metavar="CONFIG.yaml", help="the experiment")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=OVERRIDES)


def positive(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"at least 1, got {text}")
    return int(text)
