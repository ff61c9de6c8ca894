"""Random numbers that follow from names alone, whatever process asks for them, and in whatever order."""

import hashlib

import torch


def generator(*names: object) -> torch.Generator:
    """Seeded by names: what the numbers are for, the seed of the run, a client, a matrix."""
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
