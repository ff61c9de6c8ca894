"""What the server makes of each kind of upload: it checks a unit, folds it into sums, and closes the sums.

A unit is what clients send under one name: a matrix, or the statistics of an input that several matrices take. A fold is
one exchange's; each algorithm has one for each of its exchanges (`folds`).

Legend: O out features, I in features.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fedspallm_appfl.aggregation.l0_mean import L0Sums, l0_mean, largest_magnitude
from fedspallm_appfl.aggregation.mask_expansion import unexpanded_zeros
from fedspallm_appfl.aggregation.votes import Votes
from fedspallm_appfl.algorithms import consensus, fedavg, fedprllm, fedspallm, gram
from fedspallm_appfl.algorithms.exchange import Groups
from fedspallm_appfl.algorithms.gram import GramSettings
from fedspallm_appfl.errors import PruningError, UpdateError
from fedspallm_appfl.models.layout import Layout
from fedspallm_appfl.pruning.pruner import Settings
from fedspallm_appfl.tensors import bitmask
from fedspallm_appfl.wire.gram_store import GramStore
from fedspallm_appfl.wire.grams import GramSum, check_gram
from fedspallm_appfl.wire.packed import Check, Packed, check_matrix, check_values, pack, pack_mask, with_values
from fedspallm_appfl.wire.store import PackedStore
from fedspallm_appfl.wire.sums_file import SumsT, load_sums, save_sums

GLOBAL, MASKS, STATISTICS = "global", "masks", "statistics"  # folders of the server's state
Stores = dict[str, dict[str, Packed]]  # store -> linear -> what was made of it


@dataclass(frozen=True)
class Aggregation:
    """How the server combines uploads.

    Attributes:
        pruning: target, and for `gram` how to prune.
        algorithm: one of `ALGORITHMS`.
        weights: `equal`, or `sample_size` (calibration windows of each client).
        fold: with `latest` a new round's aggregate of a block replaces the earlier one, `cumulative` adds sums and votes.
        expansion: `matrix` or `row`, the group in which entries compete in mask expansion.
        comparisons: which of `standalone` and `fedavg` to make beside the global model of `fedspallm`.
        mask_only: clients whose pruner leaves kept weights as they are; they send masks without values.
        gram: which statistics clients send, for `gram`.
        threads: CPU threads of what the server solves; None leaves it to torch.
        compression: whether to compress what goes down.
    """

    pruning: Settings
    algorithm: str = "fedspallm"
    weights: str = "equal"
    fold: str = "latest"
    expansion: str = "matrix"
    comparisons: tuple[str, ...] = ()
    mask_only: frozenset[str] = frozenset()
    gram: GramSettings = field(default_factory=GramSettings)
    threads: int | None = None
    compression: bool = False


@dataclass(frozen=True)
class Server:
    """What folds share.

    Attributes:
        layout: blocks and linears of the model.
        dtype: dtype of the checkpoint.
        settings: how to combine uploads.
        folder: a folder of its own.
        device: where sums are kept and combined.
        dense: (block, linear) -> its dense weight (O, I) in `dtype`.
        groups: linears that share an input, for `gram`.
    """

    layout: Layout
    dtype: torch.dtype
    settings: Aggregation
    folder: Path
    device: str
    dense: Callable[[int, str], Tensor]
    groups: Groups = ()

    def dense_float(self, block: int, name: str) -> Tensor:
        """A dense weight, (O, I) float32, where sums are."""
        return self.dense(block, name).to(self.device, torch.float32)


class Fold(Protocol):
    """The server's side of one exchange."""

    def units(self, block: int) -> tuple[str, ...]:
        """What clients send of a block."""

    def check(self, client: str, block: int, unit: str) -> Check:
        """How an upload of a unit is checked."""

    def open(self, block: int, unit: str, clients: int) -> Any:
        """Empty sums of a unit that so many clients will send."""

    def guard(self, sums: Any, packed: Packed, weight: int) -> None:
        """Refuse, with a ValueError, what would leave the range of the sums; they are None before the first upload."""

    def add(self, sums: Any, client: str, block: int, unit: str, packed: Packed, weight: int) -> None:
        """Fold a checked upload."""

    def close(self, block: int, unit: str, sums: Any) -> tuple[Stores, dict[str, int]]:
        """What is made of complete sums: matrices for each store, and facts for the report. The sums are used up."""


