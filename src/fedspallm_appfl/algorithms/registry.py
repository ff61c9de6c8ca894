"""The algorithms: what travels in a round, and what the server makes of it (docs/algorithms.md).

Each is one file with `exchanges`, the uploads of a round in order and what goes down after each, and the arithmetic of the
server. What surrounds them - who sends what when, checks, messages, files - is the same for all of them.
"""

from types import ModuleType

from fedspallm_appfl.algorithms import centralized, consensus, fedavg, fedprllm, fedspallm, gram, standalone
from fedspallm_appfl.algorithms.exchange import Exchange, Groups

_MODULES: dict[str, ModuleType] = {
    "fedspallm": fedspallm,
    "fedprllm": fedprllm,
    "fedavg": fedavg,
    "consensus": consensus,
    "gram": gram,
    "standalone": standalone,
    "centralized": centralized,
}
ALGORITHMS = tuple(_MODULES)
COMPARISONS = ("standalone", "fedavg")  # can be made from the uploads of fedspallm, beside its own model
VOTING = ("fedspallm", "fedprllm", "fedavg", "consensus")  # masks of several clients are combined
LABELS = {name: module.LABEL for name, module in _MODULES.items()}


def exchanges(algorithm: str, groups: Groups, propagate: str = "dense") -> tuple[Exchange, ...]:
    """The exchanges of one round.

    Args:
        algorithm: one of `ALGORITHMS`.
        groups: for each block the linears that share an input; only `gram` looks at them.
        propagate: for `gram`, whether statistics are of the dense model or of the one that is being pruned.
    """
    if algorithm == "gram":
        return gram.exchanges(groups, propagate)
    made: tuple[Exchange, ...] = _MODULES[algorithm].EXCHANGES
    return made
