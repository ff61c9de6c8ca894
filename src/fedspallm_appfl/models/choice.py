"""Which of the prunable linears are pruned, as `prune.include` and `prune.ignore` say, and what stays dense and why.

The choice acts on the layout: a linear that stays dense is none of it, so nobody else has to know.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from torch import nn
from transformers.pytorch_utils import Conv1D

from fedspallm_appfl.aggregation.layer_sampling import to_text
from fedspallm_appfl.errors import ConfigError, ModelError, quoted
from fedspallm_appfl.models import experts
from fedspallm_appfl.models.layout import Layout, Linear
from fedspallm_appfl.settings.schema import Prune
from fedspallm_appfl.tensors.patterns import beyond, matches, names, near


def choose(found: Layout, prune: Prune, model: nn.Module) -> Layout:
    """The layout with the linears that are to be pruned.

    Args:
        found: all that can be pruned.
        prune: which of them to prune.
        model: whose layout it is; `ignore` may also name what is never pruned.

    Raises:
        ConfigError: a pattern means no matrix, or nothing is left.
    """
    for key, patterns in (("prune.include", prune.include), ("prune.ignore", prune.ignore)):
        for pattern in patterns:
            if beyond(pattern, len(found.blocks)):
                raise ConfigError(f"{key}: {quoted(pattern)} goes beyond the last block, {len(found.blocks) - 1}")
            if not _means_something(pattern, found) and not (key == "prune.ignore" and _is_dense(pattern, model)):
                raise ConfigError(f"{key}: {quoted(pattern)} means no matrix; {near(pattern, _matrices(found))}")
    _refuse_unreadable(found, prune, model)
    chosen = replace(
        found,
        blocks=tuple(
            tuple(linear for linear in linears if _is_chosen(prune, block, linear.name))
            for block, linears in enumerate(found.blocks)
        ),
    )
    if not any(chosen.blocks):
        raise ConfigError(
            f"prune: include {prune.include or 'all'} and ignore {prune.ignore} leave no matrix to prune; ignore less"
        )
    return chosen


def _refuse_unreadable(found: Layout, prune: Prune, model: nn.Module) -> None:
    """Refuse to leave most of a model dense without a word: experts that cannot be pruned have to be ignored by name."""
    blocks: nn.ModuleList = model.get_submodule(found.path)  # type: ignore[assignment]
    for block, module in enumerate(blocks):
        for name in experts.unreadable(module):
            if not any(matches(pattern, block, name) for pattern in prune.ignore):
                raise ModelError(
                    f"block {block} of {type(model).__name__} holds the experts of a mixture in {name}, and its module "
                    "does not tell which tokens go to which of them: they cannot be pruned; name it in prune.ignore to "
                    "leave them dense"
                )


def unmatched(layout: Layout, patterns: Iterable[str]) -> Iterator[str]:
    """What is wrong with patterns of `sparsity` that mean no matrix."""
    for pattern in patterns:
        if beyond(pattern, len(layout.blocks)):
            yield f"{quoted(pattern)} goes beyond the last block, {len(layout.blocks) - 1}"
        elif not _means_something(pattern, layout):
            yield f"{quoted(pattern)} means no matrix that is pruned; {near(pattern, _matrices(layout))}"


def _is_chosen(prune: Prune, block: int, name: str) -> bool:
    included = not prune.include or any(matches(pattern, block, name) for pattern in prune.include)
    return included and not any(matches(pattern, block, name) for pattern in prune.ignore)


def _matrices(layout: Layout) -> list[tuple[int, str]]:
    return [(block, linear.name) for block, linears in enumerate(layout.blocks) for linear in linears]


def _means_something(pattern: str, layout: Layout) -> bool:
    return any(matches(pattern, block, name) for block, name in _matrices(layout))


def _is_dense(pattern: str, model: nn.Module) -> bool:
    """Whether a pattern names a part of the model that is never pruned, such as `lm_head`."""
    return any(names(pattern, name) for name, _ in model.named_parameters(remove_duplicate=False))


@dataclass(frozen=True)
class Dense:
    """Weights in a block that stay dense although they are matrices or larger.

    Attributes:
        name: of the parameter in its block.
        shape: as it is stored.
        why: in words.
    """

    name: str
    shape: tuple[int, ...]
    why: str


def in_words(dense: tuple[Dense, ...]) -> tuple[str, ...]:
    """Weights that stay dense, together where the reason is the same."""
    reasons = dict.fromkeys(one.why for one in dense)
    return tuple(
        f"{', '.join(together(f'{one.name} {one.shape}' for one in dense if one.why == why))} ({why})"
        for why in reasons
    )


def together(found: Iterable[str]) -> Iterator[str]:
    """Names of matrices, those of all experts as one: `mlp.experts.0-7.up_proj`."""
    numbers: dict[str, list[int]] = {}
    for name in found:
        expert = re.search(experts.LISTED, name)
        key = name if expert is None else f"{name[: expert.start(1)]}{{}}{name[expert.end(1) :]}"
        numbers.setdefault(key, []).append(int(expert[1]) if expert else 0)
    for key, which in numbers.items():
        yield key.format(to_text(which)) if "{}" in key else key


def left_dense(model: nn.Module, found: Layout, chosen: Layout) -> list[tuple[Dense, ...]]:
    """What stays dense in each block, and why.

    Args:
        model: whose layout it is.
        found: all that can be pruned.
        chosen: what is pruned.
    """
    blocks: nn.ModuleList = model.get_submodule(found.path)  # type: ignore[assignment]
    every = model.named_parameters(remove_duplicate=False)
    outside = {id(parameter) for name, parameter in every if not name.startswith(f"{found.path}.")}
    pairs = zip(blocks, found.blocks, chosen.blocks, strict=True)
    return [tuple(_dense(block, prunable, pruned, outside)) for block, prunable, pruned in pairs]


def _dense(
    block: nn.Module, prunable: tuple[Linear, ...], pruned: tuple[Linear, ...], outside: set[int]
) -> Iterator[Dense]:
    could, gates = {linear.parameter for linear in prunable}, experts.gates(block)
    for linear in prunable:
        if linear not in pruned:
            yield Dense(linear.name, linear.shape, "left out by `prune`")
    for name, parameter in block.named_parameters():
        if parameter.ndim < 2 or name in could:
            continue
        owner = block.get_submodule(name.rpartition(".")[0])
        if name.rpartition(".")[0] in gates:
            why = "a router"
        elif id(parameter) in outside:
            why = "tied to a weight outside the blocks"
        elif isinstance(owner, nn.Linear | Conv1D):
            why = "the linear is never called, so that its inputs are not known"
        else:
            why = f"{type(owner).__name__}, no linear"
        yield Dense(name, tuple(parameter.shape), why)


def by_kind(blocks: list[tuple[str, ...]]) -> list[tuple[list[int], tuple[str, ...]]]:
    """Blocks that are described alike: (their indices, the description), in the order of the first of each kind."""
    kinds: dict[tuple[str, ...], list[int]] = {}
    for index, names_of in enumerate(blocks):
        kinds.setdefault(names_of, []).append(index)
    return [(indices, names_of) for names_of, indices in kinds.items()]
