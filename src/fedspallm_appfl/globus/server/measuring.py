"""After the last round: each client measures the finished model where its text lies.

A task loads what the client lacks of the model and returns a number of tokens and two sums of losses. Who fails, is late or
is not allowed to is named in the report; the run does not fail for it.
"""

import time
from typing import TYPE_CHECKING, Any

from fedspallm_appfl.errors import DataStoreError, FederationError, UpdateError
from fedspallm_appfl.events import OnEvent
from fedspallm_appfl.globus.server.results import LONGEST_LINE
from fedspallm_appfl.globus.server.turn import GRACE, POLL
from fedspallm_appfl.wire.metadata import printable

if TYPE_CHECKING:
    from fedspallm_appfl.globus.server.run import Connection


def measure(connection: "Connection", server: Any, down: list[dict[str, Any]], on_event: OnEvent) -> None:
    """Ask every client that took part to the end.

    Args:
        connection: to the clients.
        server: the server's agent, after the last round.
        down: where the payloads are that went down in the rounds.
        on_event: gets an event for each client.
    """
    aggregator = server.aggregator
    names = [client.client_id for client in connection.config.clients]
    asked = aggregator.instructions(names).get("measure", {})
    missing = {name: "it was left out of the last round" for name in asked if name in aggregator.given_up()}
    missing |= {name: "it is still working on an earlier round" for name in connection.wire.busy() if name in asked}
    for client in connection.config.clients:
        name = client.client_id
        if name in asked and name not in missing:
            try:
                _send(connection, server, client, asked[name], down)
            except (FederationError, DataStoreError) as error:
                missing[name] = str(error)
    _collect(connection, server, set(asked) - set(missing), missing)
    for name, why in missing.items():
        on_event({"event": "unmeasured", "client": name, "why": printable(why)[:LONGEST_LINE]})


def _send(connection: "Connection", server: Any, client: Any, pieces: int, down: list[dict[str, Any]]) -> None:
    name = client.client_id
    places = [_placed(connection, server, name, number) for number in range(pieces)]
    reads = [place["stored"] for place in [*down, *places] if "stored" in place]
    deadline = connection.config.server_configs.round_deadline
    request = connection.request(client, reads, [], deadline and deadline + GRACE)
    request |= {"down": down, "final": places, "instructions": {"measure": True}}
    connection.wire.send_task_to_one_client(name, "prune", metadata=request)


def _placed(connection: "Connection", server: Any, client: str, number: int) -> dict[str, Any]:
    """Where a piece of the finished model is; what all clients need is placed once."""
    return connection.place_once(
        server.aggregator.final_name(client, number), lambda: server.aggregator.final_piece(client, number)
    )


def _collect(connection: "Connection", server: Any, waiting: set[str], missing: dict[str, str]) -> None:
    deadline = time.monotonic() + (connection.config.server_configs.round_deadline or float("inf"))
    while waiting and time.monotonic() < deadline:
        left = deadline - time.monotonic()
        outcome = connection.wire.recv_result_from_one_client(timeout=max(0.0, min(POLL, left)))
        if outcome is None or outcome.client not in waiting:
            continue
        waiting.discard(outcome.client)
        result = outcome.result if isinstance(outcome.result, dict) else {}
        if isinstance(error := result.get("error"), dict):
            missing[outcome.client] = str(error.get("message", ""))
            continue
        try:
            server.aggregator.take_losses(outcome.client, result.get("losses"))
        except UpdateError as error:
            missing[outcome.client] = outcome.problem or str(error)
    missing |= dict.fromkeys(waiting, "it had not answered in time")
