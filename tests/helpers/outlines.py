"""A model of four small matrices, and experiments on it, for predictions that can be made by hand."""

from dataclasses import replace

import torch

from fedspallm_appfl.estimates.job import Job, Outline
from fedspallm_appfl.models.layout import Layout, Linear
from fedspallm_appfl.settings.schema import Client, Config

LINEARS = (
    Linear("attention.q", (4, 4), False),
    Linear("attention.out", (4, 4), False),
    Linear("mlp.up", (8, 4), False),
    Linear("mlp.down", (4, 8), False),
)  # 96 entries


def outline(*blocks, together=False, stored=torch.float16):
    """A model of these blocks; linears of a block all share one input, or none do."""
    groups = tuple((tuple(one.name for one in b),) if together else tuple((one.name,) for one in b) for b in blocks)
    entries = tuple(sum(linear.entries for linear in block) + 8 for block in blocks)
    return Outline(Layout("layers", blocks), groups, 100, entries, 10, stored, torch.float32)


MODEL = outline(LINEARS, LINEARS)
PACKED = 2 * (2 + 8 * 2) + 2 * (4 + 16 * 2)  # half of each matrix in float16, and a bit an entry: 108
MASKS = 2 * 2 + 2 * 4


def client(name="a", **changes):
    """A client with six windows of eight tokens; `changes` go wherever there is such a key."""
    made = Client(client_id=name)
    made.data.text = "text.txt"
    made.data.windows, made.data.length, made.data.batch = 6, 8, 2
    for group in (made.train_configs, made.data, made.comm_configs):
        for key, value in changes.items():
            if hasattr(group, key):
                setattr(group, key, value)
    return made


def experiment(count=2, algorithm="fedspallm", **changes):
    """Clients that are all alike."""
    config = Config(clients=[client(name, **changes) for name in "abcdefgh"[:count]], algorithm=algorithm)
    for name in ("train_configs", "data", "comm_configs"):
        setattr(config.client_configs, name, getattr(config.clients[0], name))
    config.gram = replace(config.gram, **{key: value for key, value in changes.items() if hasattr(config.gram, key)})
    return config


def job(config, model=MODEL):
    """The experiment on the model; what follows from the configuration is kept, so that a changed one needs another job."""
    return Job(config, model)
