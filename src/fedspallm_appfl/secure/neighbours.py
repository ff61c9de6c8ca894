"""Whom a client shares masks and secrets with: everybody in a small federation, some in a large one that trusts its server.

Source: Bell, Bonawitz, Gascon, Lepoint, Raykova, "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead", CCS
2020, section 3: clients stand in a circle in random order, and each has the `k / 2` next ones on either side. With exact
hypergeometric tails instead of the paper's bounds on them, `k` is the smallest even number such that, with a fifth of the
clients on the server's side and a quarter falling out,

* no client has so many neighbours on the server's side that these can open its secrets,
* the honest clients that stay are connected, so that only their sum comes out,

but with a probability of 2^-40 each, and every client keeps enough neighbours to open its secrets, but with 2^-30. Below
24 clients that is everybody, and for some numbers up to 45; of 100 clients it is 62, of 1000 clients 148.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from math import comb

from fedspallm_appfl.secure.encoding import join

SECRECY, CORRECTNESS = 40, 30  # bits
CORRUPT, FALLEN = 5, 4  # one in so many


def threshold(members: int) -> int:
    """How many of those who hold shares of a secret open it: more than half, so that two halves cannot open two."""
    return members // 2 + 1


@lru_cache
def degree(clients: int) -> int:
    """How many neighbours each of so many clients has."""
    return next((k for k in range(2, clients - 1, 2) if _suffices(clients, k)), clients - 1)


def _suffices(clients: int, k: int) -> bool:
    corrupt, fallen, needed = clients // CORRUPT, -(-clients // FALLEN), threshold(k + 1)
    ways, others = comb(clients - 1, k), clients - 1
    opened = _ways(others, corrupt, k, needed)
    lost = _ways(others, fallen, k, k - needed + 1)
    apart = comb(corrupt + fallen, k // 2)  # a run of k / 2 that are all gone or corrupt
    return (
        clients * opened << SECRECY <= ways
        and clients * apart << SECRECY <= comb(clients, k // 2)
        and clients * lost << CORRECTNESS <= ways
    )


def _ways(total: int, marked: int, drawn: int, least: int) -> int:
    """Draws of so many of a total with at least so many marked ones."""
    return sum(comb(marked, i) * comb(total - marked, drawn - i) for i in range(least, min(marked, drawn) + 1))


def neighbourhoods(clients: Sequence[str], seed: bytes, k: int) -> dict[str, tuple[str, ...]]:
    """The neighbours of every client, and itself.

    Args:
        clients: all of them.
        seed: public; it makes the order of the circle.
        k: neighbours of each, even or everybody.

    Returns:
        client -> `k + 1` sorted names. Who is a neighbour of another has it as a neighbour.

    Raises:
        ValueError: there is no such circle.
    """
    if k >= len(clients) or k < 2 or (k % 2 and k != len(clients) - 1):
        raise ValueError(f"{len(clients)} clients have 2, 4, ... or {len(clients) - 1} neighbours, got {k}")
    circle = sorted(clients, key=lambda client: hashlib.sha256(join(seed, client)).digest())
    before = k // 2
    around = {
        client: [circle[(place + step) % len(circle)] for step in range(-before, k - before + 1)]
        for place, client in enumerate(circle)
    }
    return {client: tuple(sorted(around[client])) for client in clients}
