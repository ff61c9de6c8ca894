"""What one upload gives away of a client's text, to a server that is curious and does as it should otherwise.

    python -m benchmarks.privacy [--quick]

The server holds the dense model and public text of every domain. It makes uploads of public text with the package itself
and compares: it names the domain of a client's text, and which of 16 windows were among those that the client calibrated
with. Uploads are as they travel, of the bundled model at 50 %. In one process, about a quarter of an hour.

Legend: D numbers in an upload, n windows, T tokens in a window.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.tables import Table
from fedspallm_appfl.aggregation.gram_sum import GramSum
from fedspallm_appfl.algorithms.algorithm import DELTAS, Exchange
from fedspallm_appfl.models.inputs import shared_inputs
from fedspallm_appfl.models.lazy_model import LazyModel
from fedspallm_appfl.pruning.statistics import mirror
from fedspallm_appfl.rounds.source import Source
from fedspallm_appfl.rounds.uploads import sweep
from fedspallm_appfl.secure.stream import add_streams, self_key
from fedspallm_appfl.settings.schema import ClientSettings, Gram, OwnData, Recovery
from fedspallm_appfl.texts.tokenizer import tokenizer_for
from fedspallm_appfl.texts.windows import Cut, windows_of
from fedspallm_appfl.wire.deltas import PackedDelta
from fedspallm_appfl.wire.grams import PackedGram
from fedspallm_appfl.wire.hidden import PackedWords
from fedspallm_appfl.wire.packed import Packed

DEMO = Path("examples/demo")
DOMAINS = ("austen", "bible", "csource", "jargon", "sqldocs")
LENGTH = 128  # tokens in a window
CANDIDATES = 16  # windows of which the attacker asks whether they were in
INSIDE = 8  # of them, that were
PUBLIC = 16  # windows of each domain that the attacker knows, each in an upload alone
REFERENCES = 3  # uploads of public text of each domain, with as many windows as the client's
RIDGE = 0.01  # of least squares, as a share of the mean square of an upload
DAMPING = 0.03  # of the Gram matrix with which others are whitened, as a share of its diagonal

Upload = dict[int, dict[str, Any]]  # block -> unit
Whitener = dict[tuple[int, str], Tensor]  # (block, input) -> (I, I), a root of the Gram matrix of public text


@dataclass(frozen=True)
class Kind:
    """A kind of upload.

    Attributes:
        name: in the table.
        exchange: what travels.
        settings: of the client.
        alone: what the attacker sets otherwise for uploads of one window.
        cases: (windows of a client, clients whose sum the server sees).
    """

    name: str
    exchange: Exchange
    settings: dict[str, Any] = field(default_factory=dict)
    alone: dict[str, Any] = field(default_factory=dict)
    cases: Sequence[tuple[int, int]] = ((12, 1),)


KINDS = (
    Kind("Wanda: masks", Exchange("masks"), {"pruner": "wanda"}, cases=((12, 1), (64, 1))),
    Kind("Wanda with `refit`: masks and weights", Exchange("weights"), {"pruner": "wanda", "refit": True}),
    Kind("SparseGPT: masks", Exchange("masks"), {"pruner": "sparsegpt"}),
    Kind("SparseGPT: masks and weights", Exchange("weights"), {"pruner": "sparsegpt"}, cases=((12, 1), (64, 1))),
    Kind(
        "Gram matrices, int8",
        Exchange("grams"),
        alone={"gram": Gram(min_tokens=1, precision="fp32")},
        cases=((12, 1), (64, 1), (12, 4), (12, 16)),
    ),
    Kind("Wanda: masks in a secure sum, what one client sends", Exchange("masks", hidden=4), {"pruner": "wanda"}),
    # Of one window alone a step says into which direction it pulls each weight: the sign of the gradient.
    Kind("recovery: changes, int4", Exchange(DELTAS), alone={"recovery": Recovery(steps=1, lr=0.002)}),
)


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        domains: of the texts.
        trials: clients of each domain.
        blocks: that uploads are of.
    """

    domains: Sequence[str] = DOMAINS
    trials: int = 4
    blocks: Sequence[int] = range(8)


QUICK = Size(DOMAINS[:2], 1, range(2))


@cache
def windows(domain: str, file: str) -> Tensor:
    """The windows of a text in a random order, (n, T): clients' in `calib.txt`, public ones in `test.txt`."""
    paths = [str(DEMO / "text" / domain / f"{file}.txt")]
    found = windows_of(paths, Cut(LENGTH), tokenizer_for(DEMO / "model", paths)).long()
    return found[torch.randperm(len(found), generator=torch.Generator().manual_seed(0))]


