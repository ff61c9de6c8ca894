"""Choose a device.

A GPU is chosen by the rank's index among the client ranks of its node, never by its global rank, and only from the GPUs
that the process can see: a scheduler's CUDA_VISIBLE_DEVICES is respected. If a process sees one GPU, it
uses that one. If there are more ranks than GPUs, ranks share GPUs in turn.
"""

import re
import socket

import torch

from fedspallm_appfl.errors import ConfigError


def is_device(asked: str) -> bool:
    """Whether a device is `auto`, `cpu`, `cuda` or `cuda:N`."""
    return asked in ("auto", "cpu", "cuda") or re.fullmatch(r"cuda:[0-9]+", asked) is not None


def choose_device(asked: str, local_rank: int) -> str:
    """The device for a client.

    Args:
        asked: `auto`, `cpu`, `cuda` or `cuda:N`.
        local_rank: index of this process among the client processes of its node, from 0.

    Raises:
        ConfigError: the device is none of these, or a GPU that this process cannot see.
    """
    if not is_device(asked):
        raise ConfigError(f"a device must be auto, cpu, cuda or cuda:N; got {asked!r}")
    if asked == "cpu":
        return "cpu"
    seen = torch.cuda.device_count()
    if asked.startswith("cuda:"):
        if int(asked.removeprefix("cuda:")) >= seen:
            raise ConfigError(f"device {asked} was requested on {socket.gethostname()}, which has {seen} visible GPUs")
        return asked
    if not seen:
        if asked == "cuda":
            raise ConfigError(
                f"device cuda was requested on {socket.gethostname()}, which has no visible GPU; use auto"
            )
        return "cpu"
    return f"cuda:{local_rank % seen}"
