"""Three clients, one 4 x 4 matrix, 50 %: l0 aggregation and mask expansion that can be followed with a pencil.

    python examples/by_hand.py

Each client kept 8 of 16 weights (. = pruned):

    A               B               C
    4  .  .  2      6  .  2  .      5  1  .  .
    .  6  1  .      .  4  .  1      .  5  3  .
    3  .  .  5      .  2  .  7      .  .  2  6
    .  2  7  .      1  .  5  .      .  .  6  4

Votes, the number of clients that pruned an entry, and the l0 mean over those that kept it. At the top left all three kept
it: (4 + 6 + 5) / 3 = 5. In row 2, column 3 only A and C did: (1 + 3) / 2 = 2, where FedAvg would say 4/3.

    votes           l0 mean
    0  2  2  2      5  1  2  2
    3  0  1  2      .  5  2  1
    2  2  2  0      3  2  2  6
    2  2  0  2      1  2  6  4

Only one entry is zero by agreement, 8 are wanted. Seven more come from the ten with two votes, smallest |mean| first: the
three ones, then four of the five twos, the first ones by index. The two in row 2, column 3 has one vote only: it stays.

    mask            result
    1  .  .  .      5  .  .  .
    .  1  1  .      .  5  2  .
    1  .  .  1      3  .  .  6
    .  1  1  1      .  2  6  4
"""

import torch

import fedspallm_appfl as fs

A = torch.tensor([[4.0, 0, 0, 2], [0, 6, 1, 0], [3, 0, 0, 5], [0, 2, 7, 0]])
B = torch.tensor([[6.0, 0, 2, 0], [0, 4, 0, 1], [0, 2, 0, 7], [1, 0, 5, 0]])
C = torch.tensor([[5.0, 1, 0, 0], [0, 5, 3, 0], [0, 0, 2, 6], [0, 0, 6, 4]])


def aggregate() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (votes, l0 mean, mask, result), each (4, 4)."""
    sums = fs.L0Sums.empty((4, 4), weighted=False)
    for weight in (A, B, C):
        sums.add(weight, mask=weight != 0)  # no kept weight is zero here, so the mask can be read off
    mean = fs.l0_mean(sums)
    mask = fs.expand(sums.votes, sums.clients, mean.abs(), fs.parse_target(0.5))
    return sums.votes, mean, mask, mean * mask


if __name__ == "__main__":
    for name, matrix in zip(("votes", "l0 mean", "mask", "result"), aggregate(), strict=True):
        print(f"{name}\n{matrix.int()}\n")
