"""The algorithms by name: the built-in ones, and those that plugins add."""

from fedspallm_appfl.algorithms import consensus, fedavg, fedprllm, fedspallm, gram, references
from fedspallm_appfl.algorithms.algorithm import Algorithm
from fedspallm_appfl.errors import ConfigError
from fedspallm_appfl.settings.plugins import ADDED

_ALGORITHMS: dict[str, Algorithm] = {
    one.name: one
    for one in (
        fedspallm.ALGORITHM,
        fedprllm.ALGORITHM,
        fedavg.ALGORITHM,
        consensus.ALGORITHM,
        gram.ALGORITHM,
        references.STANDALONE,
        references.CENTRALIZED,
    )
}
BUILT_IN = tuple(_ALGORITHMS)
RESERVED = (
    "dense",
    "global",
    "masks",
    "sums",
    "magnitude",
    "gram-sweep",
    "gram-dense",
)  # rows, stores, names in a study
COMPARISONS = (references.STANDALONE.name, fedavg.ALGORITHM.name)  # can be made of uploads that serve for comparison


def names() -> tuple[str, ...]:
    """All algorithms, the built-in ones first."""
    return tuple(_ALGORITHMS)


def find(name: str) -> Algorithm:
    """The algorithm of a name.

    Raises:
        ConfigError: there is none; lists those that there are.
    """
    if name not in _ALGORITHMS:
        raise ConfigError(
            f"an algorithm is one of {', '.join(_ALGORITHMS)}, or of a plugin that `plugins` names; got {name!r}"
        )
    return _ALGORITHMS[name]


def register(algorithm: Algorithm) -> Algorithm:
    """Add an algorithm, in place of an earlier one of that name unless that is built in.

    Raises:
        ConfigError: it is none, or its name is taken or not made of letters, digits, '-' and '_'.
    """
    if not isinstance(algorithm, Algorithm):
        raise ConfigError(f"an algorithm is an Algorithm, got {type(algorithm).__name__}")
    if algorithm.name in (*BUILT_IN, *RESERVED):
        raise ConfigError(f"an algorithm {algorithm.name} is built in; give your own another name")
    if not algorithm.name.replace("-", "_").isidentifier():
        raise ConfigError(f"an algorithm's name has letters, digits, '-' and '_', got {algorithm.name!r}")
    _ALGORITHMS[algorithm.name] = algorithm
    ADDED.add(algorithm.name)
    return algorithm
