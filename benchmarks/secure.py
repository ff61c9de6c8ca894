"""Secure sums of the entries above the diagonal of a Gram matrix, in 16 bits; all clients are in one process."""

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from benchmarks.context import Context
from benchmarks.tables import Table
from fedspallm_appfl.secure import words
from fedspallm_appfl.secure.client import Client
from fedspallm_appfl.secure.exchange import Exchange
from fedspallm_appfl.secure.identity import Identity, Roster
from fedspallm_appfl.secure.server import Server
from fedspallm_appfl.tensors import triangle

BITS, INPUTS = 16, 4096
CLIENTS = (4, 16, 64)
FALLEN = 4  # one in so many, after the shares
Result = TypeVar("Result")


class Clock:
    """CPU seconds by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def measure(self, what: str, work: Callable[[], Result]) -> Result:
        """Run some work."""
        started = time.process_time()
        result = work()
        self.seconds[what] = self.seconds.get(what, 0.0) + time.process_time() - started
        return result


def total(parts: Mapping[str, bytes]) -> int:
    return sum(map(len, parts.values()))


def one_sum(size: int, falls_out: bool, inputs: int) -> tuple[Clock, int, int]:
    """Make one sum of noise and check it; the noise is the same for all clients.

    Returns:
        The clock, words of an upload, bytes beside the upload that a client sends and gets.
    """
    clock, entries = Clock(), triangle.size(inputs)
    identities = {f"c{i:02}": Identity.make() for i in range(size)}
    roster = Roster(tuple(identities), {name: one.public for name, one in identities.items()})
    exchange = Exchange("benchmark", 0, 0, 1, roster)
    clients = {name: Client(exchange, name, one) for name, one in identities.items()}
    server = Server(exchange)
    for name, client in clients.items():
        server.advertised(name, clock.measure("keys, client", client.advertise))
    batch = clock.measure("keys, server", server.batch)
    for name, client in clients.items():
        sealed = clock.measure("keys, client", lambda client=client: client.share(batch))
        clock.measure("keys, server", lambda name=name, sealed=sealed: server.shared(name, sealed))
    for name, client in clients.items():
        clock.measure("keys, client", lambda name=name, client=client: client.receive(server.shares_for(name)))
    noise = torch.randint(-(2**15) // size + 1, 2**15 // size, (entries,), dtype=torch.int16)
    server.begin(0, {"gram": words.size(entries, BITS)})
    left = list(clients)[: size - size // FALLEN] if falls_out else list(clients)
    for name in left:
        packed = clock.measure("pack", lambda: words.pack(noise, BITS))
        masked = clock.measure("mask", lambda name=name, packed=packed: clients[name].mask(0, "gram", packed))
        clock.measure("add", lambda name=name, masked=masked: server.add(name, 0, {"gram": masked}))
    survivors = server.close([0])
    confirmations = {name: clients[name].confirm(survivors) for name in left}
    for name in left:
        opened = clock.measure("open, client", lambda name=name: clients[name].open(survivors, confirmations))
        clock.measure("open, server", lambda name=name, opened=opened: server.opened(name, opened))
    [(_, summed)] = clock.measure("open, server", lambda: list(server.sums(0)))
    found: Tensor = clock.measure("unpack", lambda: words.unpack(summed, BITS, entries, signed=True))
    if not torch.equal(found, noise * len(left)):
        raise RuntimeError(f"the sum of {size} clients is wrong")
    beside = 2 * (total(batch) // size + total(sealed)) + total(batch) + total(confirmations) + len(opened)
    return clock, len(packed), beside


def run(context: Context) -> Table:
    inputs, sizes = (256, CLIENTS[:2]) if context.quick else (INPUTS, CLIENTS)
    columns = [
        "clients",
        "fall out",
        "pack",
        "mask",
        "per neighbour",
        "keys",
        "open",
        "add",
        "take masks out",
        "unpack",
    ]
    table = Table(f"Secure sum of a Gram matrix of {inputs} inputs", (*columns, "words, MB", "keys, KB"))
    for size in sizes:
        for falls_out in (False, True):
            clock, count, beside = one_sum(size, falls_out, inputs)
            left = size - size // FALLEN * falls_out
            each = {what: seconds / left for what, seconds in clock.seconds.items()}
            cells = each["pack"], each["mask"], each["mask"] / (size - 1), each["keys, client"] * left / size
            server = each["add"], clock.seconds["open, server"], clock.seconds["unpack"]
            times = [f"{1000 * one:.1f}" for one in (*cells, each["open, client"], *server)]
            table.add(size, size // FALLEN * falls_out, *times, f"{8 * count / 1e6:.1f}", f"{beside / 1e3:.0f}")
    table.notes.append(
        f"Milliseconds of CPU; {BITS} bits an entry. `pack`, `mask`, `keys` and `open` are of one client, `add` is of the "
        "server for one upload, `take masks out` and `unpack` are of the server for the sum. `keys` in KB is what a client "
        "sends and gets beside its words, for one message, signed. Who falls out has shared its keys."
    )
    return table
