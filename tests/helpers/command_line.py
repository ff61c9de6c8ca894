"""Commands as documents show them, read by the real parser."""

import argparse
import shlex

from fedspallm_appfl import cli


def parse(command, monkeypatch):
    """What the real command line makes of a command that begins with `fedspallm`, without doing it."""
    parsed = []
    build = cli.parser_of_all

    def parser_that_records():
        parser = build()
        [action] = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        for verb in action.choices.values():
            verb.set_defaults(work=lambda args: parsed.append(args) or 0)
        return parser

    monkeypatch.setattr(cli, "parser_of_all", parser_that_records)
    assert cli.main(shlex.split(command, comments=True)[1:]) == 0
    monkeypatch.undo()
    return parsed[0]
