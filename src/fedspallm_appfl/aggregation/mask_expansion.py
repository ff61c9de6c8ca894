"""Adaptive mask expansion: from votes to a mask of exactly the target size (docs/method.md section 3).

Source: Bai et al., "FedSpaLLM", NAACL 2025, section 3.3. The l0 mean is zero only where all clients pruned, so it is less
sparse than the target. Further entries are zeroed, those that most clients pruned first; ties by smallest |W_g|, then by
index. Votes are compared as integers and magnitudes only inside one class of votes: one float key made of both loses the
tie-break to rounding.

The comparison group is the whole matrix, which FedPrLLM (Guo et al., arXiv 2505.13547) found best, or each row; for n:m it
is the group of m.

Legend: O out features, I in features, N clients that pruned the matrix.
"""

import operator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedspallm_appfl.aggregation.l0_mean import vote_dtype
from fedspallm_appfl.tensors import bitmask
from fedspallm_appfl.tensors.sparsity import compared, first_in_groups, row_counts, smallest
from fedspallm_appfl.tensors.target import NM, Target

TILE = 2**17  # entries whose places, 8 bytes each, are made at a time


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

    @staticmethod
    def entry_bytes(clients: int) -> int:
        """Bytes an entry of the votes of so many clients."""
        return vote_dtype(clients).itemsize

    def add(self, bits: Tensor) -> None:
        """Count one client's mask, (ceil(O * I / 8),) uint8 (see `bitmask`)."""
        self.pruned += ~bitmask.from_bits(bits, tuple(self.pruned.shape))
        self.clients += 1

    def merge(self, other: "Votes") -> None:
        """Add the votes of another round on the same matrix."""
        self.pruned = self.pruned.to(vote_dtype(self.clients + other.clients))
        self.pruned += other.pruned
        self.clients += other.clients


def expand(votes: Tensor, clients: int, aggregate: Tensor, target: Target, group: str = "matrix") -> Tensor:
    """The global mask.

    Args:
        votes: (O, I) integer, number of clients that pruned the entry.
        clients: N; where `votes == N` nobody kept the entry and it stays zero.
        aggregate: (O, I) float, W_g; only its magnitude matters.
        target: ratio or n:m.
        group: `matrix` or `row`, where a ratio is counted.

    Returns:
        (O, I) bool, True = kept. Exactly `target.zeros(O * I)` entries are False, or more where more than that were
        pruned by everybody: then nothing is expanded.
    """
    if isinstance(target, NM):
        return _most_voted_in_groups(votes, clients, aggregate, target).logical_not_()
    if group == "row":
        counts = row_counts(target, *votes.shape).tolist()
        rows = zip(votes, aggregate, counts, strict=True)
        return ~torch.stack([_most_voted(v, clients, w, count) for v, w, count in rows])
    pruned = _most_voted(votes.flatten(), clients, aggregate.flatten(), target.zeros(votes.numel()))
    return pruned.logical_not_().view(votes.shape)


def _most_voted(votes: Tensor, clients: int, aggregate: Tensor, count: int) -> Tensor:
    """Choose `count` entries by votes (most first), magnitude (smallest first), index; all of the unanimous ones stay.

    No copy is made of more than the border class.
    """
    border, above = _border(votes, clients, count)
    if border == clients:
        return compared(operator.eq, votes, clients)
    inside = compared(operator.eq, votes, border)
    candidates = bitmask.gather(aggregate, bitmask.to_bits(inside)).abs_()
    pruned, chosen = compared(operator.gt, votes, border), smallest(candidates, count - above)
    return _fill(pruned, inside, chosen) if pruned.device.type == "cpu" else pruned.masked_scatter_(inside, chosen)


def _fill(pruned: Tensor, inside: Tensor, chosen: Tensor) -> Tensor:
    """`pruned.masked_scatter_(inside, chosen)`, twice as fast; all (n,) bool on a CPU."""
    taken = 0
    for tile, where in zip(pruned.split(TILE), inside.split(TILE), strict=True):
        places = np.flatnonzero(where.numpy())
        tile.numpy()[places] = chosen[taken : taken + len(places)].numpy()
        taken += len(places)
    return pruned


def _border(votes: Tensor, clients: int, count: int) -> tuple[int, int]:
    """The number of votes at which `count` is reached, coming from above, and how many entries have more."""
    histogram = torch.bincount(votes, minlength=clients + 1).tolist()
    border, above = clients, 0
    while above + histogram[border] < count:
        above += histogram[border]
        border -= 1
    return border, above


def _most_voted_in_groups(votes: Tensor, clients: int, aggregate: Tensor, target: NM) -> Tensor:
    """The same order inside each group of m."""
    v = votes.reshape(-1, target.group).T.contiguous()
    size = aggregate.reshape(-1, target.group).T.abs().contiguous()

    def sooner(a: int, b: int) -> Tensor:
        return (v[b] > v[a]) | ((v[b] == v[a]) & (size[b] < size[a]))

    shape = (votes.shape[0], votes.shape[1])
    return first_in_groups(target.group, target.group - target.kept, sooner, shape, votes.device) | (votes == clients)


def agreement(votes: Tensor, clients: int) -> dict[str, int]:
    """How far the masks of clients agree.

    Args:
        votes: (O, I) whole numbers, clients that pruned each entry.
        clients: all of them.

    Returns:
        `zeros_before_expansion`, the entries that everybody pruned, which are the zeros of the l0 mean before expansion.
        Of two clients and more also `zeros_of_one`, the entries that a client pruned, in the mean over the clients, and
        `zeros_of_two`, those that two clients both pruned, in the mean over all pairs; both are rounded.
    """
    entries = torch.bincount(votes.reshape(-1), minlength=clients + 1).tolist()
    facts = {"zeros_before_expansion": entries[clients]}
    if clients > 1:
        ones, twos = (sum(k**power * count for k, count in enumerate(entries)) for power in (1, 2))
        facts["zeros_of_one"] = round(ones / clients)
        facts["zeros_of_two"] = round((twos - ones) / (clients * (clients - 1)))
    return facts
