"""The settings that stay at a client's site: the paths of its private text and of its copy of the model.

Over Globus Compute the server's configuration names no path of a client. The worker reads them from its own YAML file,
named by the environment variable FEDSPALLM_SITE (set in `worker_init` of the endpoint):

    model: ~/models/Llama-2-7b-hf      # if this site's copy is not at the server's model.path
    clients:                           # the clients of this endpoint
      hospital-a: {text: notes/}     # and `field`, the column of records, if it is not `text`; `identity`, its secret key
    store: {folder: /mnt/exchange}     # if this site reaches the data store another way
    may_send: [weights, masks, values] # uploads that may leave this site; recovery only if it is named
    evaluation: false                  # the pruned model is not measured on text of this site; true if left out
    min_tokens: 8192                   # no upload is made of fewer tokens; losses are not covered: evaluation: false
    trust_remote_code: true            # run Python code that the model folder brings along; the server cannot ask for it
    plugins: [ria.py]                  # pruners and algorithms of this site's own; the server names no code
    audit: audit.jsonl                 # a line for each task: what was asked for, what left
    approved: approved.txt             # only configurations in it are served (fedspallm site --approve)
    roster: roster.yaml                # client -> public key, as the sites have agreed on them (fedspallm site --keys)
    secure_sums: required              # no upload but parts of secure sums; losses still leave: evaluation: false

Relative paths start from the folder of the file.
"""

import difflib
import glob
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from fedspallm_appfl.algorithms.algorithm import UPLOADS
from fedspallm_appfl.errors import ConfigError, quoted
from fedspallm_appfl.models.storage.checkpoint import resolve_model
from fedspallm_appfl.pruning.pruner import Pruner
from fedspallm_appfl.settings import yaml_text as yaml_io
from fedspallm_appfl.settings.schema import Store
from fedspallm_appfl.texts.files import HUB

SITE = "FEDSPALLM_SITE"
FILES = ("audit", "approved", "roster")
KEYS = {
    "model",
    "clients",
    "store",
    "may_send",
    "min_tokens",
    "plugins",
    "trust_remote_code",
    "evaluation",
    "secure_sums",
    *FILES,
}
CLIENT_KEYS = {"text", "field", "identity"}
REQUIRED = "required"
STORE_KEYS = {one.name for one in fields(Store)} - {"connector"}  # which store it is, the server says
TOKEN_COUNTS = "token_counts"  # statistics that may tell how often each token occurs in the text
RECOVERY = "recovery"  # changes of kept weights after training on the text
SENDINGS = (*UPLOADS, TOKEN_COUNTS, RECOVERY)
BLANK = "<private text>"
SHORT_NAME = 3  # characters; names this short occur in many words


