"""What clients send in a secure sum: integers in a unit that all sides know, so that the sum is exact.

* `masks`: 1 where an entry is pruned, in the bits that the number of clients takes.
* `values`: kept weights in 32 bits, in units of a power of two that follows from the largest dense weight.
* `squares`: the diagonal of a Gram matrix and its tokens, as pairs of 64-bit integers.
* `grams`: what is above the diagonal in 16 bits, in units of what the summed diagonals allow. By Cauchy and Schwarz
  `sum_k |G_ij| <= sqrt(sum_k G_ii * sum_k G_jj)`, so no room for each client is needed but for its rounding.
* `deltas`: changes in recovery, in shares of how far its steps may go, rounded up or down at random, with room for all
  clients; and the sum of their squares in digits, from which follows how long the mean is made. The largest weight would be
  no unit: it may be hundreds of times as large as the others, and every change less than half of it.

All of these sums fit up to `MOST_CLIENTS`: the fine part of a square is at most 2^52, and the sum below 2^63.

Legend: O out features, I in features, T tokens, K clients.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedspallm_appfl.aggregation.l0_mean import largest_magnitude
from fedspallm_appfl.algorithms.algorithm import DELTAS, Exchange
from fedspallm_appfl.errors import PruningError
from fedspallm_appfl.pruning.from_sums import Sums
from fedspallm_appfl.secure.words import pack, size, unpack
from fedspallm_appfl.settings.schema import Recovery
from fedspallm_appfl.tensors import triangle
from fedspallm_appfl.tensors.exact_sum import sum_of_squares
from fedspallm_appfl.tensors.target import Target
from fedspallm_appfl.wire.deltas import changed_entries
from fedspallm_appfl.wire.packed import Packed

GROWTH = 2**10  # how many times the largest dense weight a kept weight may be
FINE, COARSE = 2.0**-40, 2.0**12  # units of the two parts of a sum of squares
LARGEST_SQUARES = 2.0**62
MOST_CLIENTS = 2**63 // int(COARSE / FINE) - 1
HALF = 2**15 - 1  # of 16 bits
LEVEL_BITS = 12  # of the magnitude of a change of one client; and of a digit
LEVELS = 2**LEVEL_BITS - 1
DIGITS = 5  # of a sum of squares, below 2^60


@dataclass(frozen=True)
class Coding:
    """How the integers of a unit become words.

    Attributes:
        count: integers.
        bits: of each sum over the clients.
        signed: whether there are negative ones.
    """

    count: int
    bits: int
    signed: bool = True

    @property
    def size(self) -> int:
        """Words."""
        return size(self.count, self.bits)

    def pack(self, numbers: Tensor) -> Tensor:
        """(count,) integers to (W,) int64."""
        return pack(numbers, self.bits)

    def unpack(self, words: Tensor) -> Tensor:
        """A sum of words to the sum of the integers."""
        return unpack(words, self.bits, self.count, self.signed)


def coding(up: str, entries: int, kept: int, clients: int) -> Coding:
    """The coding of a unit.

    Args:
        up: what its exchange sends.
        entries: of a matrix; features of an input.
        kept: entries of a matrix that its target keeps; in recovery those that travel.
        clients: K.
    """
    return {
        "masks": lambda: Coding(entries, clients.bit_length(), signed=False),
        "values": lambda: Coding(kept, 32),
        "squares": lambda: Coding(2 * entries + 1, 64),
        "grams": lambda: Coding(triangle.size(entries), 16),
        DELTAS: lambda: Coding(kept + DIGITS, 1 + LEVEL_BITS + clients.bit_length()),
    }[up]()


def of_linear(exchange: Exchange, shape: tuple[int, int], target: Target) -> Coding:
    """The coding of what a hidden exchange sends of a linear, (O, I), or of its input."""
    entries = shape[0] * shape[1]
    of_matrix = exchange.up in ("masks", "values")
    sent = changed_entries(entries - target.zeros(entries), shape[0], exchange.rank)
    return coding(exchange.up, entries if of_matrix else shape[1], sent, exchange.hidden)


def step(dense: Tensor, clients: int) -> float:
    """The unit of kept weights of a matrix: `GROWTH` times the largest dense weight of each of K clients fits 32 bits."""
    largest = max(largest_magnitude(dense), 2.0**-100)
    return float(2.0 ** (math.ceil(math.log2(largest * GROWTH * clients)) - 30))


def fixed(values: Tensor, dense: Tensor, clients: int, where: str) -> Tensor:
    """Kept weights in units of `step`, (kept,) int32.

    Raises:
        PruningError: one exceeds what the unit was made for; begins with `where`.
    """
    unit = step(dense, clients)
    numbers, most = values.double().div_(unit).round_(), 2**30 // clients
    if len(numbers) and not float(numbers.abs().max()) <= most:  # nor not a number
        raise PruningError(
            f"{where}: in a secure sum weights are at most {most * unit:g}, about {GROWTH} times the largest dense one, "
            f"got {float(values.abs().max()):g}; raise train_configs.damping"
        )
    return numbers.to(torch.int32)


def squares(sums: Sums, where: str) -> Tensor:
    """The diagonal as coarse and fine parts, then T: (2 * I + 1,) int64.

    Raises:
        PruningError: an entry is too large; begins with `where`.
    """
    diagonal = sums.upper.diagonal().double().cpu()
    if not float(diagonal.max()) <= LARGEST_SQUARES:  # nor not a number
        raise PruningError(
            f"{where}: a secure sum takes squares up to {LARGEST_SQUARES:g}, got {float(diagonal.max()):g}"
        )
    coarse = (diagonal / COARSE).floor()
    fine = ((diagonal - coarse * COARSE) / FINE).round()
    return torch.cat([coarse.long(), fine.long(), torch.tensor([sums.tokens])])


def summed_squares(numbers: Tensor) -> tuple[Tensor, int]:
    """(I,) float64 and T of summed numbers of `squares`."""
    features = len(numbers) // 2
    coarse, fine = numbers[:features].double(), numbers[features:-1].double()
    return coarse * COARSE + fine * FINE, int(numbers[-1])


def correlations(sums: Sums, total: Tensor, clients: int) -> Tensor:
    """What is above the diagonal in units of the summed squares, (I * (I - 1) / 2,) int16.

    Args:
        sums: of one client.
        total: (I,) float64, summed squares.
        clients: K.
    """
    inverse = torch.where(total > 0, total.rsqrt(), 0.0)
    flat = torch.empty(triangle.size(len(total)), dtype=torch.int16)
    upper, levels = sums.upper.cpu(), HALF - clients  # each client rounds by half a level at most
    for rows, part, inside in triangle.strips(len(total)):
        scaled = upper[rows].double() * inverse[rows].unsqueeze(1) * inverse
        flat[part] = scaled[inside].mul_(levels).round_().clamp_(-levels, levels).to(torch.int16)
    return flat


def from_correlations(numbers: Tensor, total: Tensor, tokens: int, clients: int) -> Sums:
    """The sums in float32 of summed numbers of `correlations`; other arguments as there."""
    roots, levels = total.sqrt(), HALF - clients
    upper = torch.diag(total.float())
    for rows, part, inside in triangle.strips(len(total)):
        scale = (roots[rows].unsqueeze(1) * roots)[inside] / levels
        upper[rows][inside] = (numbers[part].double() * scale).float()
    return Sums(upper, tokens)


def farthest(before: Packed, recovery: Recovery) -> float:
    """How far steps may move an entry that travels: each by at most about the learning rate, a share of the magnitude.

    Args:
        before: the matrix as the round of recovery began, which all sides have.
        recovery: what all clients are told.
    """
    assert before.values is not None, "the server has sent them"
    magnitude = math.sqrt(sum_of_squares(before.values) / max(before.kept, 1))
    return recovery.reach * recovery.steps * magnitude


def levels(change: Tensor, most: float, count: int, random: torch.Generator) -> Tensor:
    """A change in shares of `most`, then the sum of its squares in digits: (count + DIGITS,) int32.

    Args:
        change: (n,) float32 on the CPU; what is beyond `most` is cut off.
        most: see `farthest`.
        count: entries that all clients send, at least n; those beyond are zero.
        random: for rounding up or down, so that the mean is right.
    """
    numbers = torch.zeros(count + DIGITS, dtype=torch.int64)
    if most:
        share = change.double().mul_(LEVELS / most).add_(torch.rand(len(change), generator=random, dtype=torch.float64))
        numbers[: len(change)] = share.floor_().clamp_(-LEVELS, LEVELS).long()
    square = int(numbers.square().sum())
    numbers[count:] = torch.tensor([square >> LEVEL_BITS * digit & LEVELS for digit in range(DIGITS)])
    return numbers.to(torch.int32)


def from_levels(numbers: Tensor, most: float, clients: int) -> tuple[Tensor, float]:
    """The mean over K clients of summed numbers of `levels`, float64, and the mean of their squares; arguments as there."""
    unit, digits = most / LEVELS, numbers[-DIGITS:].tolist()
    square = sum(digit << LEVEL_BITS * place for place, digit in enumerate(digits))
    return numbers[:-DIGITS].double() * (unit / clients), square * unit**2 / clients
