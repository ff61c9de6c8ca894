"""What can be wrong with a text, in words, and the windows of held-out text."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedspallm_appfl.errors import DataError
from fedspallm_appfl.texts.content import Content
from fedspallm_appfl.texts.files import are_tokens, text_files
from fedspallm_appfl.texts.windows import WHOLE, Cut, windows_of


def too_few(client: str, count: int, length: int, found: int) -> str:
    """The error message for a private text that has fewer windows than requested."""
    return (
        f"client {client}: {count} calibration windows of {length} tokens were requested, its text has {found}; "
        "give more text, or lower client_configs.data.windows or client_configs.data.length"
    )


def check_vocabulary(windows: Tensor, vocabulary: int, where: str) -> None:
    """Refuse token ids without an embedding.

    Raises:
        DataError: the tokens are those of another model.
    """
    if not windows.numel():
        return
    least, most = int(windows.min()), int(windows.max())
    if least < 0 or most >= vocabulary:
        raise DataError(
            f"{where}: the text has tokens from {least} to {most}, the model those from 0 to {vocabulary - 1}; "
            "tokenizer and model do not belong together"
        )


def look_at(paths: str | Sequence[str], field: str | None) -> int:
    """See whether a text can be read, where it is not cut; returns its bytes, or 0 if it is tokenized already.

    Raises:
        DataError: a file cannot be found or read; a large text is not read as a whole.
    """
    files = text_files(paths).files
    if are_tokens(files):
        return 0
    content = Content(files, field)
    content.text(0, min(content.size, WHOLE))
    return content.size


def held_out_windows(
    name: str, text: str | Sequence[str], cut: Cut, most: int | None = None, tokenizer: Any = None, vocabulary: int = 0
) -> Tensor:
    """The windows of one text of a configuration's `evaluation`.

    Args:
        name: its name there.
        text: as for `text_files`.
        cut: how it is cut.
        most: at most so many windows; None for all.
        tokenizer: the model's, for a text that is not tokenized already.
        vocabulary: token ids that the model has an embedding for; 0 to see only whether the text can be read.

    Returns:
        (n, length) int64; n is at least 1 if it was cut.

    Raises:
        DataError: names the key and the file that cannot be read, is too short, or does not go with the model.
    """
    where = f"evaluation.texts.{name}"
    try:
        if not vocabulary or (tokenizer is None and not are_tokens(text)):
            look_at(text, cut.field)
            return torch.empty(0, cut.length, dtype=torch.int64)
        windows = windows_of(text, cut, tokenizer, most)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    if not len(windows):
        files = text if isinstance(text, str) else ", ".join(text)
        raise DataError(
            f"{where}: {files} has no whole window of {cut.length} tokens; give more text, or lower evaluation.length"
        )
    check_vocabulary(windows, vocabulary, where)
    return windows
