"""Which device each client runs on.

A GPU is chosen by the rank's place among the client ranks of its node, never by its global rank, and only among the GPUs
that the process can see: what a scheduler bound with CUDA_VISIBLE_DEVICES stays bound. Where a process sees one GPU, it
uses that. More ranks than GPUs share them in turn.
"""

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedspallm_appfl.config import Client
from fedspallm_appfl.errors import ConfigError


@dataclass(frozen=True)
class Place:
    """Where some clients run.

    Attributes:
        rank: MPI rank, 0 in one process.
        host: name of the node.
        clients: ids of the clients on it.
        device: e.g. `cpu` or `cuda:1`.
        threads: CPU threads of a client.
        bound: what CUDA_VISIBLE_DEVICES says, or an empty string.
    """

    rank: int
    host: str
    clients: tuple[str, ...]
    device: str
    threads: int
    bound: str


def choose_device(asked: str, local_rank: int) -> str:
    """The device for a client.

    Args:
        asked: `auto`, `cpu`, `cuda` or `cuda:N`.
        local_rank: place of this process among the client processes of its node, from 0.

    Raises:
        ConfigError: a GPU was asked for that this process cannot see.
    """
    if asked == "cpu":
        return "cpu"
    seen = torch.cuda.device_count()
    if asked.startswith("cuda:"):
        if int(asked.removeprefix("cuda:")) >= seen:
            raise ConfigError(f"device {asked} was asked for on {socket.gethostname()}, where {seen} GPUs can be seen")
        return asked
    if not seen:
        if asked == "cuda":
            raise ConfigError(
                f"device cuda was asked for on {socket.gethostname()}, where no GPU can be seen; use auto"
            )
        return "cpu"
    return f"cuda:{local_rank % seen}"


def describe(rank: int, clients: Sequence[tuple[Client, str]]) -> list[Place]:
    """Lines of the placement table, one for each device and number of threads.

    Args:
        rank: MPI rank, 0 in one process.
        clients: each client with its device.
    """
    bound = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    together: dict[tuple[str, int], list[str]] = {}
    for client, device in clients:
        threads = client.train_configs.threads or torch.get_num_threads()
        together.setdefault((device, threads), []).append(client.client_id)
    host = socket.gethostname()
    return [Place(rank, host, tuple(names), device, threads, bound) for (device, threads), names in together.items()]


def batches(clients: list[str], ranks: int) -> list[list[str]]:
    """Deal clients out to ranks in runs of neighbours whose lengths differ by one at most.

    Raises:
        ConfigError: there are more ranks than clients.
    """
    if not 0 < ranks <= len(clients):
        raise ConfigError(
            f"{len(clients)} clients can use 1 to {len(clients)} client ranks, got {ranks}; start "
            f"mpiexec with -n 2 to -n {len(clients) + 1} (rank 0 is the server)"
        )
    size, extra = divmod(len(clients), ranks)
    starts = [rank * size + min(rank, extra) for rank in range(ranks + 1)]
    return [clients[a:b] for a, b in zip(starts, starts[1:], strict=False)]
