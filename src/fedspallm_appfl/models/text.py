"""Windows of tokens from text: the private calibration text of a client, or the held-out text of an evaluation.

A text is tokenized whole and cut into windows of `length` tokens that do not overlap. A client then takes `count` of them
in a random order from (seed, client id): the same windows for any layout of processes.

A text may be tokenized already: a safetensors file with one tensor `tokens`, (n,) ids to be cut, or (n, length) windows.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fedspallm_appfl.errors import DataError, ModelError, first_line
from fedspallm_appfl.models import custom_code

TOKENS = ".safetensors"


def tokenizer_for(folder: Path, *texts: str | Sequence[str]) -> Any:
    """The tokenizer of a model folder; None if all texts are tokenized already.

    Raises:
        ModelError: there is no readable tokenizer.
        DataError: a text cannot be found.
    """
    return None if all(map(are_tokens, texts)) else load_tokenizer(folder)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder.

    Raises:
        ModelError: there is no readable tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=custom_code.allowed(folder))
    except Exception as error:  # the Rust library behind it raises bare exceptions
        why = custom_code.refusal(folder) or f"{folder} has no readable tokenizer: {first_line(error)}"
        raise ModelError(why) from error
    if len(tokenizer) < 2:  # made of nothing where there are no files of one
        raise ModelError(f"{folder} has no tokenizer; save the model's tokenizer there")
    return tokenizer


def read_text(paths: str | Sequence[str]) -> str:
    """Join the files of `text_files`.

    Raises:
        DataError: a path does not exist, a folder holds no text, or a file is not UTF-8.
    """
    return "\n".join(_read_file(file) for file in text_files(paths))


def text_files(paths: str | Sequence[str]) -> list[Path]:
    """The files of a text; a folder means the `.txt` files in it, sorted by name.

    Raises:
        DataError: a folder holds no text, or a home directory is not known.
    """
    files: list[Path] = []
    for path in map(_expanded, [paths] if isinstance(paths, str) else paths):
        try:
            found = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise DataError(f"the text {str(path)[:80]!r} cannot be found: {why}; name a file or a folder") from error
        if not found:
            raise DataError(f"the folder {path} has no .txt file; name a text file or a folder with .txt files")
        files.extend(found)
    return files


def _expanded(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise DataError(f"the text {path} cannot be found: {error}") from error


def _read_file(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except (OSError, ValueError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise DataError(f"the text {file} is not UTF-8 (byte {error.start}); convert it first") from error
        raise DataError(f"the text {file} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def are_tokens(paths: str | Sequence[str]) -> bool:
    """Whether a text is tokenized already.

    Raises:
        DataError: a folder holds no text, or a home directory is not known.
    """
    return all(file.suffix == TOKENS for file in text_files(paths))


def windows_of(paths: str | Sequence[str], length: int, tokenizer: Any) -> Tensor:
    """All whole windows of a text.

    Args:
        paths: as for `text_files`; either all of them are tokenized already or none is.
        length: tokens in a window.
        tokenizer: the model's; not used for what is tokenized already.

    Returns:
        (windows, length) int64.

    Raises:
        DataError: a file cannot be read, or holds no tokens or windows of another length.
    """
    if not are_tokens(paths):
        return cut_windows(tokenizer, read_text(paths), length)
    return torch.cat([_token_windows(file, length) for file in text_files(paths)])


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


def cut_windows(tokenizer: Any, text: str, length: int) -> Tensor:
    """All whole windows of a text, in order. (windows, length) int64."""
    tokenizer.model_max_length = int(1e30)  # the text is cut into windows, so a warning about its length would be wrong
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = len(ids) // length
    return torch.tensor(ids[: whole * length], dtype=torch.int64).view(whole, length)


def draw_windows(windows: Tensor, count: int, seed: int, client: str) -> Tensor:
    """The calibration windows of one client.

    Args:
        windows: (n, length) int64, all windows of its text.
        count: how many to take.
        seed: the experiment's seed.
        client: the client's id.

    Returns:
        (count, length) int64.

    Raises:
        DataError: the text has fewer windows.
    """
    if len(windows) < count:
        raise DataError(too_few(client, count, windows.shape[1], len(windows)))
    digest = hashlib.sha256(f"calibration/{seed}/{client}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return windows[torch.randperm(len(windows), generator=generator)[:count]]


def too_few(client: str, count: int, length: int, found: int) -> str:
    """The error message for a private text that has fewer windows than requested."""
    return (
        f"client {client}: {count} calibration windows of {length} tokens were requested, its text has {found}; "
        "give more text, or lower data.windows or data.length"
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


def held_out_windows(
    name: str, text: str | Sequence[str], length: int, tokenizer: Any = None, vocabulary: int = 0
) -> Tensor:
    """The windows of one text of a configuration's `evaluation`.

    Args:
        name: its name there.
        text: file, folder or a list of these.
        length: tokens in a window.
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
            if not are_tokens(text):
                read_text(text)
            return torch.empty(0, length, dtype=torch.int64)
        windows = windows_of(text, length, tokenizer)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    if not len(windows):
        files = text if isinstance(text, str) else ", ".join(text)
        raise DataError(
            f"{where}: {files} has no whole window of {length} tokens; give more text, or lower evaluation.length"
        )
    check_vocabulary(windows, vocabulary, where)
    return windows