@dataclass(frozen=True)
class Site:
    """The settings of one client at its site.

    Attributes:
        model: the dense model here; None if the server's `model.path` is also right here.
        text: private text: a file, a folder or a list of these; None if the pruner needs none.
        store: keys of the data store that differ here.
        may_send: which of `SENDINGS` may leave; the last two of them only where the site file names them.
        min_tokens: no upload is made of fewer tokens; None: only statistics have a limit, the width of an input. Losses
            (`evaluation`) have none.
        plugins: files or modules that add pruners or algorithms here.
        trust_remote_code: code of the model folder may run here.
        field: column of records that holds the text; None for the server's `data.field`.
        evaluation: clients may measure the pruned model on their text, and tell the sum of losses.
        audit: file that gets a line for each task; None for none.
        approved: file of the configurations that are served; None for any.
        roster: file of public keys, with whose clients alone it takes part in secure sums; None for any clients.
        identity: file of the client's secret key.
        only_secure_sums: no upload but parts of secure sums; losses are for `evaluation`.
    """

    model: str | None = None
    text: list[str] | None = None
    store: Mapping[str, Any] = field(default_factory=dict)
    may_send: frozenset[str] = frozenset(UPLOADS)
    min_tokens: int | None = None
    plugins: tuple[str, ...] = ()
    trust_remote_code: bool = False
    field: str | None = None
    evaluation: bool = True
    audit: str | None = None
    approved: str | None = None
    roster: str | None = None
    identity: str | None = None
    only_secure_sums: bool = False

    def require_consent(self, client: str, sendings: set[str]) -> None:
        """Refuse to send what must not leave this site.

        Args:
            client: whom to name.
            sendings: which of `SENDINGS` the server asks for.

        Raises:
            ConfigError: an upload must not leave.
        """
        kept = sorted(sendings - self.may_send)
        if kept:
            asked = (
                f" (gram.first_input: private needs {TOKEN_COUNTS}, and so does gram.propagate: pruned, where the "
                "server decides what inputs depend on)"
            )
            instead = "set recovery.rounds to 0" if kept == [RECOVERY] else "use another algorithm"
            raise ConfigError(
                f"client {client}: this site does not send {', '.join(kept)}; {instead}"
                f"{asked if TOKEN_COUNTS in kept else ''}, or add them to may_send in the site file"
            )

    def require_text(self, client: str, pruner: Pruner, recovers: bool = False) -> None:
        """Refuse to prune without text where the pruner, or what follows it, needs some.

        Args:
            client: whom to name.
            pruner: its pruner.
            recovers: kept weights are to be fitted to the text.

        Raises:
            ConfigError: the site file names no text.
        """
        if not self.text and (recovers or pruner.needs is not None):
            raise ConfigError(
                f"client {client}: the site file names no private text; give `text` under clients: {client}:"
            )

    def require_tokens(self, client: str, least: int | None) -> None:
        """Refuse statistics of too few tokens.

        Args:
            client: whom to name.
            least: the minimum that the server asks for; None for the width of an input.

        Raises:
            ConfigError: the minimum is below that of this site.
        """
        if least is not None and (self.min_tokens is None or least < self.min_tokens):
            own = self.min_tokens or "the width of an input"
            raise ConfigError(
                f"client {client}: this site sends no statistics of fewer tokens than {own}, gram.min_tokens is {least}; "
                "remove gram.min_tokens, or set min_tokens in the site file"
            )

    def require_windows(self, client: str, tokens: int) -> None:
        """Refuse to prune on too few tokens, whatever leaves.

        Args:
            client: whom to name.
            tokens: tokens of its windows.

        Raises:
            ConfigError: they are below the minimum of this site.
        """
        if self.min_tokens is not None and tokens < self.min_tokens:
            raise ConfigError(
                f"client {client}: this site sends nothing that was made of fewer tokens than {self.min_tokens}, and its "
                f"windows have {tokens}; raise data.windows, or lower min_tokens in the site file"
            )

    def require_training(self, client: str, tokens: int, windows: int) -> None:
        """Refuse to train on too few tokens, from whose gradients text might be read back.

        Args:
            client: whom to name.
            tokens: tokens of all steps together.
            windows: tokens of its windows.

        Raises:
            ConfigError: one of them is below the minimum of this site.
        """
        if self.min_tokens is not None and min(tokens, windows) < self.min_tokens:
            raise ConfigError(
                f"client {client}: this site trains on no fewer tokens than {self.min_tokens}; the steps of recovery take "
                f"{tokens}, the windows have {windows}; raise recovery.steps or data.windows, or lower min_tokens in the "
                "site file"
            )

    def model_folder(self, path: str) -> Path:
        """The folder of the dense model here.

        Args:
            path: the server's `model.path`, used if this site names none.

        Raises:
            ModelError: there is none.
        """
        return resolve_model(self.model, key="`model` in the site file") if self.model else resolve_model(path)

    def without_paths(self, words: str) -> str:
        """Words that may be sent: the private text's path and what follows it are blanked."""
        for name in sorted(self._private_names(), key=len, reverse=True):
            words = words.replace(name, BLANK)
        for path in self.text or []:
            for form in {path, str(Path(path).resolve())}:
                words = re.sub(re.escape(form) + r"[^\s'\":;,)]*", BLANK, words)
        return words

    def _private_names(self) -> set[str]:
        """Paths and names of all files in the folders of the text; a name may be a patient's and may have spaces."""
        names = set()
        for path in self.text or []:
            root = Path(path).expanduser()
            matched = glob.iglob(str(root), recursive=True) if glob.has_magic(str(root)) else ()  # noqa: PTH207
            for file in root.rglob("*") if root.is_dir() else map(Path, matched):
                names |= {str(file), str(file.resolve())}
                names |= {file.name} if len(file.name) > SHORT_NAME else set()
        return names


