"""`fedspallm push`: the model of a finished run, or any model folder, to the hub."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedspallm_appfl import __version__
from fedspallm_appfl.cli.arguments import command
from fedspallm_appfl.cli.checked import console
from fedspallm_appfl.errors import ConfigError, first_line, shortened

CARD = "README.md"


def add(verbs: Any) -> None:
    """Declare the verb."""
    parser = command(
        verbs,
        "push",
        "Upload the model of a finished run, with its card, to the hub; private unless --public is given.",
        "fedspallm push runs/demo owner/demo-50 --dry-run",
        "fedspallm push runs/demo owner/demo-50 --base-model owner/demo --public",
    )
    parser.add_argument("folder", metavar="RUN_DIR_OR_MODEL", type=Path, help="run_dir of a run, or a model folder")
    parser.add_argument("name", metavar="OWNER/NAME", help="the repository on the hub; made if need be")
    parser.add_argument("--base-model", metavar="NAME", help="name of the dense model on the hub, for the card")
    parser.add_argument("--public", action="store_true", help="everybody can read it")
    parser.add_argument("--dry-run", action="store_true", help="say what would be sent, and send nothing")
    parser.set_defaults(work=work)


def work(args: argparse.Namespace) -> int:
    """Do it. Of a run only the model folder is sent: reports and metrics name clients and their machines."""
    folder, shown = _model(args.folder), console()
    if args.base_model and not args.dry_run:
        _name_base(folder, args.base_model)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    visible = "public" if args.public else "private"
    shown.print(f"{folder} to {args.name}, {visible}:", highlight=False, markup=False)
    for file in files:
        shown.print(f"  {file.relative_to(folder)}  {file.stat().st_size:,} bytes", highlight=False, markup=False)
    if not _says_licence(folder):
        shown.print(f"{CARD} names no licence: look up that of the base model before you pass this on", highlight=False)
    if args.dry_run:
        shown.print("nothing was sent (--dry-run)", highlight=False)
        return 0
    shown.print(_sent(folder, args.name, args.public), highlight=False, markup=False)
    return 0


def _model(folder: Path) -> Path:
    """The model folder of a run, or the folder itself.

    Raises:
        ConfigError: there is none.
    """
    for place in (folder / "model", folder):
        if (place / "config.json").is_file():
            return place
    apart = sorted((folder / "models").glob("*/model")) if (folder / "models").is_dir() else []
    which = (
        f"it has one for each client: name one, such as {apart[0]}" if apart else "name the run_dir of a finished run"
    )
    raise ConfigError(f"{folder} holds no model; {which}")


def _name_base(folder: Path, base: str) -> None:
    """Write the name of the dense model into the card."""
    card = _card(folder)
    card.data.base_model = base
    card.save(folder / CARD)


def _says_licence(folder: Path) -> bool:
    return bool(_card(folder).data.license)


def _card(folder: Path) -> Any:
    from huggingface_hub import ModelCard

    if not (folder / CARD).is_file():
        raise ConfigError(f"{folder} has no card; write {CARD}, or push the run_dir of a run, whose model has one")
    try:
        return ModelCard.load(folder / CARD)
    except ValueError as error:
        raise ConfigError(
            f"{folder / CARD} cannot be read ({shortened(first_line(error))}); mend its front matter"
        ) from error


def _sent(folder: Path, name: str, public: bool) -> str:
    """Upload a folder; returns where it is."""
    from huggingface_hub import HfApi

    api = HfApi(library_name="fedspallm-appfl", library_version=__version__)
    with _explained(name):
        made = api.create_repo(name, private=not public, exist_ok=True)
        if not public and not api.model_info(made.repo_id).private:
            raise ConfigError(f"{name} is there already and public; give --public, or another name")
        api.upload_folder(
            repo_id=made.repo_id, folder_path=folder, commit_message=f"Pruned with fedspallm-appfl {__version__}"
        )
    return str(made.url)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """What can go wrong with the hub.

    Raises:
        ConfigError: says it.
    """
    from httpx import HTTPError
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except HFValidationError as error:
        raise ConfigError(f"{name} is no name for the hub ({shortened(first_line(error))})") from error
    except (LocalTokenNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, HTTPError, OSError) as error:
        why = shortened(first_line(error))
        raise ConfigError(
            f"{name} could not be uploaded ({why}); log in with `hf auth login`, with a token that may write, and see "
            "that the hub can be reached (HF_HUB_OFFLINE, HF_ENDPOINT)"
        ) from error
