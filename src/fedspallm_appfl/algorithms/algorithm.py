"""What an algorithm is: the exchanges of a round, the server's arithmetic after each, and the facts that others ask of it.

Nobody compares an algorithm's name: what follows from the choice is a fact here, or follows from its exchanges. The
built-in ones are one file each; `registry` finds them by name.

Legend: O out features, I in features.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fedspallm_appfl.errors import ConfigError
from fedspallm_appfl.settings.schema import Gram, Recovery
from fedspallm_appfl.tensors.target import Target

Groups = tuple[
    tuple[tuple[str, ...], ...], ...
]  # block -> inputs in the order of the forward pass -> linears that take it
Inputs = tuple[tuple[int, str], ...]  # inputs, each as (block, first linear that takes it)

UPLOADS = ("weights", "masks", "values", "grams")
SUMMED = ("masks", "values", "grams")  # of these the server needs the sum alone
NOTHING = "nothing"  # clients are sent a model that was pruned before
DELTAS = "deltas"  # changes of kept weights, after the exchanges of any algorithm
KEYS, SHARES, CONFIRM, OPENING = (
    "keys",
    "shares",
    "confirm",
    "opening",
)  # of secure sums: before what is hidden, and after
SQUARES = "squares"  # sums of squares, of which the scale of hidden Gram matrices follows; down come their sums
PROTOCOL = (KEYS, SHARES, CONFIRM, OPENING)
DOWN = (None, "weights", "masks", SQUARES)


@dataclass(frozen=True)
class Matrix:
    """What the server's arithmetic may ask of the matrix that it makes.

    Attributes:
        target: ratio or n:m.
        group: `matrix` or `row`, where a ratio is counted in mask expansion.
        dense: () -> the dense weight (O, I) float32, where the sums are.
    """

    target: Target
    group: str
    dense: Callable[[], Tensor]


Make = Callable[[Any, Matrix], tuple[Tensor, Tensor] | Tensor]


@dataclass(frozen=True)
class Exchange:
    """An upload of every client, what the server makes of it, and what goes down to all of them when it is complete.

    Attributes:
        up: `weights` (mask and kept values), `masks`, `values` (under a mask that was agreed on), or `grams`; and what
            algorithms do not ask for themselves, `DELTAS` of recovery, `NOTHING`, and of secure sums `SQUARES` and
            `PROTOCOL`.
        down: `weights`, `masks`, or None, of secure sums also `SQUARES`; what nobody will need, as after the last exchange
            of a run, is not sent.
        make: (sums, `Matrix`) -> (weight (O, I) float32, mask (O, I) bool with True = kept), or a mask to send down. The
            sums are `L0Sums` of weights or `Votes` of masks. None: weights are kept as they come, values are averaged, and
            with Gram matrices the server prunes.
        only: the inputs that it is about; None for all of all blocks.
        turn: the round of recovery that it belongs to, from 0; None for pruning.
        delta: precision of the changes that go up in recovery.
        rank: of the factors that go up in their place; 0 for changes of each kept weight.
        hidden: of how many clients the server sees the sum alone; 0: it sees what each of them sends.
    """

    up: str
    down: str | None = None
    make: Make | None = None
    only: Inputs | None = None
    turn: int | None = None
    delta: str = ""
    rank: int = 0
    hidden: int = 0

    def __post_init__(self) -> None:
        """Refuse what no upload or answer is.

        Raises:
            ConfigError: `up` or `down` is none of the valid words, or `make` cannot be called.
        """
        if self.up not in (*UPLOADS, DELTAS, NOTHING, SQUARES, *PROTOCOL) or self.down not in DOWN:
            raise ConfigError(
                f"an exchange sends one of {', '.join(UPLOADS)} up, and weights, masks or None down; got {self.up!r}, "
                f"{self.down!r}"
            )
        if self.make is not None and not callable(self.make):
            raise ConfigError(f"an exchange's `make` is a function of sums and matrix, got {self.make!r}")

    @property
    def begins(self) -> bool:
        """Whether it only hands out a model that was pruned before."""
        return self.up == NOTHING

    @property
    def speaks(self) -> bool:
        """Whether it is about keys of secure sums alone."""
        return self.up in PROTOCOL

    @property
    def recovers(self) -> bool:
        """Whether it belongs to recovery."""
        return self.turn is not None

    @property
    def trains(self) -> bool:
        """Whether clients train in it, and send changes."""
        return self.up == DELTAS

    def concerns(self, block: int) -> bool:
        """Whether it is about a block."""
        return self.only is None or any(block == one for one, _ in self.only)

    def units_of(self, block: int, units: Sequence[str]) -> tuple[str, ...]:
        """Those of a block's units that it is about."""
        if self.only is None:
            return tuple(units)
        mine = {unit for one, unit in self.only if one == block}
        return tuple(unit for unit in units if unit in mine)