def load_site(client: str) -> Site:
    """This site's settings for one client.

    Raises:
        ConfigError: the file is not named or cannot be read, or does not list the client.
    """
    named = os.environ.get(SITE)
    if not named:
        raise ConfigError(
            f"client {client}: this endpoint names no site file; write one with the paths of the private text and add "
            f"to worker_init: export {SITE}=/path/to/site.yaml"
        )
    return read_site_file(Path(named).expanduser(), f"client {client}: ").of(client)


@dataclass(frozen=True)
class SiteFile:
    """A site file that was read.

    Attributes:
        file: where it is.
        shared: what holds for every client.
        clients: client -> its entry, not checked yet.
    """

    file: Path
    shared: Site
    clients: Mapping[str, Any]

    def of(self, client: str) -> Site:
        """The entry of one client.

        Raises:
            ConfigError: it does not list the client, or the entry has a key other than `CLIENT_KEYS`.
        """
        if client not in self.clients:
            known = ", ".join(self.clients) or "none"
            raise ConfigError(f"client {client}: the site file of this endpoint lists {known}; add it under `clients`")
        own = self.clients[client] or {}
        if not isinstance(own, dict) or set(own) - CLIENT_KEYS:  # the entry may hold a path, so the message omits it
            raise ConfigError(
                f"client {client}: under clients in the site file a client has only the keys `text`, `field` and `identity`"
            )
        texts = [_whole(self.file, text, f"client {client}: ") for text in _listed(own.get("text"))]
        column = own.get("field")
        if not isinstance(column, str | None):
            raise ConfigError(f"client {client}: `field` in the site file must be the name of a column")
        identity = own.get("identity")
        if not isinstance(identity, str | None):
            raise ConfigError(f"client {client}: `identity` in the site file must be the name of a file")
        identity = _file(identity, self.file, f"client {client}: ")
        return replace(self.shared, text=texts or None, field=column, identity=identity)


def read_site_file(file: Path, who: str) -> SiteFile:
    """Read the settings for all clients.

    Args:
        file: the site file.
        who: beginning of error messages.

    Raises:
        ConfigError: the file cannot be read or has wrong content; the message shows none of its content except
            `model`, `may_send` and `min_tokens`, because it may be sent.
    """
    content = _read(file, who)
    model = content.get("model")
    shared = Site(
        model=_model(model, file, who) if model else None,
        store=_store(content.get("store") or {}, file, who),
        may_send=_sendings(content, who),
        min_tokens=_min_tokens(content.get("min_tokens"), who),
        plugins=_plugins(content.get("plugins"), file, who),
        trust_remote_code=_yes_or_no(content, "trust_remote_code", False, who),
        evaluation=_yes_or_no(content, "evaluation", True, who),
        audit=_file(content.get("audit"), file, who),
        approved=_file(content.get("approved"), file, who),
        roster=_file(content.get("roster"), file, who),
        only_secure_sums=_required(content, "secure_sums", who),
    )
    return SiteFile(file, shared, {str(client): own for client, own in (content.get("clients") or {}).items()})


def _model(named: str, file: Path, who: str) -> str:
    """A folder as an absolute path; any other name unchanged, because it may be a hub name."""
    whole = _whole(file, named, who)
    try:
        return whole if Path(whole).is_dir() else named
    except OSError as error:
        raise ConfigError(f"{who}the folder `model` of the site file cannot be accessed: {error.strerror}") from error


def _store(named: Mapping[str, Any], file: Path, who: str) -> dict[str, Any]:
    if set(named) - STORE_KEYS or not isinstance(named.get("folder"), str | None):
        raise ConfigError(
            f"{who}store in the site file may have only the keys {', '.join(sorted(STORE_KEYS))}, and folder "
            "must be text"
        )
    return dict(named) | ({"folder": _whole(file, named["folder"], who)} if named.get("folder") else {})


