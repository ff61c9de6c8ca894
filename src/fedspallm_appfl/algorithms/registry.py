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
        ConfigError: the name is that of a built-in algorithm, or not made of letters, digits, '-' and '_'; or it has no
            exchange, or gathers statistics in one of several.
    """
    if algorithm.name in BUILT_IN:
        raise ConfigError(f"an algorithm {algorithm.name} is built in; give your own another name")
    if not algorithm.name.replace("-", "_").isidentifier():
        raise ConfigError(f"an algorithm's name has letters, digits, '-' and '_', got {algorithm.name!r}")
    if not algorithm.round or (algorithm.gathers and len(algorithm.round) > 1):
        raise ConfigError(f"algorithm {algorithm.name}: name its exchanges; one with Gram matrices stands alone")
    _ALGORITHMS[algorithm.name] = algorithm
    ADDED.add(algorithm.name)
    return algorithm
