"""What an algorithm is: the exchanges of a round, the server's arithmetic after each, and the facts that others ask of it.

Nobody compares an algorithm's name: what follows from the choice is a fact here, or follows from its exchanges. The
built-in ones are one file each; `registry` finds them by name.

Legend: O out features, I in features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fedspallm_appfl.settings.schema import Gram
from fedspallm_appfl.tensors.target import Target

Groups = tuple[
    tuple[tuple[str, ...], ...], ...
]  # block -> inputs in the order of the forward pass -> linears that take it

UPLOADS = ("weights", "masks", "values", "grams")
DOWN = (None, "weights", "masks")


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
        up: `weights` (mask and kept values), `masks`, `values` (under a mask that was agreed on), or `grams`.
        down: `weights`, `masks`, or None; what nobody will need, as after the last exchange of a run, is not sent.
        make: (sums, `Matrix`) -> (weight (O, I) float32, mask (O, I) bool with True = kept), or a mask to send down. The
            sums are `L0Sums` of weights or `Votes` of masks. None: weights are kept as they come, values are averaged, and
            with Gram matrices the server prunes.
        only: the one (block, linear) that it is about; None for all blocks.
    """

    up: str
    down: str | None = None
    make: Make | None = None
    only: tuple[int, str] | None = None

    def __post_init__(self) -> None:
        """Refuse what no upload or answer is.

        Raises:
            ValueError: `up` or `down` is none of the valid words.
        """
        if self.up not in UPLOADS or self.down not in DOWN:
            raise ValueError(
                f"an exchange sends one of {', '.join(UPLOADS)} up, and weights, masks or None down; got {self.up!r}, "
                f"{self.down!r}"
            )

    def concerns(self, block: int) -> bool:
        """Whether it is about a block."""
        return self.only is None or self.only[0] == block


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
    def votes(self) -> bool:
        """Whether masks of several clients are combined, so that some entries are zero by agreement."""
        return any(exchange.make is not None for exchange in self.round)

    @property
    def whole_model_once(self) -> bool:
        """Whether it needs one round in which every client prunes every block."""
        return not self.federates

    def exchanges(self, groups: Groups, gram: Gram) -> tuple[Exchange, ...]:
        """The exchanges of one round.

        Statistics of the dense model take one exchange. In a sweep (`gram.propagate: pruned`) an exchange is about one
        input
        of one block: the clients send its Gram matrix in the model that is pruned so far, get the pruned matrices, and go
        on.

        Args:
            groups: for each block the linears that share an input; only algorithms that gather statistics look at them.
            gram: which statistics clients send.
        """
        if not self.gathers or gram.propagate == "dense":
            return tuple(self.round)
        [one] = self.round
        units = ((block, linears[0]) for block, inputs in enumerate(groups) for linears in inputs)
        return tuple(replace(one, down="weights", only=unit) for unit in units)

    def store_of(self, client: str) -> str | None:
        """The store for the model of one client, where each has its own."""
        return f"{self.name}/{client}" if self.apart else None