def _plugins(named: Any, file: Path, who: str) -> tuple[str, ...]:
    if named is not None and not (isinstance(named, list) and all(isinstance(one, str) for one in named)):
        raise ConfigError(f"{who}plugins in the site file is a list of Python files or modules")
    return tuple(_whole(file, one, who) if one.endswith(".py") else one for one in named or ())


def _file(named: str | None, file: Path, who: str) -> str | None:
    return _whole(file, named, who) if named else None


def _yes_or_no(content: Mapping[str, Any], key: str, default: bool, who: str) -> bool:
    named = content.get(key, default)
    if not isinstance(named, bool):
        raise ConfigError(f"{who}{key} in the site file is true or false")
    return named


def _required(content: Mapping[str, Any], key: str, who: str) -> bool:
    if content.get(key, REQUIRED) != REQUIRED:
        raise ConfigError(f"{who}{key} in the site file is {REQUIRED}, or left out")
    return key in content


def _min_tokens(named: Any, who: str) -> int | None:
    if named is not None and (type(named) is not int or named < 1):
        raise ConfigError(f"{who}min_tokens in the site file must be a number of tokens, got {quoted(named)}")
    return named


def _sendings(content: Mapping[str, Any], who: str) -> frozenset[str]:
    if "may_send" not in content:
        return frozenset(UPLOADS)
    named = content["may_send"]
    rule = f"{who}may_send in the site file must be a list of {', '.join(SENDINGS)}"
    if not isinstance(named, list):
        raise ConfigError(f"{rule}, got {quoted(named)}; write it in brackets, e.g. may_send: [weights, masks], or []")
    wrong = [one for one in named if one not in SENDINGS]
    near = [name for one in wrong for name in difflib.get_close_matches(str(one), SENDINGS, n=1)]
    if wrong:
        raise ConfigError(f"{rule}, got {wrong}" + (f"; did you mean {', '.join(near)}?" if near else ""))
    return frozenset(named)


def _read(file: Path, who: str) -> dict[str, Any]:
    try:
        content = yaml_io.load(file.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{who}the site file ({SITE}) cannot be read: {_why(error)}") from error
    wrong = not isinstance(content, dict) or set(content) - KEYS
    groups = () if wrong else (content.get("clients"), content.get("store"))
    if wrong or not all(isinstance(group, dict | None) for group in groups):
        raise ConfigError(
            f"{who}the site file may have only the keys {', '.join(sorted(KEYS))}, and clients and store "
            "must have keys of their own"
        )
    if not isinstance(content.get("model"), str | None):
        raise ConfigError(f"{who}model in the site file must be a folder or a hub name")
    if not all(isinstance(content.get(name), str | None) for name in FILES):
        raise ConfigError(f"{who}{', '.join(FILES)} in the site file are names of files")
    return content


def _why(error: Exception) -> str:
    """Where the file is wrong, without its content."""
    mark = getattr(error, "problem_mark", None)
    if mark:
        return (
            f"invalid YAML at line {mark.line + 1}, column {mark.column + 1} (look for a tab, bracket or quote), or a "
            "key occurs twice in the part that begins there"
        )
    if isinstance(error, yaml.reader.ReaderError):
        return f"YAML does not allow its character {error.position + 1}"
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 (byte {error.start})"
    return getattr(error, "strerror", None) or type(error).__name__


def _listed(paths: Any) -> list[str]:
    return [str(path) for path in paths] if isinstance(paths, list) else [str(paths)] if paths else []


def _whole(file: Path, path: str, who: str) -> str:
    """An absolute path; the working directory of a worker is the endpoint's. A data set of the hub is left as it is."""
    if path.startswith(HUB):  # other names are files here, also where the hub has a text of that name
        return path
    try:
        return str(file.resolve().parent / Path(path).expanduser())
    except RuntimeError as error:
        raise ConfigError(f"{who}a path in the site file begins with ~ and an unknown user name") from error
