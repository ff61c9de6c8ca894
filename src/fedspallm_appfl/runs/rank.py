"""What a process with some of the clients does through all rounds, whatever carries its messages to the server."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from fedspallm_appfl.events import Event
from fedspallm_appfl.runs.absence import hand, made, tell

Message = tuple[str, Any, dict[str, Any]]  # client, its update, its metadata


class Wire(Protocol):
    """Carries messages of a process to the server, and answers back."""

    def tell(self, event: Event) -> None:
        """Let the server hear of an event; there is no answer."""

    def get_global_model(self, **asked: Any) -> Any:
        """What the server has for the clients of this process: a payload, with metadata if there is some."""

    def exchange(self, messages: Iterator[Message], meanwhile: Callable[[], None]) -> tuple[Any, dict[str, Any]]:
        """Send one message of each client; returns (payload for all, client -> metadata with the server's `status`).

        `meanwhile` may be called once while they are on their way.
        """


@dataclass
class _Ahead:
    """What was made while the message before was on its way.

    Attributes:
        messages: client -> its next message and metadata.
        failed: client -> why it could not make it.
    """

    messages: dict[str, tuple[Any, dict[str, Any]]] = field(default_factory=dict)
    failed: dict[str, dict[str, str]] = field(default_factory=dict)


def all_rounds(wire: Wire, agents: dict[str, Any], sparing: bool) -> None:
    """Run clients from their first instructions to the measurement of the finished model.

    Args:
        wire: to the server.
        agents: client -> its agent.
        sparing: others go on without a client that fails.
    """
    for agent in agents.values():
        agent.trainer.on_event = wire.tell
    first = wire.get_global_model(init_model=True)
    told = first[1] if isinstance(first, tuple) else {}  # nothing is told where all rounds were done before
    for agent in agents.values():
        agent.trainer.follow(told)
    absent: dict[str, dict[str, str]] = dict.fromkeys(told.get("given_up", ()), {})
    ahead = _Ahead()
    for number in range(told.get("held", 0)):
        piece = wire.get_global_model(init_model=False, held=number)
        for agent in agents.values():
            hand(agent, piece, ahead.failed, sparing)  # which the server hears of at once
    status = "RUNNING" if "assign" in told else "DONE"
    while status != "DONE":
        status = _exchange(wire, agents, absent, sparing, ahead)
    _measure(wire, agents, absent)


def _exchange(
    wire: Wire, agents: dict[str, Any], absent: dict[str, dict[str, str]], sparing: bool, ahead: _Ahead
) -> str:
    """One message of each client; returns the server's status."""
    messages = _messages(agents, absent, sparing, ahead)
    payload, answers = wire.exchange(messages, lambda: _make_ahead(agents, absent, sparing, ahead))
    for name, answer in answers.items():
        tell(agents[name], payload, answer)
        if answer.get("left_out"):
            absent.setdefault(name, {})
    for number in range(1, payload.get("pieces", 1)):
        piece = wire.get_global_model(init_model=False, piece=number)
        for agent in agents.values():
            tell(agent, piece, {})
    if any(answer.get("exchange") == 0 for answer in answers.values()):
        absent.clear()
    status: str = next(iter(answers.values()))["status"]
    return status


def _make_ahead(agents: dict[str, Any], absent: Mapping[str, Any], sparing: bool, ahead: _Ahead) -> None:
    """Make the next message of each client, unless its exchange is over: what comes down then has to be taken first."""
    for name, agent in agents.items():
        if name not in absent and agent.trainer.client.in_exchange:
            message = made(agent, ahead.failed, sparing)
            if message is not None:
                ahead.messages[name] = message


def _messages(
    agents: dict[str, Any], absent: dict[str, dict[str, str]], sparing: bool, ahead: _Ahead
) -> Iterator[Message]:
    """The next message of each client: what was made ahead, if the server has not left the client out since.

    A client that fails says so once, and then waits with the others for the end of each exchange, until a round begins. The
    server hears of all who wait before the message that may end the exchange, the last.
    """
    before, last, ends = set(absent), None, True
    early, ahead.messages = ahead.messages, {}
    absent.update({name: why for name, why in ahead.failed.items() if name not in before})
    ahead.failed.clear()
    for name in [name for name in agents if name not in absent]:
        message = early.pop(name, None) or made(agents[name], absent, sparing)
        if message is None:
            continue
        if last is not None:
            yield last
        last = (name, *message)
        ends = message[1]["_chunk_idx"] + 1 == message[1]["_total_chunks"]
    for name in [name for name in agents if name in absent and (ends or name not in before)]:
        yield name, {}, {"absent": absent[name], "waits": ends}
    if last is not None:
        yield last


def _measure(wire: Wire, agents: dict[str, Any], absent: Mapping[str, Any]) -> None:
    """Let each client measure the finished model on its own text; they share what all are sent."""
    losses: dict[str, dict[str, Any]] = {}
    for name, agent in agents.items():
        if agent.trainer.lacking is None or name in absent:
            continue
        client = agent.trainer.client
        for number in range(agent.trainer.lacking if not losses or client.final is not client.agreed else 0):
            client.final.take(wire.get_global_model(init_model=False, final=number, client_id=name))
        losses[name] = client.measure()
    if losses:
        wire.get_global_model(init_model=False, losses=losses)
