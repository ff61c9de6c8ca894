"""Layer sampling: which decoder blocks each client prunes in a round (docs/method.md section 4).

Source: Bai et al., "FedSpaLLM: Federated Pruning of Large Language Models", NAACL 2025, section 3.4. Client k has a
resource share r_k in (0, 1] and prunes `n_k = max(1, round(r_k * L))` of the L blocks.

* `uniform` is the paper's: each client draws without replacement, independently of the others. The expectation of a
  block's aggregate is that of full participation, but some blocks may not be drawn; they do not change.
* `balanced` (ours, the default): one random permutation of the blocks is dealt out in a circle. Each client's share
  is still included with probability n_k / L, and every block gets floor or ceil of `sum n_k / L` clients.
* `sweep` (ours): round t takes the t-th run of consecutive blocks, dealt out as in `balanced`; earlier blocks are already
  pruned, so calibration inputs are those of the new model. r_k is the share of the round's run.

The draw is a pure function of (seed, round, roster): server and client compute the same one, and it does not depend on
how clients are distributed over processes.
"""

import math
import random
from collections.abc import Mapping, Sequence
from fractions import Fraction

MOST = 1 << 20  # blocks, far more than any model has


def blocks_per_round(share: float, blocks: int) -> int:
    """`max(1, round(share * blocks))`, half rounded up; a decimal is read as a fraction, 0.29 is 29/100."""
    return max(1, math.floor(Fraction(str(share)) * blocks + Fraction(1, 2)))


def draw(
    strategy: str, seed: int, round_index: int, rounds: int, shares: Mapping[str, float], blocks: int | Sequence[int]
) -> dict[str, list[int]]:
    """Assign blocks to clients for one round.

    Args:
        strategy: `balanced`, `uniform` or `sweep`.
        seed: the experiment's seed.
        round_index: the round, from 0.
        rounds: number of rounds; only `sweep` uses it.
        shares: resource share in (0, 1] of each client, in the order of the roster.
        blocks: the decoder blocks that have something to prune, in order, or their number L if all have.

    Returns:
        For each client the sorted indices of the blocks it prunes.

    Raises:
        ValueError: the strategy is unknown.
    """
    if not isinstance(blocks, int):
        drawn = draw(strategy, seed, round_index, rounds, shares, len(blocks))
        return {client: [blocks[place] for place in places] for client, places in drawn.items()}
    if strategy == "uniform":
        return {
            client: sorted(_generator(seed, round_index, client).sample(range(blocks), blocks_per_round(share, blocks)))
            for client, share in shares.items()
        }
    if strategy == "balanced":
        return _deal(list(range(blocks)), shares, _generator(seed, round_index))
    if strategy == "sweep":
        step = round_index % rounds
        run = list(range(step * blocks // rounds, (step + 1) * blocks // rounds))
        return _deal(run, shares, _generator(seed, round_index))
    raise ValueError(f"layer sampling is one of balanced, uniform, sweep, got {strategy!r}")


def _generator(seed: int, round_index: int, client: str = "") -> random.Random:
    """A separate generator for each draw; string seeds are hashed with SHA-512, the same on every machine."""
    return random.Random(f"layer sampling/{seed}/{round_index}/{client}")


def _deal(blocks: list[int], shares: Mapping[str, float], generator: random.Random) -> dict[str, list[int]]:
    circle = list(blocks)
    generator.shuffle(circle)
    assigned, start = {}, 0
    for client, share in shares.items():
        count = min(blocks_per_round(share, len(circle)), len(circle))
        assigned[client] = sorted(circle[(start + i) % len(circle)] for i in range(count))
        start += count
    return assigned


def expected_uncovered(shares: Mapping[str, float], blocks: int) -> float:
    """Expected number of blocks that no client draws in a round of `uniform`: `sum_l prod_k (1 - n_k / L)`."""
    missed = math.prod(1 - blocks_per_round(share, blocks) / blocks for share in shares.values())
    return blocks * missed


def to_text(blocks: list[int]) -> str:
    """Sorted block indices as a compact string: [0, 1, 2, 5] -> "0-2,5". Sent in metadata."""
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][1] + 1:
            runs[-1][1] = block
        else:
            runs.append([block, block])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def from_text(text: str, below: int = MOST) -> list[int]:
    """The inverse of `to_text`: "0-2,5" -> [0, 1, 2, 5].

    Args:
        text: may be from outside.
        below: what all of them are below.

    Raises:
        ValueError: it is not what `to_text` makes of such numbers.
    """
    numbers: list[int] = []
    for run in filter(None, text.split(",")):
        start, _, end = run.partition("-")
        first, last = int(start), int(end or start)
        if not (numbers[-1] if numbers else -1) < first <= last < below:
            raise ValueError(f"numbers in rising order below {below} are wanted, got {run}")
        numbers.extend(range(first, last + 1))
    return numbers
