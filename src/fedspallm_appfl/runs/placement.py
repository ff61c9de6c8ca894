"""Where clients run: their assignment to ranks, and the table of it."""

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from fedspallm_appfl.errors import ConfigError
from fedspallm_appfl.settings.schema import Client


@dataclass(frozen=True)
class Place:
    """Where a group of clients runs.

    Attributes:
        rank: MPI rank or worker process, 0 where there is only one process.
        host: name of the node.
        clients: ids of the clients on it.
        device: e.g. `cpu` or `cuda:1`, or all those of a client that uses several.
        threads: CPU threads per client.
        bound: the value of CUDA_VISIBLE_DEVICES, or an empty string.
    """

    rank: int
    host: str
    clients: tuple[str, ...]
    device: str
    threads: int
    bound: str


def describe(rank: int, clients: Sequence[tuple[Client, Sequence[str]]], threads: int) -> list[Place]:
    """Lines of the placement table, one for each device and number of threads.

    Args:
        rank: MPI rank or worker process, 0 where there is only one process.
        clients: each client with its devices.
        threads: CPU threads of clients for which the configuration says nothing.
    """
    bound = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    together: dict[tuple[str, int], list[str]] = {}
    for client, devices in clients:
        key = ", ".join(devices), client.train_configs.threads or threads
        together.setdefault(key, []).append(client.client_id)
    host = socket.gethostname()
    return [Place(rank, host, tuple(names), device, each, bound) for (device, each), names in together.items()]


def batches(clients: list[str], ranks: int, others: int = 1) -> list[list[str]]:
    """Assign consecutive clients to ranks; the numbers per rank differ by at most one.

    Args:
        clients: all of them.
        ranks: that run clients.
        others: ranks that run none: the server, and those that fold for it.

    Raises:
        ConfigError: there are more ranks than clients.
    """
    if not 0 < ranks <= len(clients):
        folding = f", {others - 1} fold for it" if others > 1 else ""
        raise ConfigError(
            f"{len(clients)} clients can use 1 to {len(clients)} client ranks, got {ranks + others} ranks in all; start "
            f"mpiexec with -n {others + 1} to -n {len(clients) + others} (rank 0 is the server{folding})"
        )
    size, extra = divmod(len(clients), ranks)
    starts = [rank * size + min(rank, extra) for rank in range(ranks + 1)]
    return [clients[a:b] for a, b in zip(starts, starts[1:], strict=False)]
