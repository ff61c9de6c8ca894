"""What a client learns in a round of recovery, once: a later start takes what an earlier one has learnt."""

from collections.abc import Iterable, Mapping

from fedspallm_appfl.algorithms.algorithm import Exchange
from fedspallm_appfl.recovery.training import Learner, recovered
from fedspallm_appfl.rounds.source import Source
from fedspallm_appfl.wire.deltas import PackedDelta


def learnt(source: Source, exchange: Exchange, blocks: set[int]) -> Iterable[tuple[int, Mapping[str, PackedDelta]]]:
    """Train from what the server has sent, block by block; blocks that are trained together are kept for a later start.

    Raises:
        UpdateError: the server has not sent a matrix of these blocks; names client and block.
        PruningError: the loss is not finite; names the client.
    """
    assert exchange.turn is not None, "it belongs to recovery"
    learner = Learner(
        source.trainable(), source.agreed.get, source.windows, source.settings, exchange.turn, source.on_event
    )
    if source.checkpoint is None or source.settings.recovery.scope != "all":
        return recovered(learner, blocks)
    made = source.checkpoint.changes()
    if made is None:
        made = dict(recovered(learner, blocks))
        source.checkpoint.keep_changes(made)
    return made.items()
