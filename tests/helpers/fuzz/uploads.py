"""Uploads of every kind to a server of two small matrices a block, and what comes before them."""

import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedspallm_appfl.errors import UpdateError
from fedspallm_appfl.models.layout import Layout, Linear
from fedspallm_appfl.pruning.from_sums import Sums
from fedspallm_appfl.rounds.folds.context import GLOBAL
from fedspallm_appfl.settings.schema import Gram, Pruning, Recovery
from fedspallm_appfl.tensors.target import parse_target
from fedspallm_appfl.wire.as_bytes import from_bytes, to_bytes
from fedspallm_appfl.wire.deltas import PackedDelta, parts_of_delta
from fedspallm_appfl.wire.grams import pack_gram
from fedspallm_appfl.wire.packed import pack, pack_mask, pack_values
from fedspallm_appfl.wire.store import PackedStore
from fedspallm_appfl.wire.update import compress, make_update
from helpers.fuzz.harness import Attempt, Unnamed
from helpers.fuzz.mutations import changed
from helpers.rounds import global_model, server_settings

SHAPES = {"q": (16, 40), "up": (24, 40)}
LAYOUT = Layout("layers", (tuple(Linear(name, shape, False) for name, shape in SHAPES.items()),) * 2)
GROUPS = ((("q", "up"),), (("q", "up"),))
HALF = parse_target(0.5)
CLIENTS = ("ann", "bob")
BLOCKS = [0, 1]


@dataclass(frozen=True)
class Kind:
    """One kind of upload.

    Attributes:
        up: what travels.
        algorithm: whose.
        pruner: of clients, or of the server.
        zstd: compressed.
        more: other settings of the server.
    """

    up: str
    algorithm: str
    pruner: str = "sparsegpt"
    zstd: bool = False
    more: tuple[tuple[str, Any], ...] = ()

    @property
    def bare(self) -> bool:
        """Whether masks travel without values, which are the dense ones."""
        return self.up == "weights" and self.pruner == "wanda"

    @property
    def name(self) -> str:
        """As a count names it."""
        gram = dict(self.more).get("gram")
        what = f"{gram.precision} {gram.target}" if gram else self.pruner if self.up == "weights" else ""
        delta = dict(self.more).get("recovery")
        words = [self.algorithm, self.up, what, delta.delta if delta else "", "zstd" if self.zstd else ""]
        return " ".join(word for word in words if word)


def kinds() -> Iterator[Kind]:
    """All kinds, each with and without compression."""
    for zstd in (False, True):
        for pruner in ("sparsegpt", "wanda"):
            yield Kind("weights", "fedspallm", pruner, zstd)
        yield Kind("weights", "fedavg", zstd=zstd)
        yield Kind("masks", "fedprllm", zstd=zstd)
        yield Kind("masks", "consensus", zstd=zstd)
        yield Kind("values", "consensus", zstd=zstd)
        for precision in ("fp32", "bf16", "int8"):
            for target, propagate in (("own", "dense"), ("dense", "pruned")):
                gram = Gram(precision, propagate, target)
                yield Kind("grams", "gram", "wanda" if precision == "bf16" else "sparsegpt", zstd, (("gram", gram),))
        for delta in ("int4", "int8", "fp16"):
            yield Kind("deltas", "fedspallm", zstd=zstd, more=(("recovery", Recovery(rounds=1, delta=delta)),))


def _generator(*words: Any) -> torch.Generator:
    return torch.Generator().manual_seed(random.Random(repr(words)).randrange(2**31))


def dense(block: int, name: str) -> torch.Tensor:
    """The dense weights."""
    return torch.randn(SHAPES[name], generator=_generator(block, name)).half()


