"""The calibration windows of a client: drawn from (seed, client id), the same for any layout of processes.

- From a text that is small, or has few more windows than are wanted, they are drawn from all of them.
- Of a larger one, only what is drawn is tokenized. Its bytes are divided into cells, cells are drawn, and each gives one
  window from a random place in it. Where the first cell begins is random too, so that each place in the text is equally
  likely, except in a cell's width at both ends.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from fedspallm_appfl.errors import DataError
from fedspallm_appfl.tensors.seeds import generator
from fedspallm_appfl.texts.checks import too_few
from fedspallm_appfl.texts.content import Content
from fedspallm_appfl.texts.files import are_tokens, text_files
from fedspallm_appfl.texts.tokenizer import first_ids, ids_of
from fedspallm_appfl.texts.windows import WHOLE, Cut, begun, bytes_per_token, in_order, kept, state, windows_of

ROOM = 1.25  # times the bytes that a window takes where the text is wordiest
WORDIEST = 4  # times the usual bytes per token, at most: a page of spaces says nothing about the text
LEAST_CELL = 2**12  # bytes
MOST_CELLS = 10**6
TIMES = 2  # cells for each window that is wanted, at least
LONGEST_WORD = 64  # characters; text without spaces begins with any of them


def draw(
    paths: str | Sequence[str], cut: Cut, tokenizer: Any, count: int, seed: int, client: str, spare: int = 0
) -> Tensor:
    """The calibration windows of one client.

    Args:
        paths: its text, as for `text_files`.
        cut: how it is cut.
        tokenizer: the model's; not used for what is tokenized already.
        count: how many to take.
        seed: the experiment's seed.
        client: the client's id.
        spare: how many more to take if they are there; the others do not depend on it.

    Returns:
        (count, length) int64, and up to `spare` more.

    Raises:
        DataError: names the client; a file cannot be read, or the text has fewer windows.
    """
    try:
        files = text_files(paths).files
        if are_tokens(files):
            return draw_windows(windows_of(files, cut, tokenizer), count, seed, client, spare)
        key = ("drawn", state(files), cut, id(tokenizer), count, seed, client, spare)
        return kept(key, tokenizer, lambda: _drawn(files, cut, tokenizer, count, seed, client, spare)).long()
    except DataError as error:
        if str(error).startswith(f"client {client}: "):
            raise
        raise DataError(f"client {client}: {error}") from error


def draw_windows(windows: Tensor, count: int, seed: int, client: str, spare: int = 0) -> Tensor:
    """The same, from all windows of a text, (n, length)."""
    if len(windows) < count:
        raise DataError(too_few(client, count, windows.shape[1], len(windows)))
    return windows[torch.randperm(len(windows), generator=_generator(seed, client))[: count + spare]]


def _generator(seed: int, client: str) -> Generator:
    return generator("calibration", seed, client)


def _drawn(files: Sequence[str], cut: Cut, tokenizer: Any, count: int, seed: int, client: str, spare: int) -> Tensor:
    content = Content(files, cut.field)
    if content.size > WHOLE:
        made = _from_cells(content, cut, tokenizer, count, spare, _generator(seed, client))
        if made is not None:
            return made
    return draw_windows(in_order(files, cut, tokenizer, lambda: content), count, seed, client, spare)


def _from_cells(
    content: Content, cut: Cut, tokenizer: Any, count: int, spare: int, generator: Generator
) -> Tensor | None:
    """Windows of a large text; None if it has few more than are wanted."""
    found = bytes_per_token(content, cut, tokenizer)
    need = int(ROOM * min(found[-1], WORDIEST * found[len(found) // 2]) * (cut.length + 1)) + LONGEST_WORD
    size = max(2 * need, LEAST_CELL, content.size // MOST_CELLS)
    if content.size // size < TIMES * count:
        return None
    begin = first_ids(tokenizer) if cut.bos == "auto" else []
    windows: list[Tensor] = []
    for first, last in _cells(content.size, size, generator):
        if len(windows) == count + spare:
            break
        ids = _window(content, cut, tokenizer, first, last, need, generator)
        windows += [torch.tensor(ids, dtype=torch.int32)] if ids else []
    return begun(torch.stack(windows), begin[: cut.length - 1]) if windows and len(windows) >= count else None


def _cells(whole: int, size: int, generator: Generator) -> Iterator[tuple[int, int]]:
    """(first, last) byte of the cells of a text in random order."""
    before = _random(size, generator)
    for cell in torch.randperm(-(-(whole + before) // size), generator=generator).tolist():
        yield max(0, cell * size - before), min(whole, (cell + 1) * size - before)


def _window(
    content: Content, cut: Cut, tokenizer: Any, first: int, last: int, need: int, generator: Generator
) -> list[int] | None:
    """The ids of a window from a random place in a cell; None if none is there."""
    if last - first < need:  # at an end of the text
        return None
    begin = first + _random(last - first - need + 1, generator)
    for end in (begin + need, last):
        text = content.text(begin, end)
        ids = ids_of(tokenizer, _from_a_word(text) if begin else text, cut.control_words)
        if len(ids) > cut.length:  # the last one may be a part of one
            return ids[: cut.length]
    return None


def _from_a_word(text: str) -> str:
    space = re.search(r"\s+", text[:LONGEST_WORD])
    return text[space.end() :] if space else text


def _random(below: int, generator: Generator) -> int:
    return int(torch.randint(below, (), generator=generator))