class _MatrixFold:
    """What folds of single matrices share."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def units(self, block: int) -> tuple[str, ...]:
        """One for each linear."""
        return tuple(linear.name for linear in self._server.layout.blocks[block])


class _MeanFold(_MatrixFold):
    """What folds share that add values up."""

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self._weighted = server.settings.weights == "sample_size"
        self._no_sums = L0Sums.empty((0, 0), self._weighted)

    def guard(self, sums: L0Sums | None, packed: Packed, weight: int) -> None:
        """Ranges of the fixed-point sums."""
        (sums or self._no_sums).check_range(largest_magnitude(packed["values"]), weight)


class WeightFold(_MeanFold):
    """Masks and weights into l0 sums, from which one model or several are made."""

    def __init__(self, server: Server, combine: Mapping[str, Callable[..., tuple[Tensor, Tensor]]]) -> None:
        """Make a model for each store, with what `combine` has for it; those that use the sums up come last."""
        super().__init__(server)
        self._combine = combine

    def check(self, client: str, block: int, unit: str) -> Check:
        """The right shape and sparsity; values are put in where the client's pruner left weights alone."""
        server, alone = self._server, client in self._server.settings.mask_only

        def check(packed: Any, where: str) -> Packed:
            shape, target = server.layout.shapes(block)[unit], server.settings.pruning.target
            checked = check_matrix(packed, where, shape, server.dtype, target, alone)
            return with_values(checked, server.dense(block, unit)) if alone else checked

        return check

    def open(self, block: int, unit: str, clients: int) -> L0Sums:
        """Empty sums."""
        return L0Sums.empty(self._server.layout.shapes(block)[unit], self._weighted, clients, self._server.device)

    def add(self, sums: L0Sums, client: str, block: int, unit: str, packed: Packed, weight: int) -> None:
        """Fold weights and mask."""
        device = self._server.device
        sums.add_packed(packed["values"].to(device), packed["mask"].to(device), weight)
        if "standalone" in self._server.settings.comparisons:
            PackedStore(self._server.folder / "standalone" / client).add(block, {unit: packed})

    def close(self, block: int, unit: str, sums: L0Sums) -> tuple[Stores, dict[str, int]]:
        """Combine for each store."""
        if self._server.settings.fold == "cumulative":
            sums = with_earlier_rounds(sums, self._server.folder, block, unit, self._server.device)
        facts = {"zeros_before_expansion": unexpanded_zeros(sums.votes, sums.clients)}
        stores = {}
        for store, combine in self._combine.items():
            # No name for what is packed: it would be kept while the next is made.
            stores[store] = {unit: pack(*combine(sums), self._server.dtype)}
        return stores, facts


