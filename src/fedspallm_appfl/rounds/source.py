"""All that a client's sweep over its private text needs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fedspallm_appfl.algorithms.algorithm import Groups
from fedspallm_appfl.errors import DataError
from fedspallm_appfl.events import OnEvent, ignore
from fedspallm_appfl.models.activations import HiddenStates, hidden_states
from fedspallm_appfl.models.blockwise import Activations, embed
from fedspallm_appfl.models.inputs import check_statistic
from fedspallm_appfl.models.lazy_model import LazyModel
from fedspallm_appfl.pruning.statistics import Statistic
from fedspallm_appfl.recovery.training import Learner, recovered
from fedspallm_appfl.rounds.checkpoint import Checkpoint
from fedspallm_appfl.settings.schema import ClientSettings
from fedspallm_appfl.wire.deltas import PackedDelta
from fedspallm_appfl.wire.packed import Packed


def _nowhere() -> Path:
    raise AssertionError("nothing is kept between two exchanges")


class Agreed(Protocol):
    """Pruned matrices by block, such as a dict or `AgreedBlocks`."""

    def get(self, block: int, /) -> Mapping[str, Packed] | None:
        """The matrices of a block, or None if it is dense."""


def _nothing() -> Agreed:
    return {}


@dataclass(frozen=True)
class Source:
    """A client's model, text and settings, and what it was sent.

    Attributes:
        model: the dense model.
        windows: (n, T) int64 calibration tokens.
        settings: what the client was told.
        groups: linears that share an input; empty where only matrices travel.
        agreed: pruned blocks that came down.
        masks: masks that came down, of blocks whose values are still to come.
        finished: assigned blocks that the server has already; they are pruned again where later ones need it, not sent.
        checkpoint: where hidden states are kept now and then; None for nowhere.
        squares: sums of squares that came down, of inputs whose Gram matrices are still to come.
        scratch: () -> a folder for what is made in one exchange and sent in a later one.
        in_float32: () -> the model in float32, for gradients in the place of an arithmetic of too narrow a range.
    """

    model: LazyModel
    windows: Tensor
    settings: ClientSettings
    groups: Groups = ()
    agreed: Agreed = field(default_factory=_nothing)
    masks: Agreed = field(default_factory=_nothing)
    finished: frozenset[int] = frozenset()
    checkpoint: Checkpoint | None = None
    squares: Agreed = field(default_factory=_nothing)
    scratch: Callable[[], Path] = _nowhere
    in_float32: Callable[[], LazyModel] | None = None
    on_event: OnEvent = ignore

    def trainable(self) -> LazyModel:
        """The dense model in an arithmetic whose gradients do not vanish: float32 where it is float16."""
        return self.in_float32() if self.in_float32 and self.model.dtype == torch.float16 else self.model

    def embedded(self, windows: Tensor | None = None) -> Activations:
        """Activations in front of the first block, of its own windows or of others."""
        data = self.settings.data
        mine = self.windows if windows is None else windows
        return embed(self.model, mine, data.batch, data.activations, self.settings.client_id)

    def restored(self, state: Activations, first: int) -> int:
        """Move a state on to where an earlier start had come, at most to the first wanted block; returns its block."""
        return self.checkpoint.restore(first, state) if self.checkpoint else 0

    def keep(self, block: int, state: Activations) -> None:
        """Remember what goes into a block, if it is time."""
        if self.checkpoint:
            self.checkpoint.keep(block, state)

    def kept(self) -> HiddenStates:
        """Room for what goes into experts on one device."""
        share = -(-self.windows.numel() // len(self.model.devices))  # batches are dealt in turn; files hold whole ones
        return hidden_states(self.settings.data.activations, share, self.settings.client_id)

    def learnt(self, turn: int | None, blocks: set[int]) -> Iterable[tuple[int, dict[str, PackedDelta]]]:
        """Train from what the server has sent, and give the changes of each block.

        Blocks that are trained together are trained once: a later start takes what an earlier one has learnt.

        Args:
            turn: the round of recovery, from 0.
            blocks: the assigned ones.

        Raises:
            UpdateError: the server has not sent a matrix of these blocks; names client and block.
            PruningError: the loss is not finite; names the client.
        """
        assert turn is not None, "it is an exchange of recovery"
        learner = Learner(self.trainable(), self.agreed.get, self.windows, self.settings, turn, self.on_event)
        if self.checkpoint is None or self.settings.recovery.scope != "all":
            return recovered(learner, blocks)
        made = self.checkpoint.changes()
        if made is None:
            made = dict(recovered(learner, blocks))
            self.checkpoint.keep_changes(made)
        return made.items()

    def where(self, block: int, linear: str) -> str:
        """What errors name."""
        return f"client {self.settings.client_id}, block {block}, {linear}"


def require_tokens(source: Source, block: int, name: str, tokens: int, features: int) -> None:
    """Refuse to send statistics of so few tokens that text might be read back from them.

    Raises:
        DataError: names client, block and input.
    """
    least = source.settings.gram.fewest_tokens(features)
    if tokens < least:
        raise DataError(
            f"{source.where(block, name)}: statistics of {tokens} tokens are not sent: text might be read back from "
            f"fewer than {least}; give more calibration windows, or lower gram.min_tokens"
        )


def check_statistics(source: Source, index: int, found: Sequence[tuple[list[str], Statistic]]) -> None:
    """Refuse what no pruner can use, before anything of the block is pruned; an expert may be reached by no token."""
    for names, statistic in found:
        if statistic.tokens or not source.model.layout.linear(index, names[0]).expert:
            check_statistic(statistic, source.where(index, names[0]), source.model.skeleton, index)
