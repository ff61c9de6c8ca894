"""l0-norm aggregation: the mean of each weight over the clients that kept it (docs/method.md section 2).

Source: Bai et al., "FedSpaLLM", NAACL 2025, section 3.2. With masks M_k (True = kept), weights W_k and client weights
a_k, per entry

    W_g = sum_k a_k M_k W_k / sum_k a_k M_k,    0 where no client kept the entry.

The paper's l0 norm counts the non-zero W_k; here the mask is separate data, because a kept weight may be exactly 0.0.

Clients are folded one at a time, so the server holds two or three accumulators for any number of clients. Sums are
64-bit fixed-point integers: integer addition does not depend on the order, so the result has the same bits for any order
of uploads. The resolution is 2^-40, finer than a float32 above 1.5e-5 in magnitude and exact for
every float16; the sum of a_k |W_k| must stay below 2^22.

Legend: O out features, I in features, K clients.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fedspallm_appfl.tensors import bitmask, native

FRACTION_BITS = 40
LARGEST_SUM = 2.0 ** (62 - FRACTION_BITS)
MOST_CLIENTS = torch.iinfo(torch.int16).max
MOST_WEIGHT = torch.iinfo(torch.int32).max
TILE = 2**16  # entries converted at a time, small enough for the cache; a multiple of 8


def vote_dtype(clients: int) -> torch.dtype:
    """The smallest integer type that can count this many clients.

    Raises:
        ValueError: more than `MOST_CLIENTS`.
    """
    if clients > MOST_CLIENTS:
        raise ValueError(f"at most {MOST_CLIENTS} clients can be folded, got {clients}")
    return torch.uint8 if clients <= torch.iinfo(torch.uint8).max else torch.int16


@dataclass
class L0Sums:
    """Accumulators of one matrix.

    Attributes:
        total: (O, I) int64, `sum a_k M_k W_k` in units of 2^-40.
        votes: (O, I) uint8 or int16, number of clients that pruned the entry, `sum (1 - M_k)`.
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
    def empty(
        cls, shape: tuple[int, int], weighted: bool, clients: int = MOST_CLIENTS, device: torch.device | str = "cpu"
    ) -> "L0Sums":
        """Empty accumulators.

        Args:
            shape: (O, I).
            weighted: whether a client weight other than 1 will occur.
            clients: maximum number of clients to fold.
            device: device of the accumulators.
        """
        return cls(
            torch.zeros(shape, dtype=torch.int64, device=device),
            torch.zeros(shape, dtype=vote_dtype(clients), device=device),
            torch.zeros(shape, dtype=torch.int32, device=device) if weighted else None,
        )

    @staticmethod
    def entry_bytes(weighted: bool, clients: int) -> int:
        """Bytes an entry: sum, votes, and with client weights the weight of those that kept it."""
        kept = torch.int32.itemsize if weighted else 0
        return torch.int64.itemsize + vote_dtype(clients).itemsize + kept

    def add(self, weight: Tensor, mask: Tensor, client_weight: int = 1) -> None:
        """Fold one client.

        Args:
            weight: (O, I), any float dtype; entries where `mask` is False are ignored.
            mask: (O, I) bool, True where the client kept the entry.
            client_weight: a_k, a positive integer (1, or a number of samples).

        Raises:
            ValueError: a weight is not finite, or an accumulator would leave its range; nothing was folded.
        """
        self.add_packed(weight[mask], bitmask.to_bits(mask), client_weight)

    def add_packed(self, values: Tensor, bits: Tensor, client_weight: int = 1, largest: float | None = None) -> None:
        """Fold one client's packed matrix.

        Args:
            values: (kept,) float, the kept entries.
            bits: (ceil(O * I / 8),) uint8, the mask (see `bitmask`).
            client_weight: a_k, a positive integer.
            largest: largest |value|, if it is known.

        Raises:
            ValueError: as `add`; or there are more or fewer values than the mask keeps.
        """
        bitmask.require_as_many(values, bits)
        largest = largest_magnitude(values) if largest is None else largest
        self.check_range(largest, client_weight)
        if native.serves(values, bits, self.total, self.votes):
            self._fold_compiled(values, bits, client_weight)
        else:
            self._fold(values, bits, client_weight)
        self.clients += 1
        self.weight += client_weight
        self.bound += client_weight * largest

    def _fold(self, values: Tensor, bits: Tensor, client_weight: int) -> None:
        rows, columns = self.total.shape
        dense, total = bitmask.scatter(values, bits, (rows, columns)).view(-1), self.total.view(-1)
        for tile in _tiles(total):
            total[tile] += _fixed(dense[tile]).mul_(client_weight)
        mask = bitmask.from_bits(bits, (rows, columns))
        self.votes += ~mask
        if self.kept is not None:
            self.kept.add_(mask, alpha=client_weight)

    def _fold_compiled(self, values: Tensor, bits: Tensor, client_weight: int) -> None:
        total, votes = self.total.view(-1), self.votes.view(-1)
        kept = None if self.kept is None else self.kept.view(-1)
        size = votes.element_size()
        if values.element_size() == 2:
            table, calls = _weighted_table(values.dtype, client_weight), []
            for one in bitmask.split(bits, len(total)):
                sums = total[one.entries], votes[one.entries], None if kept is None else kept[one.entries]
                calls.append((values[one.kept], one.bits, one.size, one.values, table, client_weight, *sums))
            native.call_in_parts(f"fold_2_{size}", calls)
            return
        taken = 0
        for tile in _tiles(total):
            some = bits[tile.start // 8 : -(-tile.stop // 8)]
            fixed = _fixed(values[taken : taken + bitmask.count(some)])
            taken += len(fixed)
            parts = total[tile], votes[tile], None if kept is None else kept[tile]
            native.call(f"fold_8_{size}", fixed, some, len(parts[0]), len(fixed), client_weight, *parts)

    def check_range(self, largest: float, client_weight: int, clients: int = 1) -> None:
        """Refuse values that would exceed the range of an accumulator.

        Args:
            largest: largest |weight| to add.
            client_weight: a_k to add.
            clients: number of clients to add.

        Raises:
            ValueError: names the range.
        """
        if not largest < float("inf"):
            raise ValueError("l0 aggregation needs finite weights, got NaN or infinity")
        if client_weight < 1:
            raise ValueError(f"a client weight must be at least 1, got {client_weight}")
        if self.kept is None and client_weight != clients:
            raise ValueError(f"these sums were made for client weights of 1, got {client_weight}")
        bound = self.bound + client_weight * largest
        if bound > LARGEST_SUM:
            raise ValueError(
                f"the sum of client weight times |W| must stay below {LARGEST_SUM:g}, it may now reach {bound:g}; "
                "use equal client weights, or look for a client whose weights have diverged"
            )
        most = torch.iinfo(self.votes.dtype).max
        if self.weight + client_weight > MOST_WEIGHT or self.clients + clients > most:
            raise ValueError(
                f"at most {most} clients and a total weight of {MOST_WEIGHT} can be folded, "
                f"got {self.clients + clients} and {self.weight + client_weight}"
            )

    def merge(self, other: "L0Sums") -> None:
        """Add another round's accumulators of the same matrix (`fold: cumulative`).

        Raises:
            ValueError: an accumulator would leave its range, or only one of the two is weighted.
        """
        if (self.kept is None) != (other.kept is None):
            raise ValueError("sums with client weights and sums without cannot be merged")
        self.votes = self.votes.to(vote_dtype(self.clients + other.clients))
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
    by = sums.votes if sums.kept is None else sums.kept
    if native.serves(sums.total, by):
        return _divided_compiled(sums.total, by, sums.clients)
    flat = by.view(-1)
    if sums.kept is None:
        return _divided(sums.total, lambda tile: (sums.clients - flat[tile].int()).clamp_(min=1))
    return _divided(sums.total, lambda tile: flat[tile].clamp(min=1))


def plain_mean(sums: L0Sums) -> Tensor:
    """Mean over all clients, with pruned entries as zeros: FedAvg's aggregate. (O, I) float32."""
    return _divided(sums.total, lambda tile: max(sums.weight, 1))


def largest_magnitude(values: Tensor) -> float:
    """Largest |value|; NaN or infinity if there is one; 0 for an empty tensor."""
    if not len(values):
        return 0.0
    low, high = (float(extreme) for extreme in values.aminmax())
    return max(-low, high)


def _divided(total: Tensor, by: Callable[[slice], Tensor | int]) -> Tensor:
    """The sums in units of 1, divided by the result of `by` for each tile. (O, I) float32."""
    mean = torch.empty(total.shape, dtype=torch.float32, device=total.device)
    sums, means = total.view(-1), mean.view(-1)
    for tile in _tiles(sums):
        means[tile] = sums[tile].double().mul_(2.0**-FRACTION_BITS).div_(by(tile)).float()
    return mean


def _divided_compiled(total: Tensor, by: Tensor, clients: int) -> Tensor:
    """As `_divided`, by the clients that did not prune an entry, or if `by` is int32 by what it says."""
    mean = torch.empty(total.shape, dtype=torch.float32)
    sums, counts, means = total.view(-1), by.view(-1), mean.view(-1)
    parts = native.ranges(len(sums), TILE)
    native.call_in_parts(
        f"mean_{by.element_size()}",
        [(sums[part], counts[part], len(sums[part]), FRACTION_BITS, clients, means[part]) for part in parts],
    )
    return mean


def _tiles(flat: Tensor) -> Iterator[slice]:
    """Ranges of entries to convert at a time: small for the cache of a CPU, large for a GPU."""
    step = TILE if flat.device.type == "cpu" else 256 * TILE
    return (slice(start, min(start + step, len(flat))) for start in range(0, len(flat), step))


def _fixed(values: Tensor) -> Tensor:
    """Fixed-point numbers of some values, int64 in units of 2^-40."""
    return (values.double() * 2.0**FRACTION_BITS).round_().long()


@lru_cache(maxsize=2)
def _table(dtype: torch.dtype) -> Tensor:
    """The fixed-point number of every bit pattern of a 16-bit format; 0 for those that `check_range` refuses. (65536,)."""
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).double()
    return _fixed(torch.where(values.abs() <= LARGEST_SUM, values, 0.0))


@lru_cache(maxsize=8)
def _weighted_table(dtype: torch.dtype, client_weight: int) -> Tensor:
    """`_table` times the weight of a client; apart from it, as with experts nearly every matrix has another weight."""
    return _table(dtype) * client_weight
