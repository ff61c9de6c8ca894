"""Check every endpoint before anything is sent: one row per client; red cells say what to change at the site."""

import time
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
import transformers
from rich.markup import escape

from fedspallm_appfl import __version__
from fedspallm_appfl.errors import FederationError
from fedspallm_appfl.globus.server.run import Connection
from fedspallm_appfl.globus.server.turn import POLL
from fedspallm_appfl.globus.site.site_file import SITE
from fedspallm_appfl.globus.store.data_store import GREETING
from fedspallm_appfl.reports.terminal import ConsoleTable
from fedspallm_appfl.settings.schema import Client
from fedspallm_appfl.wire.metadata import printable

PACKAGES = ("fedspallm-appfl", "appfl", "torch", "transformers")
COLUMNS = ("endpoint", "Python", "packages", "GPU", "model", "text", "store")
OLDEST_PYTHON = (3, 10)
INSTALL = "add to worker_init: . ENVIRONMENT/bin/activate, an environment in which fedspallm-appfl {} is installed"


@dataclass(frozen=True)
class Cell:
    """One finding about one client.

    Attributes:
        ok: whether the client can take part.
        says: what was found, or what to change.
    """

    ok: bool
    says: str


Findings = dict[str, dict[str, Cell]]


def look(connection: Connection) -> Findings:
    """Ask every endpoint.

    Args:
        connection: to the clients.

    Returns:
        Client -> column -> cell; columns that could not be checked are missing, and a red one says why.
    """
    config, wire = connection.config, connection.wire
    findings: Findings = {client.client_id: {"endpoint": _reachable(connection, client)} for client in config.clients}
    asked = [client for client in config.clients if findings[client.client_id]["endpoint"].ok]
    if connection.store:
        connection.store.put(GREETING, b"hello")
    for client in asked:
        request = connection.request(client, [GREETING], [_name(client)], config.server_configs.preflight_deadline)
        try:
            wire.send_task_to_one_client(client.client_id, "look_around", metadata=request)
        except FederationError as error:
            findings[client.client_id]["endpoint"] = Cell(False, str(error))
    deadline = time.monotonic() + config.server_configs.preflight_deadline
    while wire.busy() and time.monotonic() < deadline:
        outcome = wire.recv_result_from_one_client(timeout=POLL)
        if outcome is not None:
            findings[outcome.client] |= _read(outcome, connection)
    for client_id in wire.busy():
        findings[client_id]["endpoint"] = Cell(
            False,
            f"online, but no answer in {config.server_configs.preflight_deadline:g} s; see its endpoint.log; is a task of "
            "an earlier run still active there? If its workers wait in a queue, raise server_configs.preflight_deadline",
        )
    wire.cancel_all_tasks()
    if connection.store:
        connection.remove({GREETING, *(_name(client) for client in asked)})
    return findings


def require(findings: Findings, least: int | None) -> None:
    """Refuse to run unless enough clients can take part.

    Args:
        findings: the result of `look`.
        least: how many clients are needed; None for all.

    Raises:
        FederationError: too few can take part.
    """
    fine = [client for client, cells in findings.items() if all(cell.ok for cell in cells.values())]
    if len(fine) < (least or len(findings)):
        lines = "".join(f"\n  - {line}" for line in problems(findings))
        raise FederationError(
            f"{len(fine)} of {len(findings)} clients can take part, {least or len(findings)} are needed "
            f"(server_configs.min_clients){lines}"
        )


def problems(findings: Findings) -> list[str]:
    """The red cells of the table, one line each."""
    return [
        f"client {client}: {column}: {cell.says}"
        for client, cells in findings.items()
        for column, cell in cells.items()
        if not cell.ok
    ]


def table(findings: Findings) -> ConsoleTable:
    """The findings as a table, without truncation."""
    made = ConsoleTable(title="Preflight", title_justify="left", show_lines=True)
    for column in ("client", *COLUMNS):
        made.add_column(column)
    for client, cells in findings.items():
        made.add_row(escape(client), *(_shown(cells.get(column)) for column in COLUMNS))
    return made


def _shown(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    return escape(cell.says) if cell.ok else f"[red]no: {escape(cell.says)}[/red]"


def _name(client: Client) -> str:
    """Name of a client's own object of the preflight."""
    return f"{client.client_id}.greeting"


def _reachable(connection: Connection, client: Client) -> Cell:
    status = connection.wire.status_of(client.client_id)
    if status == "online":
        return Cell(True, status)
    remedy = {
        "unknown": "; globus-compute-endpoint list shows the right one at its site",
        "offline": "; at its site: globus-compute-endpoint start NAME",
    }
    return Cell(False, f"endpoint_id {client.endpoint_id} is {status}{remedy.get(status, '')}")


def _read(outcome: Any, connection: Connection) -> dict[str, Cell]:
    """Cells for the answer of a client's endpoint, which may be anything."""
    result = outcome.result
    if not isinstance(result, dict):
        return {"endpoint": Cell(False, printable(outcome.problem) or "its answer does not have the expected format")}
    cells = {"endpoint": Cell(True, f"online, {_text(result.get('host'))}"), "Python": _python(result.get("python"))}
    cells["packages"] = _packages(_group(result, "versions"), result.get("not_importable"))
    if "not_importable" in result:
        return cells
    checks = _group(result, "checks")
    for name in ("GPU", "model", "text", "store"):
        check = checks.get(name)
        if isinstance(check, dict):
            cells[name] = Cell(check.get("ok") is True, _text(check.get("says")))
    if "text" not in cells:
        cells["text"] = Cell(False, f"not checked; {SITE} must name the site file")
    return cells


def _group(result: dict[str, Any], name: str) -> dict[str, Any]:
    group = result.get(name)
    return group if isinstance(group, dict) else {}


def _text(value: Any) -> str:
    return printable(value)[:500]


def _python(version: Any) -> Cell:
    try:
        new_enough = tuple(int(part) for part in str(version).split(".")[:2]) >= OLDEST_PYTHON
    except ValueError:
        new_enough = False
    if new_enough:
        return Cell(True, _text(version))
    return Cell(False, f"{_text(version)}, 3.10 or newer is needed; {INSTALL.format(__version__)}")


def _packages(versions: dict[str, Any], not_importable: Any) -> Cell:
    """Installed packages, missing ones, and other versions than here."""
    missing = [name for name in PACKAGES if not isinstance(versions.get(name), str)]
    if missing:
        return Cell(False, f"not installed: {', '.join(missing)}; {INSTALL.format(__version__)}")
    found = {name: _text(versions[name]) for name in PACKAGES}
    if found["fedspallm-appfl"] != __version__:
        here = f"fedspallm-appfl {found['fedspallm-appfl']}, the server has {__version__}"
        return Cell(False, f"{here}; {INSTALL.format(__version__)}")
    if not_importable is not None:
        return Cell(False, f"cannot be imported: {_text(not_importable)}; {INSTALL.format(__version__)}")
    ours = {"torch": torch.__version__, "transformers": transformers.__version__, "appfl": version("appfl")}
    other = [f"{name} {found[name]}, here {own}" for name, own in ours.items() if own != found[name]]
    return Cell(True, "\n".join(other) or "as here")
