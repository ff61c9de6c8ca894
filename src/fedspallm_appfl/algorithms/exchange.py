"""One exchange: an upload of every client, and what goes down to all of them when it is complete."""

from dataclasses import dataclass

Groups = tuple[
    tuple[tuple[str, ...], ...], ...
]  # block -> inputs in the order of the forward pass -> linears that take it

UPLOADS = ("weights", "masks", "values", "grams")


@dataclass(frozen=True)
class Exchange:
    """What travels in one exchange.

    Attributes:
        up: `weights` (mask and kept values), `masks`, `values` (under a mask that was agreed on), or `grams`.
        down: `weights`, `masks`, or None; what nobody will need, as after the last exchange of a run, is not sent.
        only: the one (block, linear) that it is about; None for all blocks.
    """

    up: str
    down: str | None
    only: tuple[int, str] | None = None

    def concerns(self, block: int) -> bool:
        """Whether it is about a block."""
        return self.only is None or self.only[0] == block
