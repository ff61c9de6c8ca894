"""`fedspallm validate`."""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from fedspallm_appfl.cli.arguments import add_config, command
from fedspallm_appfl.cli.checked import checked, console, introduce
from fedspallm_appfl.errors import ConfigError

if TYPE_CHECKING:
    from fedspallm_appfl.settings.schema import Config


def add(verbs: Any) -> None:
    """Declare the verb."""
    parser = command(
        verbs,
        "validate",
        "Report all problems of a configuration together; opens model and text, runs nothing.",
        "fedspallm validate configs/demo.yaml",
        "fedspallm validate configs/llama2_7b_4_clients.yaml --no-files",
    )
    add_config(parser)
    parser.add_argument("--no-files", action="store_true", help="look at the values only, not at model and text")
    parser.set_defaults(work=work)


def work(args: argparse.Namespace) -> int:
    """Do it."""
    config, shown = checked(args.config, args.overrides, files=not args.no_files, overwrite=True), console()
    shown.print(f"{args.config}: no problem found", highlight=False, markup=False)
    if not args.no_files:
        from fedspallm_appfl.runs.run_dir import problem

        introduce(config, shown)
        for note in (problem(config, overwrite=False), *_unseen(config)):
            if note:
                shown.print(f"note: {note}", highlight=False, markup=False)
    return 0


def _unseen(config: "Config") -> Iterator[str]:
    """Devices that are asked for and that this machine lacks: no problem, as the run may be meant for another one."""
    from fedspallm_appfl.devices import choose_device, choose_devices
    from fedspallm_appfl.validation.files import together

    asked: dict[str, Callable[[], object]] = {
        "the server": partial(choose_device, config.server_configs.device, 0),
        "the evaluation": partial(choose_device, config.evaluation.device, 0),
    }
    for client in [] if config.over_globus() else config.clients:
        asked[f"client {client.client_id}"] = partial(choose_devices, client.train_configs, 0)
    lacking = [(who, why) for who, choose in asked.items() if (why := _refusal(choose))]
    yield from (f"{', '.join(who)}: {why}; a run on this machine would fail" for who, why in together(lacking))


def _refusal(choose: Callable[[], object]) -> str | None:
    try:
        choose()
    except ConfigError as error:
        return str(error)
    return None
