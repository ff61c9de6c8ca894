"""What verbs share: a configuration without problems, and where results are printed."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedspallm_appfl import __version__
from fedspallm_appfl.errors import refuse
from fedspallm_appfl.settings.imports import importing

if TYPE_CHECKING:
    from rich.console import Console

    from fedspallm_appfl.settings.schema import Config


def well_formed(file: str, overrides: Sequence[str]) -> "Config":
    """A configuration with valid keys, types and values, as far as they show without torch.

    Raises:
        ConfigError: lists every wrong key, or if there is none every wrong value.
    """
    from fedspallm_appfl.settings import rules
    from fedspallm_appfl.settings.reading import load_config

    config, problems = load_config(Path(file), overrides)
    refuse(file, problems)
    refuse(file, rules.check(config))
    return config


def checked(
    file: str,
    overrides: Sequence[str],
    files: bool,
    overwrite: bool,
    globus: bool | None = None,
    change: "Callable[[Config], Config] | None" = None,
    resume: bool = False,
    announce: bool = False,
) -> "Config":
    """A configuration without problems.

    Args:
        file: the configuration.
        overrides: `key=value`.
        files: open model and text as well.
        overwrite: earlier results may be replaced.
        globus: it is for a run over Globus Compute; None if the endpoints of the clients say so.
        change: what the verb makes of the configuration before it is checked.
        resume: a run that was cut off may be gone on with.
        announce: say that model and text are opened, before seconds of imports.

    Raises:
        ConfigError: lists all problems that were found.
    """
    config = well_formed(file, overrides)
    if announce:
        console().print(
            f"fedspallm-appfl {__version__}: opening model and text of {file}", highlight=False, markup=False
        )
    with importing("transformers"):
        from fedspallm_appfl.api import prepared, problems_of
    config = change(config) if change else config
    globus = config.over_globus() if globus is None else globus
    refuse(file, problems_of(config, globus, files, overwrite, resume))
    return prepared(config, globus)


def introduce(config: "Config", console: "Console") -> None:
    """Say what is going to happen."""
    from fedspallm_appfl.validation.words import forecast

    for line in forecast(config):
        console.print(line, highlight=False, markup=False)


def console(plain: bool = False) -> "Console":
    """Where results go; `plain` under mpiexec, which may give its ranks a terminal although its own output is none."""
    from fedspallm_appfl.reports.progress import console

    return console(force_terminal=False) if plain else console()
