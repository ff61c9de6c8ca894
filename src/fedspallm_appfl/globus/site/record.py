"""What a site writes down of each task, and what its operator has approved.

`audit` in the site file names a file that gets one JSON line a task: what was asked for, how many tokens it took, and the
size and SHA-256 of everything that left. `approved` names a file of configurations that may be served, one hash a line;
what waits for approval lies beside it. Both stay at the site.
"""

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedspallm_appfl.errors import ConfigError
from fedspallm_appfl.globus.site.site_file import Site
from fedspallm_appfl.settings.schema import ClientSettings, plain

HERE = {  # decided at the site, or of no importance
    "agreed",
    "checkpoints",
    "checkpoint_every",
    "device",
    "devices",
    "identity",
    "secrets",
    "trainer",
}
MOST_WAITING = 100  # configurations that are kept for approval
SHORT = 16  # characters of a hash that people type


def configuration(settings: ClientSettings) -> dict[str, Any]:
    """What the server asks for, without paths of the server's, which mean nothing here."""
    asked: dict[str, Any] = plain(settings)
    asked = {name: value for name, value in asked.items() if name not in HERE}
    asked["model"] = {name: value for name, value in asked["model"].items() if name != "path"}
    asked["data"] = {name: value for name, value in asked["data"].items() if name not in ("text", "pool")}
    asked["comm"] = {name: value for name, value in asked["comm"].items() if name != "store"}
    return asked


def hash_of(settings: ClientSettings) -> str:
    """The hash by which an operator approves a configuration; every value of it counts."""
    text = json.dumps(configuration(settings), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:SHORT]


def require_approval(site: Site, settings: ClientSettings) -> None:
    """Refuse a configuration that nobody at this site has approved, and keep it for whoever does.

    Raises:
        ConfigError: it is not approved; or the file cannot be read.
    """
    if site.approved is None:
        return
    name, file = hash_of(settings), Path(site.approved)
    if name in approved(file):
        return
    there = waiting(file)
    if name not in there and len(there) < MOST_WAITING:
        waits = {"hash": name, "client": settings.client_id, "configuration": configuration(settings)}
        _append(_waiting(file), f"{json.dumps(waits)}\n")
    raise ConfigError(
        f"client {settings.client_id}: this site serves only configurations that it has approved, and {name} is not; "
        f"somebody at the site may look at it and approve it: fedspallm site SITE.yaml --approve {name}"
    )


def approved(file: Path) -> set[str]:
    """The hashes in a file: the first word of each line, but for lines that begin with #.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        lines = file.read_text("utf-8").splitlines() if file.exists() else []
    except (OSError, ValueError) as error:
        raise ConfigError("`approved` in the site file names a file that cannot be read") from error
    return {line.split()[0] for line in lines if line.strip() and not line.startswith("#")}


def waiting(file: Path) -> dict[str, dict[str, Any]]:
    """Hash -> what was asked for, of configurations that were refused and are not approved yet.

    Raises:
        ConfigError: the list cannot be read.
    """
    if not _waiting(file).is_file():
        return {}
    try:
        lines = {(line := json.loads(text))["hash"]: line for text in _waiting(file).read_text("utf-8").splitlines()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            "the list of what waits for approval, beside `approved` of the site file, cannot be read"
        ) from error
    return {name: line for name, line in lines.items() if name not in approved(file)}


def approve(file: Path, name: str) -> dict[str, Any]:
    """Approve a configuration that waits; returns what was asked for.

    Raises:
        ConfigError: none of that hash waits, or the file cannot be written.
    """
    there = waiting(file)
    if name not in there:
        raise ConfigError(f"no configuration {name} waits; there are {', '.join(there) or 'none'}")
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    _append(file, f"{name} client {there[name]['client']}, approved {when}\n", 0o666)
    return there[name]


class Record:
    """One task, for the audit log."""

    def __init__(self, site: Site, request: Mapping[str, Any], function: str) -> None:
        """Begin.

        Args:
            site: names the log, or none.
            request: the task.
            function: what the service was asked to run.

        Raises:
            ConfigError: the log cannot be written; nothing is done then.
        """
        self._file = Path(site.audit) if site.audit else None
        told = request.get("instructions")
        self._line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "run": str(request.get("run", "")),
            "client": str(request.get("client", "")),
            "function": function,
            "asked": told if isinstance(told, dict) else {},
            "configuration": "",
            "tokens": 0,
            "left": [],
            "error": "",
        }
        if self._file:
            _append(self._file)

    def settings(self, settings: ClientSettings) -> None:
        """Note what the server asks for."""
        self._line["configuration"] = hash_of(settings)
        self._line["tokens"] = settings.data.windows * settings.data.length

    def leaves(self, data: bytes) -> None:
        """Note what leaves."""
        if self._file:
            self._line["left"].append({"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})

    def failed(self, words: str) -> None:
        """Note why nothing more leaves."""
        self._line["error"] = words

    def write(self) -> None:
        """Write the line."""
        if self._file:
            _append(self._file, f"{json.dumps(self._line)}\n")


def _waiting(file: Path) -> Path:
    return file.with_name(f"{file.name}.waiting")


def _append(file: Path, line: str = "", mode: int = 0o600) -> None:
    """Append a line; without one, see whether that can be done."""
    try:
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, mode), "w", encoding="utf-8") as opened:
            opened.write(line)
    except OSError as error:
        raise ConfigError(f"a file that the site file names cannot be written: {error.strerror}") from error
