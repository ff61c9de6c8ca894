"""Where messages of clients that share a process arrive, and from where they are answered together."""

from collections.abc import Container, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

from fedspallm_appfl.errors import UpdateError
from fedspallm_appfl.wire.metadata import word

Answers = dict[str, dict[str, Any]]


class Desk:
    """Takes one message of each client of a process, and answers when all of these clients can go on.

    A process is known by a number.

    A client that fails, or whose upload is refused where others are to be spared, is left out of the round.
    """

    def __init__(self, agent: Any) -> None:
        """The server's agent."""
        self._agent = agent
        self._waiting: dict[int, dict[str, Future]] = {}

    def take(self, process: int, client: str, update: Any, metadata: Mapping[str, Any]) -> None:
        """Fold a message, or note that its client has failed (`absent`: why, `waits`: for the end of the exchange).

        Raises:
            UpdateError: it is not what was assigned, and nobody is spared.
        """
        scheduler = self._agent.scheduler
        if "absent" in metadata:
            answer = scheduler.leave_out(client, metadata["absent"], metadata["waits"])
        else:
            try:
                answer = self._agent.global_update(client, update, blocking=False, **metadata)
            except UpdateError as error:
                if not scheduler.spare_others:
                    raise
                why = {"why": str(error), "traceback": "", "host": word(metadata.get("host")), "blocks": ""}
                total = metadata.get("_total_chunks")
                last = type(total) is int and metadata.get("_chunk_idx") == total - 1
                answer = scheduler.leave_out(client, why, last)
        self._waiting.setdefault(process, {})[client] = answer

    def answers(self, of: Container[int]) -> Iterator[tuple[int, Any, Answers]]:
        """(process, payload for its clients, client -> metadata), of those processes all of whose clients can go on."""
        for process, waiting in list(self._waiting.items()):
            if process in of and all(future.done() for future in waiting.values()):
                answers = {client: future.result() for client, future in waiting.items()}
                del self._waiting[process]
                payload = next(iter(answers.values()))[0]  # the same for all; what differs stands in the metadata
                yield process, payload, {client: told for client, (_, told) in answers.items()}
