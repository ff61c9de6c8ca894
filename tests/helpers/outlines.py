"""A model of four small matrices, and experiments on it, for predictions that can be made by hand."""

import torch

from fedspallm_appfl.estimates.traffic import ModelSizes
from fedspallm_appfl.models.layout import Linear
from fedspallm_appfl.settings.schema import Client, Config

LINEARS = (
    Linear("attention.q", (4, 4), False),
    Linear("attention.out", (4, 4), False),
    Linear("mlp.up", (8, 4), False),
    Linear("mlp.down", (4, 8), False),
)  # 96 entries
MODEL = ModelSizes(100, (104, 104), (LINEARS, LINEARS), 10, torch.float16, torch.float32)
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
    for key, value in changes.items():
        if hasattr(config.gram, key):
            setattr(config.gram, key, value)
    return config