class Maker:
    """Makes uploads of windows, as clients do.

    Attributes:
        blocks: that uploads are of.
        model: the dense model.
        recovered: the model that recovery begins with, which the server knows: pruned with public text of all domains.
    """

    def __init__(self, size: Size) -> None:
        self.blocks = set(size.blocks)
        self.model = LazyModel(str(DEMO / "model"), dtype="float32")
        self.groups = shared_inputs(self.model.skeleton.folder, self.model.layout)
        self.recovered: Upload = {}
        public = torch.cat([windows(domain, "test")[:PUBLIC] for domain in size.domains])
        every = range(len(self.model.blocks))  # recovery runs the whole model
        self.recovered = self.make(Kind("", Exchange("weights")), public, blocks=set(every))

    def make(
        self, kind: Kind, text: Tensor, client: str = "server", blocks: set[int] | None = None, **changed: Any
    ) -> Upload:
        """An upload of some windows, (n, T)."""
        data = OwnData(windows=len(text), length=LENGTH, batch=8)
        settings = ClientSettings(client_id=client, data=data, **{**kind.settings, **changed})
        source = Source(self.model, text, settings, self.groups, self.recovered)
        swept = sweep(source, kind.exchange, blocks or self.blocks)
        made = {block: {name: unit for name, (unit, _) in units.items()} for block, units in swept}
        if kind.exchange.hidden and not client.startswith("server"):
            for block, units in made.items():
                for name, unit in units.items():
                    add_streams(unit.words, [self_key(client.encode(), block, name)])
        return made

    def numbers(self, uploads: Sequence[Upload], whitener: Whitener) -> Tensor:
        """What the attacker compares of an upload, or of a sum of uploads: (D,) float32."""
        parts = [
            self._of_unit([upload[block][name] for upload in uploads], block, name, whitener).flatten()
            for block, units in uploads[0].items()
            for name in units
        ]
        return torch.cat(parts)

    def _of_unit(self, units: Sequence[Any], block: int, name: str, whitener: Whitener) -> Tensor:
        if isinstance(units[0], PackedGram):
            matrix, root = mean_square(units), whitener[block, name]
            half = torch.linalg.solve_triangular(root, matrix, upper=False)
            return torch.linalg.solve_triangular(root, half.T, upper=False)
        [unit] = units
        if isinstance(unit, PackedWords):
            return unit.words.view(torch.uint8).float()
        dense = self.model.skeleton.dense_matrix(block, name).float()
        size = dense.square().mean().sqrt()
        if isinstance(unit, PackedDelta):
            return unit.changes(self.recovered[block][name].kept) / size
        assert isinstance(unit, Packed)
        return unit.unpack_mask().float() if unit.values is None else (unit.unpack_weight().float() - dense) / size


def mean_square(units: Sequence[PackedGram]) -> Tensor:
    """The sum of Gram matrices over its tokens, (I, I) float32."""
    total = GramSum(len(units[0].diagonal))
    for unit in units:
        unit.add_to(total)
    return mirror(total.result().upper).div_(total.tokens)


def whitener_of(upload: Upload) -> Whitener:
    """Roots of the Gram matrices of public text, for other Gram matrices; of other kinds nothing is wanted."""
    made: Whitener = {}
    for block, units in upload.items():
        for name, unit in units.items():
            if isinstance(unit, PackedGram):
                matrix = mean_square([unit])
                matrix.diagonal().mul_(1 + DAMPING).add_(torch.finfo(torch.float32).eps)
                made[block, name] = torch.linalg.cholesky(matrix)
    return made


def nearest(upload: Tensor, references: Tensor) -> int:
    """Which domain's references are most like an upload: the largest cosine, after the mean of all is taken off.

    Args:
        upload: (D,).
        references: (domains, D).
    """
    mean = references.mean(0)
    return int(torch.cosine_similarity(references - mean, upload - mean, dim=1).argmax())


def shares(uploads: Tensor, alone: Tensor) -> Tensor:
    """How much of each window is in each upload, (uploads, n), by least squares with a ridge.

    Windows that are not asked for explain what they have in common with the client's others.

    Args:
        uploads: (uploads, D), less what an upload of the domain usually is.
        alone: (n, D), uploads of one window each, less what those of the domain usually are.
    """
    products = alone @ alone.T
    products.diagonal().add_(RIDGE * products.diagonal().mean())
    return torch.linalg.solve(products, alone @ uploads.T).T


@dataclass
class Client:
    """A client, and others if the server sees only a sum.

    Attributes:
        inside: the candidates that are among its windows.
        texts: windows of each of them, its own first.
    """

    inside: set[int]
    texts: list[Tensor]


