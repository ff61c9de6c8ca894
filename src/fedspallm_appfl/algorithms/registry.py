"""The algorithms by name: the built-in ones, and those that plugins add."""

from fedspallm_appfl.algorithms import consensus, fedavg, fedprllm, fedspallm, gram, references
from fedspallm_appfl.algorithms.algorithm import Algorithm
from fedspallm_appfl.errors import ConfigError
from fedspallm_appfl.pruning import registry as pruners
from fedspallm_appfl.pruning.pruner import Pruner
from fedspallm_appfl.settings.plugins import Registry

_BUILT_IN = (
    fedspallm.ALGORITHM,
    fedprllm.ALGORITHM,
    fedavg.ALGORITHM,
    consensus.ALGORITHM,
    gram.ALGORITHM,
    references.STANDALONE,
    references.CENTRALIZED,
)
# Rows of a table, stores of a run, and names in a study.
RESERVED = ("dense", "global", "masks", "sums", "magnitude", "gram-sweep", "gram-dense")
COMPARISONS = (references.STANDALONE.name, fedavg.ALGORITHM.name)  # can be made of uploads that serve for comparison
REGISTRY: Registry[Algorithm] = Registry("an algorithm", {one.name: one for one in _BUILT_IN}, RESERVED)
BUILT_IN, names, find = REGISTRY.built_in, REGISTRY.names, REGISTRY.find


def register(one: Algorithm | Pruner) -> None:
    """Add an algorithm or a pruner, in place of an earlier one of that name unless that is built in.

    Raises:
        ConfigError: it is neither, or its name is taken or not made of letters, digits, '-' and '_'.
    """
    if isinstance(one, Pruner):
        pruners.register(one)
    elif isinstance(one, Algorithm):
        REGISTRY.add(one.name, one)
    else:
        raise ConfigError(f"fs.register takes an Algorithm or a Pruner, got {type(one).__name__}")
