"""How many clients pruned each entry of a matrix, from masks alone.

Legend: O out features, I in features, N clients.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedspallm_appfl.aggregation.l0_mean import vote_dtype
from fedspallm_appfl.tensors import bitmask


@dataclass
class Votes:
    """Votes of the clients that were counted.

    Attributes:
        pruned: (O, I) uint8 or int16, number of clients that pruned the entry.
        clients: N so far.
    """

    pruned: Tensor
    clients: int = 0

    @classmethod
    def empty(cls, shape: tuple[int, int], clients: int, device: torch.device | str = "cpu") -> "Votes":
        """No votes yet, of at most so many clients on a matrix of shape (O, I)."""
        return cls(torch.zeros(shape, dtype=vote_dtype(clients), device=device))

    def add(self, bits: Tensor) -> None:
        """Count one client's mask, (ceil(O * I / 8),) uint8 (see `bitmask`)."""
        self.pruned += ~bitmask.from_bits(bits, tuple(self.pruned.shape))
        self.clients += 1

    def merge(self, other: "Votes") -> None:
        """Add the votes of another round on the same matrix."""
        self.pruned = self.pruned.to(vote_dtype(self.clients + other.clients))
        self.pruned += other.pruned
        self.clients += other.clients