def drawn(size: Size, domain: str, count: int, clients: int, seed: int) -> Client:
    """A client with eight candidates and other windows of its domain, and others with text of any domain."""
    random = torch.Generator().manual_seed(1000 * size.domains.index(domain) + seed)
    inside = torch.randperm(CANDIDATES, generator=random)[:INSIDE]
    left = {}
    for name in size.domains:
        others = windows(name, "calib")[CANDIDATES:]
        left[name] = others[torch.randperm(len(others), generator=random)]
    own, left[domain] = left[domain][: count - INSIDE], left[domain][count - INSIDE :]
    texts = [torch.cat([windows(domain, "calib")[inside], own])]
    for number in torch.randint(len(size.domains), (clients - 1,), generator=random).tolist():
        name = size.domains[number]
        text, left[name] = left[name][:count], left[name][count:]
        texts.append(text)
    return Client(set(inside.tolist()), texts)


class Attacker:
    """What the server prepares for a kind of upload.

    Attributes:
        whitener: of the kind.
        public: (domains, `PUBLIC`, D), uploads of one public window each.
        candidates: (domains, `CANDIDATES`, D), those of the windows that it asks about.
    """

    def __init__(self, maker: Maker, kind: Kind, size: Size) -> None:
        self.maker, self.kind, self.size = maker, kind, size
        every = torch.cat([windows(domain, "test") for domain in size.domains])
        self.whitener = whitener_of(maker.make(kind, every, **kind.alone)) if kind.exchange.up == "grams" else {}
        self.public = torch.stack([self._alone(windows(domain, "test")[:PUBLIC]) for domain in size.domains])
        asked = [self._alone(windows(domain, "calib")[:CANDIDATES]) for domain in size.domains]
        self.candidates = torch.stack(asked)

    def numbers(self, texts: Sequence[Tensor], client: str = "server", **changed: Any) -> Tensor:
        """The upload of one client, or the sum of several."""
        uploads = [self.maker.make(self.kind, text, f"{client}.{n}", **changed) for n, text in enumerate(texts)]
        return self.maker.numbers(uploads, self.whitener)

    def _alone(self, text: Tensor) -> Tensor:
        return torch.stack([self.numbers([window.unsqueeze(0)], **self.kind.alone) for window in text])

    def references(self, count: int) -> Tensor:
        """The mean upload of public text of each domain, with so many windows: (domains, D)."""
        means = []
        for domain in self.size.domains:
            text, random = windows(domain, "test")[PUBLIC:], torch.Generator().manual_seed(count)
            picks = [torch.randperm(len(text), generator=random)[:count] for _ in range(REFERENCES)]
            made = [self.numbers([text[pick]], f"server{n}") for n, pick in enumerate(picks)]
            means.append(torch.stack(made).mean(0))
        return torch.stack(means)

    def attack(self, count: int, summed: int) -> tuple[int, int]:
        """How many domains, and how many windows, are named right."""
        references, domains, members = self.references(count), 0, 0
        for number, domain in enumerate(self.size.domains):
            alone = torch.cat([self.candidates[number], *self.public]) - self.public[number].mean(0)
            clients = [drawn(self.size, domain, count, summed, seed) for seed in range(self.size.trials)]
            uploads = [self.numbers(client.texts, f"{domain}{seed}") for seed, client in enumerate(clients)]
            domains += sum(nearest(upload, references) == number for upload in uploads)
            found = shares(torch.stack(uploads) - references[number], alone)[:, :CANDIDATES].topk(INSIDE).indices
            members += sum(len(one.inside & set(row)) for one, row in zip(clients, found.tolist(), strict=True))
        return domains, members


def measure(size: Size, kinds: Sequence[Kind] = KINDS) -> Table:
    """The table of all kinds of upload."""
    clients = size.trials * len(size.domains)
    heads = f"domain, of {clients}", f"windows, of {INSIDE * clients}"
    table = Table("What an upload gives away", ("upload", "windows of a client", "clients in a sum", *heads))
    maker = Maker(size)
    for kind in kinds:
        attacker = Attacker(maker, kind, size)
        for count, summed in kind.cases:
            table.add(kind.name, count, summed, *attacker.attack(count, summed))
            sys.stderr.write(f"{time.process_time():.0f} s: {table.rows[-1]}\n")
    table.add("chance", "", "", f"{clients / len(size.domains):g}", f"{INSIDE * clients * INSIDE / CANDIDATES:g}")
    return table


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.privacy", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two domains, one client of each, two blocks")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kinds = [replace(kind, cases=kind.cases[:1]) for kind in KINDS] if options.quick else KINDS
    sys.stdout.write(measure(QUICK if options.quick else Size(), kinds).markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
