"""Small changes of values, tensors and text."""

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Path = tuple[Any, ...]


def deep(levels: int) -> list:
    """A list in a list in a list."""
    made: list = []
    for _ in range(levels):
        made = [made]
    return made


class Odd(Tensor):
    """A tensor that may answer anything."""


VALUES: list[Callable[[], Any]] = [
    *(lambda value=value: value for value in (None, True, False, 0, -1, 1, 2**31, 2**63, -(2**70), 10**5000)),
    *(
        lambda value=value: value
        for value in (0.5, math.nan, math.inf, -math.inf, 1e308, "", "0", "weights", "\0\x1b[2J")
    ),
    *(lambda value=value: value for value in (b"", b"\xff", ("a",), frozenset(), object(), complex(1, 2))),
    lambda: "x" * 10**6,
    lambda: 10**50000,
    lambda: deep(5000),
    lambda: [0] * 10**5,
    lambda: {},
    lambda: [],
    lambda: {"zstd": ["mask"]},
    lambda: {number: number for number in range(10**4)},
    lambda: torch.zeros(()),
    lambda: torch.zeros(0),
    lambda: torch.zeros(10**6),
    lambda: torch.zeros(1).expand(10**12),
    lambda: torch.zeros(3, dtype=torch.complex64),
]


KEYS = ["extra", "x" * 10**5, "\0", 3, 10**5000, None, ("a",), "zstd", "unreached"]


def _cut(tensor: Tensor, size: int) -> Tensor:
    tensor.untyped_storage().resize_(size)
    return tensor


def _flipped(tensor: Tensor, dice: random.Random) -> Tensor:
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    for _ in range(dice.choice([1, 1, 2, 20]) if len(flat) else 0):
        flat[dice.randrange(len(flat))] ^= 1 << dice.randrange(8)
    return flat.view(tensor.dtype).view(tensor.shape)


def _noise(tensor: Tensor, dice: random.Random) -> Tensor:
    data = bytearray(dice.randbytes(tensor.nbytes))
    return torch.frombuffer(data, dtype=torch.uint8).view(tensor.dtype).view(tensor.shape) if data else tensor


def _filled(tensor: Tensor, dice: random.Random) -> Tensor:
    if not tensor.is_floating_point():
        return torch.full_like(tensor, dice.choice([0, 1, 127]))
    return torch.full_like(tensor, dice.choice([0.0, -0.0, math.nan, math.inf, -math.inf, 6e4, -6e4, 1e-40]))


TENSORS: list[Callable[[Tensor, random.Random], Any]] = [
    *([_flipped] * 6),
    *([_filled] * 2),
    _noise,
    lambda t, dice: t * dice.choice([-1, 2, 10, 1000, 1e38]) if t.is_floating_point() else -t,
    lambda t, dice: t[: dice.randrange(len(t) + 1)] if t.ndim else t,
    lambda t, dice: torch.cat([t.view(-1), t.view(-1)[:1]]),
    lambda t, dice: t[None],
    lambda t, dice: t.double(),
    lambda t, dice: t.view(torch.uint8) if t.ndim else t,
    lambda t, dice: t.flip(0) if t.ndim else t,
    lambda t, dice: torch.stack([t, t], -1)[..., 0],
    lambda t, dice: t.as_subclass(Odd),
    lambda t, dice: t.to("meta"),
    lambda t, dice: t.to_sparse() if t.ndim else t,
    lambda t, dice: torch._neg_view(t),
    lambda t, dice: t.float().requires_grad_(),
    lambda t, dice: _cut(t, 0),
    lambda t, dice: _cut(t, max(0, t.nbytes - 1)),
    lambda t, dice: t.view(-1)[:1].expand(dice.choice([t.numel(), 10**12])),
]


def copied(value: Any) -> Any:
    """The same in memory of its own."""
    if isinstance(value, dict):
        return {key: copied(one) for key, one in value.items()}
    if isinstance(value, list):
        return [copied(one) for one in value]
    return value.clone() if isinstance(value, Tensor) else value


def _places(value: Any, path: Path = ()) -> list[Path]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, one in inner for place in ((*path, key), *_places(one, (*path, key)))]


def changed(value: Any, dice: random.Random) -> tuple[Any, Path]:
    """A copy of nested dicts and lists with one change, and the place of that."""
    made = copied(value)
    places = _places(made)
    tensors = [place for place in places if isinstance(_at(made, place), Tensor)]
    place = dice.choice(tensors if tensors and dice.random() < 0.6 else places)
    group, key = _at(made, place[:-1]), place[-1]
    if isinstance(group[key], Tensor) and dice.random() < 0.85:
        group[key] = dice.choice(TENSORS)(group[key], dice)
        return made, place
    how = dice.choice(["replace", "replace", "delete", "add", "rename"]) if isinstance(group, dict) else "replace"
    if how == "replace":
        group[key] = dice.choice(VALUES)()
    elif how == "delete":
        del group[key]
    elif how == "add":
        group[dice.choice(["extra", "x" * 10**5, "\0", 3, 10**5000, None, ("a",), "zstd", "unreached"])] = dice.choice(
            VALUES
        )()
    else:
        group[dice.choice(["extra", 0, "0", "00", "1" * 5000])] = group.pop(key)
    return made, place


def _at(value: Any, path: Path) -> Any:
    for key in path:
        value = value[key]
    return value


SNIPPETS = [
    *(
        "[" * 3000,
        "{" * 3000,
        "&a [*a, *a]",
        "*a",
        "!!python/object:os.system x",
        "? ",
        "- ",
        ": ",
        "\t",
        "null",
        "~",
        "''",
    ),
    *("nan", ".inf", "1e999", "-1", "0", "9" * 5000, "2:4", "0.5", "true", "\0", "\ufeff", "\x1b[2J", "x" * 10**5),
    *("${here:x}", "${nothing}", "${", "[]", "{}", "[1, 2]", "{a: 1}", "1/3", "9/0", "|", ">", "%", "@", "\ud7ff"),
]


def changed_text(text: bytes, dice: random.Random) -> bytes:
    """A text with a few changes."""
    for _ in range(dice.choice([1, 1, 1, 2, 3])):
        text = dice.choice(_TEXTS)(text, dice)
    return text


def _bits(text: bytes, dice: random.Random) -> bytes:
    made = bytearray(text or b"x")
    for _ in range(dice.choice([1, 3, 10])):
        made[dice.randrange(len(made))] ^= 1 << dice.randrange(8)
    return bytes(made)


def _insert(text: bytes, dice: random.Random) -> bytes:
    at = dice.randrange(len(text) + 1)
    return text[:at] + dice.choice(SNIPPETS).encode() + text[at:]


def _delete(text: bytes, dice: random.Random) -> bytes:
    at = dice.randrange(len(text) + 1)
    return text[:at] + text[at + dice.choice([1, 5, 50, 10**6]) :]


def _word(text: bytes, dice: random.Random) -> bytes:
    """A value in the place of another."""
    words = text.split(b" ")
    words[dice.randrange(len(words))] = dice.choice(SNIPPETS).encode() + b"\n" * dice.randrange(2)
    return b" ".join(words)


def _line(text: bytes, dice: random.Random) -> bytes:
    lines = text.split(b"\n")
    lines.insert(dice.randrange(len(lines)), dice.choice(lines))
    return b"\n".join(lines)


_TEXTS = [_bits, _insert, _insert, _delete, _word, _word, _word, _line]
