"""What becomes of a client that fails in a process that it shares with others: it is left out of the round."""

import socket
import traceback
from typing import Any

from fedspallm_appfl.errors import FedSpaLLMError
from fedspallm_appfl.settings.schema import Config

MESSAGE = 1000  # characters of a reason


def spares(config: Config) -> bool:
    """Whether a round goes on without a client that fails: where it is said how few may take part."""
    return config.server_configs.min_clients is not None


def spare(server: Any, config: Config) -> None:
    """Tell the server's agent of it."""
    server.scheduler.spare_others = spares(config)
    server.scheduler.all_attend = True
    server.scheduler.least = config.server_configs.min_clients or len(config.clients)


def described(error: Exception) -> dict[str, str]:
    """Why a client is left out, in the words of an event."""
    expected = isinstance(error, FedSpaLLMError)
    words = str(error) if expected else f"{type(error).__name__}: {error}"
    stack = "" if expected else "".join(traceback.format_exception(error))
    return {"why": words[:MESSAGE], "traceback": stack, "host": socket.gethostname(), "blocks": ""}


def made(agent: Any, absent: dict[str, dict[str, str]], spares: bool) -> tuple[Any, dict[str, Any]] | None:
    """The next message of a client, and its metadata; None if it fails.

    Args:
        agent: the client's.
        absent: who is left out of the round, and why; the client is added where it fails.
        spares: whether others go on without a client that fails; else its error is raised.
    """
    try:
        agent.train()
        message: tuple[Any, dict[str, Any]] = agent.get_parameters()
        return message
    except Exception as error:
        if not spares:
            raise
        absent[agent.trainer.client_id] = described(error)
        return None


def tell(agent: Any, payload: Any, told: dict[str, Any]) -> None:
    """Give a client what goes down; one that could not be opened misses the payload."""
    if agent.trainer.is_open:
        agent.load_parameters((payload, told))
    else:
        agent.trainer.miss(payload)
        agent.trainer.follow(told)


def hand(agent: Any, piece: Any, absent: dict[str, dict[str, str]], spares: bool) -> None:
    """Give a client a piece of what went down before the run was cut off; arguments as of `made`."""
    try:
        agent.trainer.client.take(piece)
    except Exception as error:
        if not spares:
            raise
        absent.setdefault(agent.trainer.client_id, described(error))
        agent.trainer.miss(piece)
