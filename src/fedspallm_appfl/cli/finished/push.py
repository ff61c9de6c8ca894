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
from fedspallm_appfl.models.storage.folder import CARD, INDEX_ENDINGS, companions


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
    _require_name(args.name)
    from fedspallm_appfl.models.storage.checkpoint import model_in

    folder = model_in(args.folder, "RUN_DIR_OR_MODEL")
    card = _card(folder)
    if args.base_model:
        card.data.base_model = args.base_model
    files: list[tuple[str, Path | bytes]] = [*_files(folder), (CARD, str(card).encode())]
    lines = [f"{folder} to {args.name}, {'public' if args.public else 'private'}:"]
    lines += [f"  {name}  {len(one) if isinstance(one, bytes) else one.stat().st_size:,} bytes" for name, one in files]
    if not card.data.license:
        lines.append(f"{CARD} names no licence: look up that of the base model before you pass this on")
    console().print("\n".join(lines), highlight=False, markup=False)
    done = "nothing was sent (--dry-run)" if args.dry_run else _sent(files, args.name, args.public)
    console().print(done, highlight=False, markup=False)
    return 0


def _require_name(name: str) -> None:
    """See that a repository can be called so.

    Raises:
        ConfigError: it cannot.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
        why = "" if "/" in name else "it takes OWNER/NAME"
    except HFValidationError as error:
        why = shortened(first_line(error))
    if why:
        raise ConfigError(f"{name} is no name for the hub ({why})")


def _files(folder: Path) -> list[tuple[str, Path]]:
    """Name -> file of all that belongs to a model, without its card."""
    from fedspallm_appfl.models.storage.checkpoint import CheckpointFiles

    indices = (one.name for one in folder.iterdir() if one.name.endswith(INDEX_ENDINGS))
    files = {name: folder / name for name in (*CheckpointFiles(folder).shards, *indices)} | dict(companions(folder))
    return sorted((name, file) for name, file in files.items() if name != CARD)


def _card(folder: Path) -> Any:
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    if not (folder / CARD).is_file():
        raise ConfigError(f"{folder} has no card; write {CARD}, or push the run_dir of a run, whose model has one")
    try:
        return ModelCard.load(folder / CARD)
    except (ValueError, YAMLError) as error:
        raise ConfigError(
            f"{folder / CARD} cannot be read ({shortened(first_line(error))}); mend its front matter"
        ) from error


def _sent(files: list[tuple[str, Path | bytes]], name: str, public: bool) -> str:
    """Upload files in one commit; returns where they are."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api, words = HfApi(library_name="fedspallm-appfl", library_version=__version__), f"fedspallm-appfl {__version__}"
    with _explained(name):
        made = api.create_repo(name, private=not public, exist_ok=True)
        if api.model_info(made.repo_id).private == public:
            there, other = ("private", "leave --public out") if public else ("public", "give --public")
            raise ConfigError(f"{name} is there already and {there}; {other}, or name another")
        api.create_commit(made.repo_id, [CommitOperationAdd(place, one) for place, one in files], commit_message=words)
    return str(made.url)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """What can go wrong with the hub.

    Raises:
        ConfigError: says it.
    """
    from httpx import HTTPError
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except (LocalTokenNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, HTTPError, OSError) as error:
        why = shortened(first_line(error))
        raise ConfigError(
            f"{name} could not be uploaded ({why}); log in with `hf auth login`, with a token that may write, and see "
            "that the hub can be reached (HF_HUB_OFFLINE, HF_ENDPOINT)"
        ) from error
