"""Sparsity targets of all matrices: one for all, or others for some of them. Needs no torch.

In a configuration either a target (`target.parse_target`), or a mapping with `default` and patterns (`patterns`):
`{default: 0.5, "blocks.0-1": 0.3, "*.down_proj": 0.4}`. The last pattern that means a matrix decides.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fedspallm_appfl.tensors.patterns import concerns, matches
from fedspallm_appfl.tensors.target import Target, parse_target

DEFAULT_KEY = "default"
SHOWN = 20  # patterns in a text for people


@dataclass(frozen=True)
class Targets:
    """A target for each matrix.

    Attributes:
        default: of matrices that no pattern means.
        others: (pattern, target); the last that means a matrix decides.
    """

    default: Target
    others: tuple[tuple[str, Target], ...]

    def of(self, block: int, name: str) -> Target:
        """The target of a matrix."""
        if block not in self._of_blocks:
            self._of_blocks[block] = [one for one in reversed(self.others) if concerns(one[0], block)]
        mine = self._of_blocks[block]
        return next((target for pattern, target in mine if matches(pattern, block, name)), self.default)

    @cached_property
    def _of_blocks(self) -> dict[int, list[tuple[str, Target]]]:
        """What may mean a matrix of each block that was asked for, the last first: there may be a pattern a matrix."""
        return {}

    def with_default(self, default: Target) -> "Targets":
        """The same exceptions from another target."""
        return Targets(default, self.others)

    def plain(self) -> dict[str, str]:
        """As it stands in a configuration."""
        return {DEFAULT_KEY: str(self.default)} | {pattern: str(target) for pattern, target in self.others}

    def __str__(self) -> str:
        """All of them, or how many there are where nobody would read them."""
        if len(self.others) > SHOWN:
            return f"{self.default}, others for {len(self.others)} patterns"
        return ", ".join([str(self.default), *(f"{pattern} {target}" for pattern, target in self.others)])


Sparsity = Target | Targets  # a single target is asked in the same way


def parse_sparsity(value: Any) -> Sparsity:
    """Read the targets of a configuration.

    Raises:
        ValueError: a target is none, the default is missing, or targets are listed without their blocks.
    """
    if isinstance(value, list | tuple):
        raise ValueError(f"one target, or a mapping of patterns to targets; {_as_mapping(value)}")
    if not isinstance(value, Mapping):
        return parse_target(value)
    parsed = dict(_parsed(value))
    if DEFAULT_KEY not in parsed:
        raise ValueError(f"a mapping names the {DEFAULT_KEY} too, the target of all other matrices; got {dict(value)}")
    default = parsed.pop(DEFAULT_KEY)
    return Targets(default, tuple(parsed.items())) if parsed else default


def _parsed(value: Mapping[Any, Any]) -> Iterator[tuple[str, Target]]:
    for pattern, target in value.items():
        try:
            yield str(pattern), parse_target(target)
        except ValueError as error:
            raise ValueError(f"{pattern}: {error}") from None


def _as_mapping(listed: Sequence[Any]) -> str:
    """A list of targets as what has to be written for it."""
    texts = list(map(str, listed)) or ["0.5"]
    default = Counter(texts).most_common(1)[0][0]
    others = {f"blocks.{block}": text for block, text in enumerate(texts) if text != default}
    pairs = [f"{DEFAULT_KEY}: {default}", *(f'"{pattern}": {text}' for pattern, text in others.items())]
    return f"a target for each block is written {{{', '.join(pairs)}}}"