def parts_of_sweep(groups: Groups, stride: int) -> tuple[Inputs, ...]:
    """What the exchanges of a sweep are about, in order.

    Args:
        groups: for each block the linears that share an input.
        stride: blocks in a part, of those that are pruned; 0 makes each input a part.
    """
    inputs: list[Inputs] = [tuple((block, linears[0]) for linears in mine) for block, mine in enumerate(groups) if mine]
    if not stride:
        return tuple((one,) for mine in inputs for one in mine)
    return tuple(sum(inputs[first : first + stride], ()) for first in range(0, len(inputs), stride))


@dataclass(frozen=True)
class Algorithm:
    """One way to make a global model, with what follows from choosing it.

    Attributes:
        name: as it stands in a configuration.
        round: the exchanges of a round, in order; those of Gram matrices may become a sweep (see `exchanges`).
        label: for tables and titles; empty for the name.
        averages: values of clients are averaged, so that client weights matter.
        expands: masks are expanded to the target, so that the group of comparison matters.
        accumulates: sums of earlier rounds may be added to those of a later one.
        changes_weights: kept weights are not simply the dense ones; a pruner that leaves them alone would be lost on it.
        drops_values: kept weights stay dense whatever the clients' pruners make of them.
        compares: models of other algorithms can be made of its uploads, for comparison.
        apart: every client's model is its own; there is no global one.
        pools_text: one participant has the text of all clients, which no federation has.
        closing_bytes: bytes an entry that `make` takes beside the sums: its mean, and what choosing among equal votes
            makes.
    """

    name: str
    round: Sequence[Exchange]
    label: str = ""
    averages: bool = False
    expands: bool = False
    accumulates: bool = True
    changes_weights: bool = False
    drops_values: bool = False
    compares: bool = False
    apart: bool = False
    pools_text: bool = False
    closing_bytes: int = 6

    def __post_init__(self) -> None:
        """Refuse exchanges of which no model comes.

        Raises:
            ConfigError: says which rule is broken.
        """
        for broken, rule in self._rules():
            if broken:
                raise ConfigError(f"algorithm {self.name}: {rule}")

    def _rules(self) -> Iterator[tuple[bool, str]]:
        """What the exchanges must fulfil: (whether they do not, the rule)."""
        if not self.round or not all(isinstance(one, Exchange) for one in self.round):
            yield True, f"name its exchanges, a list of Exchange; got {self.round!r}"
            return
        ups, last = [one.up for one in self.round], self.round[-1]
        agreed = [bool(number) and self.round[number - 1].down == "masks" for number in range(len(ups))]
        own = self.apart or self.pools_text
        yield DELTAS in ups or NOTHING in ups, "changes of kept weights are not its own to ask for; set recovery.rounds"
        yield "grams" in ups and len(ups) > 1, "an exchange of Gram matrices stands alone"
        yield any(one.make and one.up in ("grams", "values") for one in self.round), "grams and values take no `make`"
        yield any(one.up == "masks" and not one.make for one in self.round), "an exchange of masks needs a `make`"
        yield (
            any(one.up == "values" and not ok for one, ok in zip(self.round, agreed, strict=True)),
            ("values travel under a mask that the exchange before sent down"),
        )
        yield (
            any(one.up == "weights" and bool(one.make) == own for one in self.round),
            ("an exchange of weights needs a `make`, and has none where models are apart or text is pooled"),
        )
        yield last.down == "masks", "the last exchange ends in weights: let it send weights down, or nothing"
        yield self.compares and set(ups) != {"weights"}, "only uploads of weights serve for comparison"
        yield self.accumulates and len(ups) > 1, "only one exchange can be added up over rounds; set accumulates=False"

    @property
    def title(self) -> str:
        """What tables call it."""
        return self.label or self.name

    @property
    def gathers(self) -> bool:
        """Whether clients send statistics, with which the server prunes."""
        return any(exchange.up == "grams" for exchange in self.round)

    @property
    def federates(self) -> bool:
        """Whether what its clients send is what a federation would send, and one model comes of it."""
        return not (self.apart or self.pools_text)

    @property
    def adds_up(self) -> bool:
        """Whether the server needs no more than the sum of what its clients send, so that the sum may be all it sees."""
        return self.federates and all(one.up in SUMMED for one in self.round)

    @property
    def votes(self) -> bool:
        """Whether masks of several clients are combined, so that some entries are zero by agreement."""
        return any(exchange.make is not None for exchange in self.round)

    def exchanges(
        self, groups: Groups, gram: Gram, recovery: Recovery | None = None, hidden: int = 0, signed: bool = False
    ) -> tuple[Exchange, ...]:
        """The exchanges of a round; those of recovery come at the end, and in the last round only (see `of_round`).

        Statistics of the dense model take one exchange. In a sweep (`gram.propagate: pruned`) an exchange is about one
        input, or all inputs of `gram.stride` blocks: the clients send Gram matrices in the model that is pruned so far,
        get the pruned matrices, and go on. Where kept weights are to be recovered, all clients have to be sent these first.

        Args:
            groups: for each block the linears that share an input; only algorithms that gather statistics look at them.
            gram: which statistics clients send.
            recovery: what follows; None for nothing.
            hidden: of how many clients the server sees sums alone (see `secure`); 0 for none.
            signed: these have identities, and confirm to each other whose part is in a sum before they open it.
        """
        own = self._own_exchanges(groups, gram)
        if recovery is not None and recovery.model:
            own, hidden = (Exchange(NOTHING, "weights"),), 0  # validation refuses both
        if recovery is not None and recovery.rounds:
            asked = Exchange(DELTAS, "weights", delta=recovery.delta, rank=recovery.rank)
            turns = (replace(asked, turn=turn) for turn in range(recovery.rounds))
            own = (*own[:-1], replace(own[-1], down="weights"), *turns)
        return tuple(_hidden(own, hidden, signed)) if hidden else own

    def _own_exchanges(self, groups: Groups, gram: Gram) -> tuple[Exchange, ...]:
        if not self.gathers or gram.propagate == "dense":
            return tuple(self.round)
        [one] = self.round
        return tuple(replace(one, down="weights", only=part) for part in parts_of_sweep(groups, gram.stride))

    def store_of(self, client: str) -> str | None:
        """The store for the model of one client, where each has its own."""
        return f"{self.name}/{client}" if self.apart else None


def _hidden(exchanges: Sequence[Exchange], clients: int, signed: bool) -> Iterator[Exchange]:
    """Exchanges of which the server sees sums alone: what it makes of one, it makes when the sums are opened."""
    yield Exchange(KEYS)
    yield Exchange(SHARES)
    for one in exchanges:
        squares = [Exchange(SQUARES, SQUARES)] if one.up == "grams" else []
        for each in (*squares, one):
            yield replace(each, hidden=clients)
            if signed:
                yield Exchange(CONFIRM, turn=each.turn)
            yield Exchange(OPENING, each.down, turn=each.turn)


def of_round(exchanges: Sequence[Exchange], last: bool) -> tuple[Exchange, ...]:
    """The exchanges that a round has; recovery follows the last round alone."""
    return tuple(exchange for exchange in exchanges if last or not exchange.recovers)
