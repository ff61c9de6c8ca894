"""l0-norm aggregation: the mean of each weight over the clients that kept it (docs/method.md section 2).

Source: Bai et al., "FedSpaLLM", NAACL 2025, section 3.2. With masks M_k (True = kept), weights W_k and client weights
a_k, per entry

    W_g = sum_k a_k M_k W_k / sum_k a_k M_k,    0 where nobody kept the entry.

The paper's l0 norm counts the non-zero W_k; here a mask is data of its own, since a kept weight may be exactly 0.0.

Clients are folded one at a time, so the server holds two or three accumulators whatever the number of clients. Sums are
64-bit fixed-point integers: adding integers does not depend on the order, so the result does not depend on the order in
which uploads arrive, bit for bit. The resolution is 2^-40, finer than a float32 above 1.5e-5 in magnitude and exact for
every float16; the sum of a_k |W_k| has to stay below 2^22.

Legend: O out features, I in features, K clients.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

FRACTION_BITS = 40
LARGEST_SUM = 2.0 ** (62 - FRACTION_BITS)
MOST_CLIENTS = torch.iinfo(torch.int16).max
MOST_WEIGHT = torch.iinfo(torch.int32).max


@dataclass
class L0Sums:
    """Accumulators of one matrix.

    Attributes:
        total: (O, I) int64, `sum a_k M_k W_k` in units of 2^-40.
        votes: (O, I) int16, number of clients that pruned the entry, `sum (1 - M_k)`.
        kept: (O, I) int32, `sum a_k M_k`; None while every a_k is 1, when it is `clients - votes`.
        clients: number of clients folded, N.
        weight: `sum a_k` over the clients folded.
        bound: an upper bound of `|total|`, in units of 1.
    """

    total: Tensor
    votes: Tensor
    kept: Tensor | None = None
    clients: int = 0
    weight: int = 0
    bound: float = 0.0

    @classmethod
    def empty(cls, shape: tuple[int, int], weighted: bool, device: torch.device | str = "cpu") -> "L0Sums":
        """Empty accumulators of a matrix of shape (O, I); `weighted` if some client's weight will not be 1."""
        return cls(
            torch.zeros(shape, dtype=torch.int64, device=device),
            torch.zeros(shape, dtype=torch.int16, device=device),
            torch.zeros(shape, dtype=torch.int32, device=device) if weighted else None,
        )

    def add(self, weight: Tensor, mask: Tensor, client_weight: int = 1) -> None:
        """Fold one client.

        Args:
            weight: (O, I), any float dtype; zero where `mask` is False.
            mask: (O, I) bool, True where the client kept the entry.
            client_weight: a_k, a positive integer (1, or a number of samples).

        Raises:
            ValueError: a weight is not finite, or an accumulator would leave its range; nothing was folded.
        """
        largest = float(weight.abs().max()) if weight.numel() else 0.0
        self.check_range(largest, client_weight)
        fixed = (weight.double() * 2.0**FRACTION_BITS).round_().long()
        self.total += fixed.mul_(client_weight)
        self.votes += ~mask
        if self.kept is not None:
            self.kept += mask.int().mul_(client_weight)
        self.clients += 1
        self.weight += client_weight
        self.bound += client_weight * largest

    def check_range(self, largest: float, client_weight: int, clients: int = 1) -> None:
        """Refuse what would leave the range of an accumulator.

        Args:
            largest: largest |weight| to come.
            client_weight: a_k to come.
            clients: number of clients to come.

        Raises:
            ValueError: says which range.
        """
        if not largest < float("inf"):
            raise ValueError("l0 aggregation needs finite weights, got NaN or infinity")
        if client_weight < 1:
            raise ValueError(f"a client weighs at least 1, got {client_weight}")
        if self.kept is None and client_weight != clients:
            raise ValueError(f"these sums were made for client weights of 1, got {client_weight}")
        bound = self.bound + client_weight * largest
        if bound > LARGEST_SUM:
            raise ValueError(
                f"the sum of client weight times |W| must stay below {LARGEST_SUM:g}, it may now reach {bound:g}; "
                "weigh clients equally, or look for a client whose weights have diverged"
            )
        if self.weight + client_weight > MOST_WEIGHT or self.clients + clients > MOST_CLIENTS:
            raise ValueError(
                f"at most {MOST_CLIENTS} clients and a total weight of {MOST_WEIGHT} can be folded, "
                f"got {self.clients + clients} and {self.weight + client_weight}"
            )

    def merge(self, other: "L0Sums") -> None:
        """Add another round's accumulators of the same matrix (`fold: cumulative`).

        Raises:
            ValueError: an accumulator would leave its range, or only one of the two is weighted.
        """
        if (self.kept is None) != (other.kept is None):
            raise ValueError("sums with client weights and sums without cannot be merged")
        if other.clients:
            self.check_range(other.bound / other.weight, other.weight, other.clients)
        self.total += other.total
        self.votes += other.votes
        if self.kept is not None and other.kept is not None:
            self.kept += other.kept
        self.clients += other.clients
        self.weight += other.weight
        self.bound += other.bound


def l0_mean(sums: L0Sums) -> Tensor:
    """Mean over the clients that kept each entry, 0 where none did. (O, I) float32."""
    kept = sums.clients - sums.votes if sums.kept is None else sums.kept
    return _real(sums.total).div_(kept.clamp(min=1)).float()


def plain_mean(sums: L0Sums) -> Tensor:
    """Mean over all clients with pruned entries counted as zeros, FedAvg's aggregate. (O, I) float32."""
    return _real(sums.total).div_(max(sums.weight, 1)).float()


def _real(total: Tensor) -> Tensor:
    return total.double().mul_(2.0**-FRACTION_BITS)
