"""What travels of a unit whose sum alone the server is to see: `{"words": (W,) int64}`, integers with masks added.

How integers become words is in `secure.words`, what is masked in `secure.client`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedspallm_appfl.errors import quoted
from fedspallm_appfl.wire.compression import is_plain, require


@dataclass(frozen=True, eq=False)
class PackedWords:
    """Integers of one unit, as words.

    Attributes:
        words: (W,) int64.
    """

    words: Tensor

    def to_dict(self) -> dict[str, Any]:
        """As it travels."""
        return {"words": self.words}

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return self.words.nbytes


def check_words(packed: Any, where: str, size: int) -> PackedWords:
    """Refuse words that are not so many; masked ones say nothing else.

    Args:
        packed: what arrived.
        where: what to name in the error.
        size: W.

    Raises:
        UpdateError: the first thing that is wrong.
    """
    complete = isinstance(packed, Mapping) and set(packed) == {"words"} and is_plain(packed["words"])
    require(complete, where, "a unit of a secure sum is a tensor `words` in memory, and is not compressed")
    words = packed["words"]
    right = words.dtype == torch.int64 and tuple(words.shape) == (size,) and words.is_contiguous()
    require(right, where, f"it has {size} words of int64, got {quoted(list(words.shape))} of {words.dtype}")
    return PackedWords(words)
