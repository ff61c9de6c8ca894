"""A federation that makes secure sums in one process."""

import torch

from fedspallm_appfl.secure.client import Client
from fedspallm_appfl.secure.exchange import Exchange
from fedspallm_appfl.secure.identity import Identity, Roster
from fedspallm_appfl.secure.server import Server

UNITS = {"gram": 37, "votes": 5}  # words of each


class Federation:
    """Clients and a server that do one step after the other; a step leaves out the clients that have fallen out."""

    def __init__(self, size, messages=2, signed=False, degree=None, run="run", round_=0, number=0, identities=None):
        names = [f"c{i:02}" for i in range(size)]
        self.identities = identities or {name: Identity.make() if signed else None for name in names}
        keys = {name: one.public for name, one in self.identities.items() if one}
        self.exchange = Exchange(run, round_, number, messages, Roster(tuple(names), keys), degree)
        self.clients = {name: Client(self.exchange, name, self.identities[name]) for name in names}
        self.server = Server(self.exchange)
        self.uploads = {}  # (client, message) -> unit -> masked words
        draw = torch.Generator().manual_seed(size)
        self.inputs = {
            (name, message, unit): torch.randint(-(2**62), 2**62, (words,), generator=draw)
            for name in names
            for message in range(messages)
            for unit, words in UNITS.items()
        }

    def advertise(self, without=()):
        for name in [name for name in self.clients if name not in without]:
            self.server.advertised(name, self.clients[name].advertise())
        return self.server.batch()

    def share(self, without=()):
        batch = self.server.batch()
        for name in [name for name in batch if name not in without]:
            self.server.shared(name, self.clients[name].share(batch))

    def receive(self):
        for name in self.server._sealed:
            self.clients[name].receive(self.server.shares_for(name))

    def upload(self, message, without=()):
        self.server.begin(message, UNITS)
        for name in [name for name in self.server._sealed if name not in without]:
            words = {unit: self.clients[name].mask(message, unit, self.inputs[name, message, unit]) for unit in UNITS}
            self.uploads[name, message] = words
            self.server.add(name, message, words)

    def open(self, messages, without=()):
        survivors = self.server.close(messages)
        able = [name for name in self.server._sealed if name not in without]
        confirmations = {name: self.clients[name].confirm(survivors) for name in able}
        for name in able:
            self.server.confirmed(name, survivors, confirmations[name])
            self.server.opened(name, self.clients[name].open(survivors, confirmations))
        return survivors

    def prepare(self):
        self.advertise()
        self.share()
        self.receive()

    def plain(self, message, unit, names):
        return sum(self.inputs[name, message, unit] for name in names)
