"""Windows of tokens from text, in its order.

Windows do not overlap. A text of at most `WHOLE` bytes is tokenized as one, a larger one in pieces that end with a line.

A text may be tokenized already: a safetensors file with one tensor `tokens`, (n,) ids to be cut, or (n, length) windows.
"""

from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fedspallm_appfl.errors import DataError, first_line
from fedspallm_appfl.texts.content import Content
from fedspallm_appfl.texts.files import are_tokens, is_online, text_files
from fedspallm_appfl.texts.tokenizer import first_ids, ids_of

WHOLE = 2**20  # bytes of a text that is tokenized as one
PLACES = 16  # where a larger text is looked at, to tell how many tokens it has
SAMPLE = 2**12  # bytes of each
KEPT = 2**28  # bytes of windows that are kept
C4_WINDOWS = 256  # of C4 as the papers take it


@dataclass(frozen=True)
class Cut:
    """How a text is cut.

    Attributes:
        length: tokens in a window.
        bos: `auto`: each window begins as the tokenizer begins a text; `first`: the text as a whole does; `never`.
        field: column of records; None for `text`, or else the only one with text.
        control_words: words such as `</s>` become control tokens.
    """

    length: int
    bos: str = "auto"
    field: str | None = None
    control_words: bool = False


def windows_of(paths: str | Sequence[str], cut: Cut, tokenizer: Any, most: int | None = None) -> Tensor:
    """The whole windows of a text, from its beginning.

    Args:
        paths: as for `text_files`; either all of them are tokenized already or none is.
        cut: how it is cut.
        tokenizer: the model's; not used for what is tokenized already.
        most: at most so many, and of a large text no more is tokenized; None for all.

    Returns:
        (windows, length) int64.

    Raises:
        DataError: a file cannot be read, or holds no tokens or windows of another length.
    """
    files = text_files(paths).files
    if are_tokens(files):
        return torch.cat([_token_windows(Path(file), cut.length) for file in files])[:most]
    if files == ("c4",) and is_online("c4"):
        most = min(most or C4_WINDOWS, C4_WINDOWS)
    return in_order(files, cut, tokenizer, lambda: Content(files, cut.field), most).long()


def in_order(
    files: Sequence[str], cut: Cut, tokenizer: Any, opened: Callable[[], Content], most: int | None = None
) -> Tensor:
    """The same in int32, cut once while the files stay as they are; `opened` is called where that is needed."""
    key = ("in order", state(files), cut, id(tokenizer), most)
    return kept(key, tokenizer, lambda: _cut_in_order(opened(), cut, tokenizer, most))


def _cut_in_order(content: Content, cut: Cut, tokenizer: Any, most: int | None) -> Tensor:
    begin = first_ids(tokenizer)[: cut.length - 1] if cut.bos != "never" else []
    ids = array("i", begin if cut.bos == "first" else [])
    before = ""
    for piece in [content.text()] if content.size <= WHOLE else content.pieces():
        ids.extend(_continued(tokenizer, piece, cut.control_words, before.endswith("\n")))
        before = piece
        if most is not None and len(ids) >= most * cut.length:
            break
    whole = len(ids) // cut.length
    whole = whole if most is None else min(whole, most)
    if not whole:  # there is no tensor on no memory
        return torch.empty(0, cut.length, dtype=torch.int32)
    windows = torch.frombuffer(ids, dtype=torch.int32, count=whole * cut.length).view(whole, cut.length)
    return begun(windows, begin) if cut.bos == "auto" else windows


def begun(windows: Tensor, begin: Sequence[int]) -> Tensor:
    """Windows that begin with tokens which take the place of their last ones."""
    head = torch.tensor(begin, dtype=windows.dtype).expand(len(windows), -1)
    return torch.cat([head, windows[:, : windows.shape[1] - len(begin)]], dim=1)


def _continued(tokenizer: Any, piece: str, control_words: bool, after_line: bool) -> list[int]:
    """The ids of a piece as they are after the line end before it; some tokenizers begin a text with a space."""
    if after_line:
        line, both = ids_of(tokenizer, "\n"), ids_of(tokenizer, "\n" + piece, control_words)
        if both[: len(line)] == line:
            return both[len(line) :]
    return ids_of(tokenizer, piece, control_words)


def about_how_many(paths: str | Sequence[str], cut: Cut, tokenizer: Any) -> int:
    """Windows of a text; of a large one about as many, from some places in it."""
    files = text_files(paths).files
    if are_tokens(files):
        return len(windows_of(files, cut, tokenizer))
    content = Content(files, cut.field)
    if content.size <= WHOLE:
        return len(windows_of(files, cut, tokenizer))
    found = bytes_per_token(content, cut, tokenizer)
    return int(content.size / (sum(found) / len(found)) / cut.length)


def bytes_per_token(content: Content, cut: Cut, tokenizer: Any) -> list[float]:
    """At some places of a large text, in growing order."""
    begins = [(content.size - SAMPLE) * place // (PLACES - 1) for place in range(PLACES)]
    texts = (content.text(begin, begin + SAMPLE) for begin in begins)
    return sorted(SAMPLE / max(1, len(ids_of(tokenizer, text, cut.control_words))) for text in texts)


_windows: OrderedDict[tuple, tuple[Any, Tensor]] = OrderedDict()


def kept(key: tuple, tokenizer: Any, make: Callable[[], Tensor]) -> Tensor:
    """What was made for a key before, so that a check and the run after it cut a text once; the oldest go first.

    Args:
        key: all that the windows depend on; of the tokenizer its `id`.
        tokenizer: kept as long, so that no other has its `id`.
        make: makes them, int32.
    """
    if key not in _windows:
        _windows[key] = tokenizer, make()
    _windows.move_to_end(key)
    while len(_windows) > 1 and sum(one.nbytes for _, one in _windows.values()) > KEPT:
        _windows.popitem(last=False)
    return _windows[key][1]


def forget_windows() -> None:
    """Drop those that are kept."""
    _windows.clear()


def state(files: Sequence[str]) -> tuple:
    """What tells that files have changed."""
    found = []
    for file in files:
        try:
            one = None if is_online(file) else Path(file).stat()
        except (OSError, ValueError):  # said where it is read
            one = None
        found.append((file, one.st_size, one.st_mtime_ns) if one else (file,))
    return tuple(found)


def _token_windows(file: Path, length: int) -> Tensor:
    try:
        found = load_file(file)
    except (OSError, SafetensorError) as error:
        raise DataError(f"the tokens {file} cannot be read: {first_line(error)}") from error
    tokens = found.get("tokens")
    if tokens is None or tokens.is_floating_point() or tokens.dtype == torch.bool or tokens.dim() not in (1, 2):
        shown = ", ".join(f"{name} {one.dtype} {list(one.shape)}" for name, one in found.items())
        raise DataError(f"{file}: a tensor `tokens` of whole numbers, (n,) or (n, length), is needed; it holds {shown}")
    if tokens.dim() == 2 and tokens.shape[1] != length:
        raise DataError(
            f"{file}: its windows have {tokens.shape[1]} tokens, the configuration wants {length}; set the same length"
        )
    whole = tokens.numel() // length
    return tokens.reshape(-1)[: whole * length].long().view(whole, length)