class Federation:
    """A server that waits for uploads of a kind, and its honest clients."""

    def __init__(self, kind: Kind, folder: Path) -> None:
        self.kind = kind
        told = server_settings(
            Pruning(kind.pruner, HALF),
            kind.algorithm,
            compression=kind.zstd,
            roster=list(CLIENTS),
            mask_only=list(CLIENTS) if kind.bare else [],
            **dict(kind.more),
        )
        groups = GROUPS if kind.algorithm == "gram" else ()
        self.model = global_model(LAYOUT, torch.float16, told, folder, dense, groups=groups)
        if self.model.resumed is None:
            self.model.begin_round(0, dict.fromkeys(CLIENTS, BLOCKS))
            while self.model.exchange.up != kind.up:
                for client in CLIENTS:
                    self.model.receive(client, self.honest(client), 1)
                assert self.model.next_exchange()

    def honest(self, client: str) -> dict[str, Any]:
        """What an honest client sends in the exchange that is on."""
        units = {block: self.model._units(block) for block in BLOCKS if self.model.exchange.concerns(block)}
        made = {block: {unit: self._unit(client, block, unit) for unit in of} for block, of in units.items()}
        update = make_update(0, made, self.model.round.exchange)
        return compress(update) if self.kind.zstd else update

    def _unit(self, client: str, block: int, unit: str) -> Any:
        generator, up = _generator(client, block, unit), self.model.exchange.up
        shape = SHAPES[unit]
        if up == "grams":
            x = torch.randn(64, shape[1], generator=generator)
            gram = dict(self.kind.more)["gram"]
            return pack_gram(Sums((x.T @ x).triu(), len(x), 0.1 * x.T @ x if gram.drift else None), gram.precision)
        if up == "deltas":
            kept = (PackedStore(self.model.folder / GLOBAL).get(block, unit) or {})[unit].kept
            precision = dict(self.kind.more)["recovery"].delta
            (levels, kind), (scales, _) = parts_of_delta(kept, precision).values()
            drawn = torch.randint(0, 100, (levels,), generator=generator).to(kind)
            drawn = drawn / 100 if kind == torch.float16 else drawn
            return PackedDelta(drawn, torch.full((scales,), 1e-3, dtype=torch.bfloat16))
        mask = torch.randperm(shape[0] * shape[1], generator=generator).view(shape) % 2 == 0
        if up == "masks" or self.kind.bare:
            return pack_mask(mask)
        weight = dense(block, unit) + 0.01 * torch.randn(shape, generator=generator).half()
        if up == "values":
            agreed = (PackedStore(self.model.folder / "masks").get(block, unit) or {})[unit]
            return pack_values(weight, agreed.bits, torch.float16)
        return pack(weight, mask, torch.float16)

    def end(self) -> None:
        """All honest clients send what they still owe, and the exchange ends; nothing may go wrong in it."""
        model = self.model
        for client in CLIENTS:
            update = self.honest(client)
            for block, units in update["blocks"].items():
                left = {unit: sent for unit, sent in units.items() if (client, int(block), unit) not in model._received}
                model.receive(client, {**update, "blocks": {block: left}}, 1)
            model.check_complete(client)
        model.next_exchange()


def refusal_of(model: Any, sender: str, update: Any, place: tuple[Any, ...], samples: Any = 1) -> UpdateError | None:
    """Send an update; a refusal has to name sender and block."""
    before = dict(model._received._bits)
    try:
        model.receive(sender, update, samples)
    except UpdateError as error:
        block = f", block {place[1]}, " if len(place) > 2 and place[2] in SHAPES and place[1] in ("0", "1") else ""
        if f"client {sender}" not in str(error) or block not in str(error):
            raise Unnamed(f"it does not name {sender}{block}: {str(error)[:500]}") from error
        if model._received._bits != before:
            raise Unnamed("a part of a refused update was folded") from error
        return error
    return None


def attempts() -> Iterator[tuple[str, Attempt]]:
    """(name, what makes a case) of each kind."""
    for kind in kinds():
        yield f"upload {kind.name}", _attempt(kind)
    yield "upload, as bytes", _bytes


def _attempt(kind: Kind) -> Callable[[random.Random], None]:
    def attempt(dice: random.Random) -> None:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            federation = Federation(kind, Path(folder))
            if dice.random() < 0.5:
                federation.model.receive("bob", federation.honest("bob"), 1)
            refused = None
            for _ in range(4):  # many cases for one server
                update, place = changed(federation.honest("ann"), dice)
                refused = refusal_of(federation.model, "ann", update, place) or refused
                if federation.model._received.blocks_of("ann"):
                    break
            try:
                federation.end()
            except UpdateError as error:
                raise Unnamed(f"an honest update was refused: {error}") from error
        if refused is not None:
            raise refused

    return attempt


def flipped(data: bytes, dice: random.Random) -> bytes:
    """The same with some bits changed, maybe cut off."""
    made = bytearray(data)
    for _ in range(dice.choice([1, 2, 10])):
        made[dice.choice([dice.randrange(8), dice.randrange(600), dice.randrange(len(made))])] ^= 1 << dice.randrange(8)
    return bytes(made[: dice.choice([len(made), len(made), dice.randrange(len(made))])])


def _bytes(dice: random.Random) -> None:
    """A payload as bytes with some of them changed."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        federation = Federation(Kind("weights", "fedspallm"), Path(folder))
        update = from_bytes(flipped(to_bytes(federation.honest("ann")), dice), "client ann")
        refused = refusal_of(federation.model, "ann", update, ())
    if refused is not None:
        raise refused