class VoteFold(_MatrixFold):
    """Masks into votes, from which `decide` makes the mask of all."""

    def __init__(self, server: Server, store: str, decide: Callable[..., tuple[Tensor, Tensor] | Tensor]) -> None:
        """Put into a store what `decide` makes of votes and dense weights: a matrix with its mask, or a mask alone."""
        super().__init__(server)
        self._store = store
        self._decide = decide

    def check(self, client: str, block: int, unit: str) -> Check:
        """A mask of the right shape and sparsity."""
        server = self._server

        def check(packed: Any, where: str) -> Packed:
            shape, target = server.layout.shapes(block)[unit], server.settings.pruning.target
            return check_matrix(packed, where, shape, server.dtype, target, mask_only=True)

        return check

    def open(self, block: int, unit: str, clients: int) -> Votes:
        """No votes."""
        return Votes.empty(self._server.layout.shapes(block)[unit], clients, self._server.device)

    def guard(self, sums: Votes | None, packed: Packed, weight: int) -> None:
        """Votes have room for all clients from the start."""

    def add(self, sums: Votes, client: str, block: int, unit: str, packed: Packed, weight: int) -> None:
        """Count a mask."""
        sums.add(packed["mask"].to(self._server.device))

    def close(self, block: int, unit: str, sums: Votes) -> tuple[Stores, dict[str, int]]:
        """Decide."""
        server = self._server
        if server.settings.fold == "cumulative":
            sums = with_earlier_rounds(sums, server.folder, block, unit, server.device)
        made = self._decide(sums, server.dense_float(block, unit))
        packed = pack_mask(made) if isinstance(made, Tensor) else pack(*made, server.dtype)
        return {self._store: {unit: packed}}, {"zeros_before_expansion": unexpanded_zeros(sums.pruned, sums.clients)}


class ValueFold(_MeanFold):
    """Values under masks that were agreed on into their mean."""

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self._masks = PackedStore(server.folder / MASKS)

    def check(self, client: str, block: int, unit: str) -> Check:
        """As many values as the mask keeps."""
        return lambda packed, where: check_values(packed, where, self._agreed(block, unit), self._server.dtype)

    def open(self, block: int, unit: str, clients: int) -> L0Sums:
        """Sums of kept entries alone, (1, kept): nobody votes any more."""
        kept = bitmask.count(self._agreed(block, unit)["mask"])
        return L0Sums.empty((1, kept), self._weighted, clients, self._server.device)

    def add(self, sums: L0Sums, client: str, block: int, unit: str, packed: Packed, weight: int) -> None:
        """Fold values."""
        values = packed["values"].to(self._server.device)
        sums.add_packed(values, bitmask.to_bits(torch.ones_like(values, dtype=torch.bool)), weight)

    def close(self, block: int, unit: str, sums: L0Sums) -> tuple[Stores, dict[str, int]]:
        """The mean of the values."""
        values = l0_mean(sums).view(-1).to(self._server.dtype).cpu()
        return {GLOBAL: {unit: {**self._agreed(block, unit), "values": values}}}, {}

    def _agreed(self, block: int, unit: str) -> Packed:
        return (self._masks.load(block, unit) or {})[unit]


class KeepFold(WeightFold):
    """Matrices kept as they come, each client's in its own store."""

    def __init__(self, server: Server, store_of: Callable[[str], str]) -> None:
        super().__init__(server, {})
        self._store_of = store_of

    def open(self, block: int, unit: str, clients: int) -> L0Sums:
        """Nothing is summed."""
        return self._no_sums

    def add(self, sums: L0Sums, client: str, block: int, unit: str, packed: Packed, weight: int) -> None:
        """Store a matrix."""
        PackedStore(self._server.folder / self._store_of(client)).add(block, {unit: packed})

    def close(self, block: int, unit: str, sums: L0Sums) -> tuple[Stores, dict[str, int]]:
        """Nothing is left to do."""
        return {}, {}


