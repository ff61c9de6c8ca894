"""Adaptive mask expansion: from votes to a mask of exactly the target size (docs/method.md section 3).

Source: Bai et al., "FedSpaLLM", NAACL 2025, section 3.3. The l0 mean is zero only where all clients pruned, so it is less
sparse than the target. Further entries are zeroed, those that most clients pruned first; ties by smallest |W_g|, then by
index. Votes are compared as integers and magnitudes only inside one class of votes: one float key made of both loses the
tie-break to rounding.

The comparison group is the whole matrix, which FedPrLLM (Guo et al., arXiv 2505.13547) found best, or each row; for n:m it
is the group of m.

Legend: O out features, I in features, N clients that pruned the matrix.
"""

import torch
from torch import Tensor

from fedspallm_appfl.sparsity import NM, Target, row_counts, smallest

GROUPS = ("matrix", "row")


def expand(votes: Tensor, clients: int, magnitude: Tensor, target: Target, group: str = "matrix") -> Tensor:
    """The global mask.

    Args:
        votes: (O, I) integer, number of clients that pruned the entry.
        clients: N; where `votes == N` nobody kept the entry and it stays zero.
        magnitude: (O, I) float, |W_g|.
        target: ratio or n:m.
        group: `matrix` or `row`, where a ratio is counted.

    Returns:
        (O, I) bool, True = kept. Exactly `target.zeros(O * I)` entries are False, or more where more than that were
        pruned by everybody: then nothing is expanded.
    """
    if isinstance(target, NM):
        return ~_most_voted_in_groups(votes, clients, magnitude, target)
    if group == "row":
        counts = row_counts(target, *votes.shape).tolist()
        rows = zip(votes, magnitude, counts, strict=True)
        return ~torch.stack([_most_voted(v, clients, m, count) for v, m, count in rows])
    pruned = _most_voted(votes.flatten(), clients, magnitude.flatten(), target.zeros(votes.numel()))
    return ~pruned.view(votes.shape)


def _most_voted(votes: Tensor, clients: int, magnitude: Tensor, count: int) -> Tensor:
    """Choose `count` entries by votes (most first), magnitude (smallest first), index; all of the unanimous ones stay."""
    histogram = torch.bincount(votes.to(torch.int64), minlength=clients + 1)
    border, above = clients, 0
    while above + int(histogram[border]) < count:
        above += int(histogram[border])
        border -= 1
    if border == clients:
        return votes == clients
    inside = (votes == border).nonzero().flatten()
    pruned = votes > border
    pruned[inside[smallest(magnitude[inside], count - above)]] = True
    return pruned


def _most_voted_in_groups(votes: Tensor, clients: int, magnitude: Tensor, target: NM) -> Tensor:
    """The same order inside each group of m. Two stable sorts, least significant key first, keep the index order."""
    shape, votes, magnitude = votes.shape, votes.view(-1, target.group), magnitude.view(-1, target.group)
    by_magnitude = magnitude.argsort(dim=1, stable=True)
    by_votes = votes.gather(1, by_magnitude).argsort(dim=1, stable=True, descending=True)
    order = by_magnitude.gather(1, by_votes)
    first = torch.zeros_like(votes, dtype=torch.bool)
    first[:, : target.group - target.kept] = True
    pruned = torch.zeros_like(first).scatter_(1, order, first)
    return (pruned | (votes == clients)).view(shape)


def unexpanded_zeros(votes: Tensor, clients: int) -> int:
    """Entries that everybody pruned: the zeros of the l0 mean before expansion."""
    return int((votes == clients).sum())
