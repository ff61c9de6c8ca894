"""Integers as fields of 64-bit words, so that one addition of words adds all of their fields.

Packing is linear modulo 2^64: the sum of packed words is the packed sum, as long as each sum of entries fits its field.
A negative entry borrows from the fields above it. The borrow goes when `unpack` adds half of the range to every field.

Of `n` entries, `W = size(n, bits)` words are made. Entry i is field `i // W` of word `i % W`: a field of all words is one
piece of the entries, which numpy adds without gathering.
"""

import numpy as np
import torch
from torch import Tensor

WORD = 64
PIECE = 1 << 16  # words that are worked on at a time; they stay in the cache


def size(count: int, bits: int) -> int:
    """Words that so many entries take."""
    return -(-count // _fields(bits))


def pack(values: Tensor, bits: int) -> Tensor:
    """Pack entries.

    Args:
        values: (n,) of an integer dtype, on the CPU.
        bits: of a field, 1 to 64; enough for each sum of all clients' entries.

    Returns:
        (W,) int64.

    Raises:
        ValueError: an entry does not fit its field.
    """
    total = size(len(values), bits)
    if len(values):
        low, high = map(int, values.aminmax())
        if low < -(1 << bits - 1) or high >= 1 << bits:
            raise ValueError(f"entries of {bits} bits are wanted, got {low} to {high}; pack them with more bits")
    entries, words = values.numpy(), np.zeros(total, np.int64)
    for start in range(0, total, PIECE):
        piece = words[start : start + PIECE]
        for first in reversed(range(0, len(entries), total)):  # Horner: the highest field first
            if first:
                part = entries[first + start : min(first + start + PIECE, first + total)]
                piece[: len(part)] += part
                piece <<= bits
            else:
                piece += entries[start : start + len(piece)]
    return torch.from_numpy(words)


def unpack(words: Tensor, bits: int, count: int, signed: bool) -> Tensor:
    """Unpack a sum.

    Args:
        words: (W,) int64, sum of packed words.
        bits: as they were packed.
        count: n.
        signed: whether the fields are in `[-2^(bits-1), 2^(bits-1))`, or else in `[0, 2^bits)`.

    Returns:
        (n,) of the smallest of uint8, int8, int16, int32, int64 that holds every field. With 64 bits without a sign it is
        int64 modulo 2^64.

    Raises:
        ValueError: there are more or fewer words than so many entries take.
    """
    total = size(count, bits)
    if len(words) != total:
        raise ValueError(f"{count} entries of {bits} bits take {total} words, got {len(words)}")
    half = 1 << bits - 1 if signed else 0
    offset = np.uint64(sum(half << bits * field for field in range(_fields(bits))))
    mask, packed = np.uint64((1 << bits) - 1), words.numpy().view(np.uint64)
    entries = torch.empty(count, dtype=_dtype(bits, signed)).numpy()
    for start in range(0, total, PIECE):
        piece = packed[start : start + PIECE] + offset
        for field, first in enumerate(range(0, count, total)):
            part = entries[first + start : min(first + start + PIECE, first + total)]
            found = (piece[: len(part)] >> np.uint64(bits * field)) & mask
            part[:] = (found - np.uint64(half)).view(np.int64)  # modulo 2^64: negative again
    return torch.from_numpy(entries)


def _fields(bits: int) -> int:
    if not 1 <= bits <= WORD:
        raise ValueError(f"a field has 1 to {WORD} bits, got {bits}")
    return WORD // bits


def _dtype(bits: int, signed: bool) -> torch.dtype:
    if not signed and bits <= 8:
        return torch.uint8
    needed = bits + (not signed)
    sizes = {8: torch.int8, 16: torch.int16, 32: torch.int32}
    return next((dtype for most, dtype in sizes.items() if needed <= most), torch.int64)
