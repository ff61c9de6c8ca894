"""Uploads of made-up clients, for the benchmarks of the server."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import random_mask
from fedspallm_appfl.models.layout import Layout, Linear
from fedspallm_appfl.rounds.folds.context import Context
from fedspallm_appfl.rounds.server import GlobalModel
from fedspallm_appfl.settings.schema import ServerSettings
from fedspallm_appfl.wire.packed import pack
from fedspallm_appfl.wire.update import make_update

Shapes = Mapping[str, tuple[int, int]]
SEVEN_B = {  # the linears of a block of LLaMA-2-7B: 405 MB in float16
    **{f"self_attn.{name}_proj": (4096, 4096) for name in "qkvo"},
    "mlp.gate_proj": (11008, 4096),
    "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}
SMALL = {"self_attn.q_proj": (64, 64), "mlp.down_proj": (64, 96)}


def one_block(shapes: Shapes) -> Layout:
    """The layout of a model of one block."""
    return Layout("model.layers", (tuple(Linear(name, shape, False) for name, shape in shapes.items()),))


def matrix(shape: tuple[int, int], seed: int, share: float = 0.5) -> tuple[Tensor, Tensor]:
    """A pruned matrix (O, I) float16 and its mask; clients share most of what they keep, as real ones do."""
    common = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    own = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1))
    mask = random_mask(shape, int(share * shape[0] * shape[1]), seed)
    return (0.02 * (common + 0.1 * own) * mask).half(), mask


def upload(shapes: Shapes, seed: int) -> dict[str, Any]:
    """One client's upload of all linears of block 0."""
    return make_update(0, {0: {name: pack(*matrix(shape, seed), torch.float16) for name, shape in shapes.items()}})


def _no_dense(block: int, name: str) -> Tensor:
    raise RuntimeError("these uploads bring their values, so the server needs no dense weights")


def context(shapes: Shapes, folder: Path) -> Context:
    """What a server of FedSpaLLM at 50 % works with."""
    return Context(one_block(shapes), torch.float16, ServerSettings(screening="off"), folder, "cpu", _no_dense)


def receive_all(shapes: Shapes, clients: int, uploads: list[Any], folder: Path) -> GlobalModel:
    """Let a new server take the uploads of all clients, one after another; there may be fewer uploads than clients."""
    server = GlobalModel(context(shapes, folder))
    server.begin_round(0, {f"client-{number}": [0] for number in range(clients)})
    for number in range(clients):
        server.receive(f"client-{number}", uploads[number % len(uploads)], 1)
    return server
