"""Files that are whole or not there at all, also after the power went."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedspallm_appfl.errors import ModelError


def rename(made: Path, file: Path) -> None:
    """Put a file or folder that is complete in the place of an earlier one; the folder is made if need be.

    Raises:
        ModelError: the system refuses it.
    """
    with in_words(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        made.replace(file)
        _sync(file.parent)


def publish(partial: Path, file: Path) -> None:
    """Give a file that was written under another name its own."""
    _sync(partial)
    rename(partial, file)


def write_text(file: Path, text: str) -> None:
    """Write a file in place of an earlier one.

    Raises:
        ModelError: there is no room, or the system refuses it otherwise.
    """
    with in_words(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(text, "utf-8")
        publish(partial, file)


@contextmanager
def in_words(file: Path) -> Iterator[None]:
    """Say of which file it is that the system refuses to write it.

    Raises:
        ModelError: it does.
    """
    try:
        yield
    except OSError as error:
        raise ModelError(
            f"{file} cannot be written: {error.strerror or error}; make room, or make the folder writable"
        ) from error


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