class GramFold:
    """Statistics into their sum, with which all matrices that take the input are pruned."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._rounded = server.settings.gram.precision != "fp32"
        self._features = {
            (block, names[0]): server.layout.shapes(block)[names[0]][1]
            for block, inputs in enumerate(server.groups)
            for names in inputs
        }

    def units(self, block: int) -> tuple[str, ...]:
        """One for each input, by its first linear."""
        return tuple(names[0] for names in self._server.groups[block])

    def check(self, client: str, block: int, unit: str) -> Check:
        """Statistics of the right size and precision."""
        settings, features = self._server.settings.gram, self._features[block, unit]
        return partial(check_gram, features=features, precision=settings.precision, drift=settings.drift)

    def open(self, block: int, unit: str, clients: int) -> GramSum:
        """Empty sums."""
        return GramSum(self._features[block, unit], self._server.settings.gram.drift, self._server.device)

    def guard(self, sums: GramSum | None, packed: Packed, weight: int) -> None:
        """Sums of any magnitude fit."""

    def add(self, sums: GramSum, client: str, block: int, unit: str, packed: Packed, weight: int) -> None:
        """Fold statistics; every token counts the same, whoever has it."""
        sums.add(packed)

    def close(self, block: int, unit: str, sums: GramSum) -> tuple[Stores, dict[str, int]]:
        """Prune the matrices that take the input, and keep the sums for further targets where they hold for any."""
        server, total = self._server, sums.result()
        linears = next(names for names in server.groups[block] if names[0] == unit)
        if server.settings.gram.propagate == "dense":
            store, cumulative = GramStore(server.folder / STATISTICS), server.settings.fold == "cumulative"
            if cumulative:
                total = store.add(block, linears, total, self._rounded)
            else:
                store.save(block, linears, total, self._rounded)
        weights = {name: server.dense_float(block, name) for name in linears}
        pruned = prune_input(weights, total, server.settings, self._rounded, f"block {block}, {unit}")
        return {GLOBAL: {name: pack(*made, server.dtype) for name, made in pruned.items()}}, {}


def prune_input(
    weights: Mapping[str, Tensor], sums: gram.Sums, settings: Aggregation, rounded: bool, where: str
) -> dict[str, gram.Pruned]:
    """Prune all matrices that take one input with the server's threads (see `algorithms.gram.prune`).

    Raises:
        PruningError: a matrix cannot be pruned; names block and input.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    try:
        pruned = gram.prune(weights, sums, settings.pruning, rounded)
    except PruningError as error:
        raise PruningError(f"server, {where}: {error}") from error
    for name, (weight, _) in pruned.items():
        if not bool(weight.isfinite().all()):
            raise PruningError(f"server, {where}: pruning {name} gave NaN or infinity; raise `damping`")
    return pruned


def with_earlier_rounds(sums: SumsT, folder: Path, block: int, unit: str, device: str) -> SumsT:
    """Sums of a matrix with those of earlier rounds added, which are kept in a file.

    Raises:
        UpdateError: the sums leave their range.
    """
    file = folder / "sums" / f"{block:04d}-{unit}.safetensors"
    if file.is_file():
        try:
            sums.merge(load_sums(type(sums), file, device))
        except ValueError as error:
            raise UpdateError(f"block {block}, {unit}: the sums of all rounds: {error}") from error
    save_sums(sums, file)
    return sums


def folds(server: Server) -> tuple[Fold, ...]:
    """The folds of an algorithm's exchanges; the one of `gram` serves all exchanges of a sweep."""
    settings = server.settings
    target, group = settings.pruning.target, settings.expansion
    average = partial(fedavg.combine, target=target)
    spallm: dict[str, Any] = {"fedavg": average} if "fedavg" in settings.comparisons else {}
    spallm[GLOBAL] = partial(fedspallm.combine, target=target, group=group)
    made: dict[str, Callable[[], tuple[Fold, ...]]] = {
        "fedspallm": lambda: (WeightFold(server, spallm),),
        "fedavg": lambda: (WeightFold(server, {GLOBAL: average}),),
        "fedprllm": lambda: (VoteFold(server, GLOBAL, partial(fedprllm.combine, target=target, group=group)),),
        "consensus": lambda: (
            VoteFold(server, MASKS, partial(consensus.agree, target=target, group=group)),
            ValueFold(server),
        ),
        "gram": lambda: (GramFold(server),),
        "standalone": lambda: (KeepFold(server, lambda client: f"standalone/{client}"),),
        "centralized": lambda: (KeepFold(server, lambda client: GLOBAL),),
    }
    return made[settings.algorithm]()
