"""The output of `fedspallm site`: a site file as a worker would read it, for users who may see its paths."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.text import Text

from fedspallm_appfl.algorithms.algorithm import SUMMED
from fedspallm_appfl.errors import ConfigError, FedSpaLLMError
from fedspallm_appfl.globus.site import identities, record
from fedspallm_appfl.globus.site.site_file import SENDINGS, TOKEN_COUNTS, Site, SiteFile, read_site_file
from fedspallm_appfl.models.storage.checkpoint import is_hub_name, resolve_model
from fedspallm_appfl.reports.terminal import ConsoleTable
from fedspallm_appfl.settings import custom_code
from fedspallm_appfl.texts.checks import look_at
from fedspallm_appfl.texts.files import are_tokens, text_files
from fedspallm_appfl.texts.tokenizer import load_tokenizer
from fedspallm_appfl.texts.windows import Cut, windows_of

NOT_COUNTED = "-"
ENOUGH = 128  # windows; more are not counted
WRONG = "[red]no[/red]"


@dataclass
class _Looked:
    """The findings about one client's text; cells of the table.

    Attributes:
        where: its paths.
        files: number of files in these paths.
        size: bytes of text in them.
        windows: number of whole windows of tokens.
    """

    where: str = WRONG
    files: str = NOT_COUNTED
    size: str = NOT_COUNTED
    windows: str = NOT_COUNTED
    problems: list[str] = field(default_factory=list)


def check(file: Path, model: Path | None, length: int) -> tuple[Group, list[str]]:
    """Check everything that a site file names.

    Args:
        file: the site file.
        model: folder of the model whose tokenizer counts; None for the site file's `model`.
        length: tokens in a window.

    Returns:
        A row for each client with what holds for all of them below, and the problems.

    Raises:
        ConfigError: the file cannot be read, or has wrong content.
    """
    site_file = read_site_file(file, f"{file}: ")
    shared, problems = site_file.shared, []
    if not site_file.clients:
        problems.append("it lists no client; add the clients of this endpoint under `clients`")
    if shared.model and _folder(shared) is None and not is_hub_name(shared.model):
        place = file.resolve().parent / Path(shared.model).expanduser()
        problems.append(
            f"`model` is {place}, which is not a folder; name the folder of this site's copy, or owner/model of the hub"
        )
    problems += identities.problems(site_file)
    tokenizer = None
    try:
        tokenizer = _tokenizer(shared, model)
    except FedSpaLLMError as error:
        problems.append(f"model: {error}")
    table = _table(length)
    for client in site_file.clients:
        looked = _look(site_file, client, tokenizer, length)
        problems += looked.problems
        table.add_row(escape(client), looked.where, looked.files, looked.size, looked.windows)
    says = [f"model: {_model(shared)}", _leaves(shared), *identities.told(site_file)]
    if tokenizer is None:
        says.append("windows are not counted without a tokenizer; name one with --model FOLDER")
    if waits := waiting(shared):
        says += ["waiting for approval (--approve HASH):", *waits]
    return Group(table, *map(Text, says)), problems


def approve(file: Path, name: str) -> str:
    """Approve a configuration that waits; returns it in words.

    Raises:
        ConfigError: the site file names no file of approved ones, or none of that hash waits.
    """
    shared = read_site_file(file, f"{file}: ").shared
    if shared.approved is None:
        raise ConfigError(f"{file}: `approved` names no file, so every configuration is served")
    asked = record.approve(Path(shared.approved), name)
    return f"approved {name} for client {asked['client']}: {_in_words(asked['configuration'])}"


def keys(file: Path) -> str:
    """Make the identities that a site file names; their lines for the roster.

    Raises:
        ConfigError: a client has no `identity`, or one cannot be read.
    """
    return identities.make_keys(read_site_file(file, f"{file}: "))


def waiting(shared: Site) -> list[str]:
    """Configurations that wait for approval, in words."""
    there = record.waiting(Path(shared.approved)) if shared.approved else {}
    return [f"{name}  client {one['client']}: {_in_words(one['configuration'])}" for name, one in there.items()]


def _in_words(asked: Mapping[str, Any]) -> str:
    data = asked["data"]
    after = ", recovery" if asked["recovery"]["rounds"] else ""
    return (
        f"{asked['algorithm']} with {asked['pruner']}, sparsity {asked['sparsity']}, {data['windows']} windows of "
        f"{data['length']} tokens, {asked['rounds']} rounds{after}"
    )


def _folder(shared: Site) -> Path | None:
    return Path(shared.model) if shared.model and Path(shared.model).is_dir() else None


def _tokenizer(shared: Site, model: Path | None) -> Any:
    """The tokenizer; None if no folder is named. A hub name is not resolved: nothing must leave this machine."""
    if model is not None and not model.is_dir():
        raise ConfigError(f"--model {model} is not a folder here; name one")
    named = {"--model": model, "`model` in the site file": _folder(shared)}
    folders = [resolve_model(str(folder), key=key) for key, folder in named.items() if folder]
    if folders and shared.trust_remote_code:
        custom_code.allow(folders[0])
    return load_tokenizer(folders[0]) if folders else None


def _look(site_file: SiteFile, client: str, tokenizer: Any, length: int) -> _Looked:
    looked = _Looked()
    try:
        site = site_file.of(client)
        text = site.text
        if not text:
            looked.where = "none: can take part only with pruner magnitude"
            return looked
        looked.where = escape("\n".join(text))
        found, size = text_files(text), look_at(text, site.field)
        if left := found.left_out_words():
            looked.where += f"\n[dim]not text, left out: {escape(left)}[/dim]"
        looked.files = str(len(found.files))
        looked.size = f"{size:,}" if size else NOT_COUNTED
        if tokenizer is not None or are_tokens(text):
            windows = len(windows_of(text, Cut(length, field=site.field), tokenizer, ENOUGH))
            looked.windows = ("at least " if windows == ENOUGH else "") + str(windows) if windows else WRONG
            if not windows:
                looked.problems.append(
                    f"client {client}: {', '.join(text)} holds no window of {length} tokens; give more text, or "
                    "set --length to the server's data.length"
                )
    except (FedSpaLLMError, OSError) as error:
        looked.files = looked.size = WRONG
        looked.problems.append(str(error) if str(error).startswith("client ") else f"client {client}: {error}")
    return looked


def _model(shared: Site) -> str:
    if shared.model is None:
        return "the server's model.path"
    return shared.model if _folder(shared) else f"{shared.model}, not a folder here"


def _leaves(shared: Site) -> str:
    least = (
        f"no upload of fewer than {shared.min_tokens:,} tokens"
        if shared.min_tokens
        else "no grams of fewer tokens than an input is wide"
    )
    valid = (*SUMMED, TOKEN_COUNTS) if shared.only_secure_sums else SENDINGS
    sendings = ", ".join(one for one in valid if one in shared.may_send)
    parts = "parts of secure sums of " if sendings and shared.only_secure_sums else ""
    losses = "sums of losses on its own text" if shared.evaluation else ""
    leaving = "; ".join(filter(None, (parts + sendings, losses)))
    return f"may leave: {leaving or 'nothing'}; {least}"


def _table(length: int) -> ConsoleTable:
    numbers = ("files", "bytes", f"windows of {length} tokens")
    table = ConsoleTable(title="Site", title_justify="left", show_lines=True)
    for name in ("client", "text", *numbers):
        table.add_column(name, justify="right" if name in numbers else "left")
    return table
