"""The fold of each exchange of a round."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from fedspallm_appfl.algorithms.algorithm import DELTAS, NOTHING, PROTOCOL, SQUARES, Exchange
from fedspallm_appfl.rounds.folds.changes import DeltaFold
from fedspallm_appfl.rounds.folds.context import Context, Fold
from fedspallm_appfl.rounds.folds.matrices import KeepFold, ValueFold, VoteFold, WeightFold
from fedspallm_appfl.rounds.folds.statistics import GramFold
from fedspallm_appfl.rounds.hidden.folds import (
    HiddenDeltas,
    HiddenGrams,
    HiddenSquares,
    HiddenValues,
    HiddenVotes,
    NoFold,
)

_FOLDS: dict[str, Callable[[Context, Exchange], Fold]] = {
    "weights": lambda context, exchange: (WeightFold if exchange.make else KeepFold)(context, exchange),
    "masks": VoteFold,
    "values": ValueFold,
    "grams": GramFold,
    DELTAS: DeltaFold,
    NOTHING: KeepFold,  # of no upload
    **dict.fromkeys(PROTOCOL, NoFold),
}
_HIDDEN: dict[str, Callable[[Context, Exchange], Fold]] = {
    "masks": HiddenVotes,
    "values": HiddenValues,
    SQUARES: HiddenSquares,
    "grams": HiddenGrams,
    DELTAS: HiddenDeltas,
}


def folds(context: Context, exchanges: Sequence[Exchange]) -> tuple[Fold, ...]:
    """The fold of each exchange; a single one serves all exchanges of a sweep."""
    made: dict[Exchange, Fold] = {}
    for exchange in (replace(one, only=None) for one in exchanges):
        if exchange not in made:
            made[exchange] = (_HIDDEN if exchange.hidden else _FOLDS)[exchange.up](context, exchange)
    return tuple(made[replace(one, only=None)] for one in exchanges)
