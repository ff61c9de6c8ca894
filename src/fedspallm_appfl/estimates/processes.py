"""How many worker processes a run is worth, where the configuration says `workers: auto`."""

import dataclasses
import os
import tempfile

import torch

from fedspallm_appfl.devices import choose_devices, proc_bytes
from fedspallm_appfl.errors import ConfigError
from fedspallm_appfl.estimates.job import Job, windows_of
from fedspallm_appfl.estimates.memory import client_memory, server_memory
from fedspallm_appfl.rounds.participants import comparisons
from fedspallm_appfl.runs.processes import cores
from fedspallm_appfl.settings import plugins
from fedspallm_appfl.settings.schema import Config

PACKAGES = 430_000_000  # measured: bytes that a worker holds before it does anything
WORTH = 1.5e11  # operations; to start a process takes about as long as these on one core
PASSES = 3  # of all tokens through a block: to collect, with what was pruned, and what pruning takes
LONGEST = 75  # bytes; a socket's address may have 103, and further names follow
USUAL = 100  # windows of a text, where all are taken
SHARE = 0.8  # of the free memory, for all processes together


def settled(config: Config, runs: int = 0, job: Job | None = None) -> Config:
    """The configuration with a number of worker processes.

    Args:
        config: the experiment.
        runs: so many experiments like it are each to be run in one process; 0 to share one among processes.
        job: of the experiment, if it was opened before.

    Raises:
        ConfigError: it wants several where only this process knows the code of a pruner or an algorithm, or where the name
            of the folder for temporary files has no room for a socket.
    """
    own, place = plugins.ADDED and not config.plugins, tempfile.gettempdir()
    crowded = not runs and len(os.fsencode(place)) > LONGEST
    if config.workers == "auto":
        return dataclasses.replace(config, workers=str(1 if own or crowded else _useful(job or Job.of(config), runs)))
    if crowded and config.workers != "1":
        raise ConfigError(
            f"workers: {config.workers} processes need a socket in the folder for temporary files, whose name has at most "
            f"{LONGEST} bytes, got {place}; set TMPDIR to another one, or use workers: 1"
        )
    if own and config.workers != "1":
        raise ConfigError(
            f"workers: {config.workers} processes cannot know {', '.join(sorted(plugins.ADDED))}, which this process has "
            "registered; put it into a file that `plugins` names, or use workers: 1"
        )
    return config


def _useful(job: Job, runs: int) -> int:
    """As many as there are cores or GPUs, as memory allows, and as are worth their start."""
    if any(len(client.train_configs.devices) > 1 for client in job.clients):
        return 1  # each has its devices to itself
    place, *_ = choose_devices(job.clients[0].train_configs, 0)
    at_once = cores() if place == "cpu" else torch.cuda.device_count()
    models = 1 + len(job.clients) if job.algorithm.apart else 2 + len(comparisons(job.config))
    tasks = runs or max(len(job.clients), models * len(job.config.evaluation.texts))
    return max(1, min(at_once, tasks, int(max(1, runs) * _operations(job, models) / WORTH), _room(job)))


def _operations(job: Job, models: int) -> float:
    asked = job.config.evaluation
    tokens = PASSES * sum(windows * length for windows, length in (windows_of(job, client) for client in job.clients))
    tokens += models * len(asked.texts) * (asked.windows or USUAL) * asked.length
    return 2.0 * (sum(job.model.blocks) + job.model.outer) * tokens


def _room(job: Job) -> int:
    """How many fit into the memory that is free; as many as one likes where the system does not say."""
    free = proc_bytes("meminfo", "MemAvailable")
    if free is None:
        return cores()
    each = PACKAGES + max(client_memory(job, client).needed for client in job.clients)
    return int((SHARE * free - server_memory(job).needed) / each)
