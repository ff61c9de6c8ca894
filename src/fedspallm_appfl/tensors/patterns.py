"""Which matrices a pattern of a configuration means. Needs no torch.

A matrix is called `blocks.N.NAME`, with N the index of its decoder block and NAME as in the block, such as
`blocks.0.self_attn.q_proj`. A pattern names blocks, matrices or both:

* `7`, `0-3` or `0-3,7`, also as `blocks.0-3`: everything in these blocks;
* `self_attn`, `q_proj` or `*.q_proj`: whole parts of the name, `*` and `?` stand for any letters, in every block;
* `blocks.0-3.q_proj` or `0-3.q_proj`: such a name in these blocks.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache

_IN_BLOCKS = re.compile(r"(?:blocks\.)?(\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*)(?:\.(.+))?", re.ASCII)
NEAR = 3  # names that a message shows


def full_name(block: int, name: str) -> str:
    """What a matrix is called in patterns."""
    return f"blocks.{block}.{name}"


def matches(pattern: str, block: int, name: str) -> bool:
    """Whether a pattern means a matrix."""
    runs, glob = _parsed(pattern)
    if runs is None:
        return names(glob, full_name(block, name))
    return any(first <= block <= last for first, last in runs) and names(glob, name)


def concerns(pattern: str, block: int) -> bool:
    """Whether a pattern may mean a matrix of a block."""
    runs, _ = _parsed(pattern)
    return runs is None or any(first <= block <= last for first, last in runs)


def beyond(pattern: str, blocks: int) -> bool:
    """Whether a pattern names a block of a model that has only so many."""
    runs, _ = _parsed(pattern)
    return any(last >= blocks for _, last in runs or ())


def names(glob: str, name: str) -> bool:
    """Whether a glob means whole parts of a dotted name."""
    return any(fnmatchcase(name, form) for form in (glob, f"*.{glob}", f"{glob}.*", f"*.{glob}.*"))


def near(pattern: str, matrices: Iterable[tuple[int, str]]) -> str:
    """What might have been meant by a pattern that means nothing, for messages."""
    found, blocks = dict.fromkeys(name for _, name in matrices), [block for block, _ in matrices]
    here = f"The blocks with something to prune are {min(blocks)} to {max(blocks)}" if blocks else "nothing is pruned"
    if not re.search("[a-z]", pattern.removeprefix("blocks."), re.IGNORECASE):
        return here
    parts = list(dict.fromkeys([*found, *(part for name in found for part in name.split("."))]))
    _, glob = _parsed(pattern)
    wanted = glob.replace("*", "").strip(".")
    like = [part for part in parts if wanted and (wanted in part or part in wanted)]
    close = like or difflib.get_close_matches(wanted, parts, NEAR, 0.5) or list(found)
    return f"did you mean {', '.join(close[:NEAR])}? {here}"


@lru_cache(maxsize=4096)
def _parsed(pattern: str) -> tuple[Sequence[tuple[int, int]] | None, str]:
    """(first and last of each run of blocks, or None for all; glob)."""
    found = _IN_BLOCKS.fullmatch(pattern)
    if found is None:
        return None, pattern
    ends = [run.partition("-") for run in found[1].split(",")]
    return [(int(first), int(last or first)) for first, _, last in ends], found[2] or "*"
