"""The bytes of a text as if they were in one file, of which any part can be read.

What is not plain is unpacked to a temporary file first. Between two files is a line end.
"""

import bisect
import codecs
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from fedspallm_appfl.errors import DataError
from fedspallm_appfl.texts.files import text_files
from fedspallm_appfl.texts.formats import is_plain, unpack

PIECE = 2**18  # bytes that are tokenized at once; tokens take a hundred times the memory of their text
LINE_END = b"\n"
CONVERT = "name plain text, or convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)"
OTHERS = {"UTF-32": codecs.BOM_UTF32_LE, "UTF-16": codecs.BOM_UTF16_LE, "UTF-16, big end first": codecs.BOM_UTF16_BE}


@dataclass(frozen=True)
class _Part:
    """A file, or what it was unpacked to.

    Attributes:
        name: of the file.
        begin: where it begins in the text.
        size: its bytes.
        unpacked: the temporary file; None for a plain file.
        offset: where it begins in that, or in the plain file.
    """

    name: str
    begin: int
    size: int
    unpacked: IO[bytes] | None = None
    offset: int = 0

    def read(self, first: int, last: int) -> bytes:
        """Bytes `first` to `last` of it."""
        if self.unpacked is not None:
            self.unpacked.seek(self.offset + first)
            return self.unpacked.read(last - first)
        try:
            with Path(self.name).open("rb") as file:
                file.seek(self.offset + first)
                return file.read(last - first)
        except OSError as error:
            raise _unreadable(self.name, error) from error

    def decoded(self, first: int, last: int) -> str:
        """The characters between two bytes of it that are there as a whole, with line ends as Python reads them."""
        data = self.read(first, last)
        begun = next((at for at in range(min(4, len(data))) if first == 0 or data[at] & 0xC0 != 0x80), 0)
        try:
            text = codecs.getincrementaldecoder("utf-8")().decode(data[begun:], last == self.size)
        except UnicodeDecodeError as error:
            at = self._place(first + begun + error.start)
            raise DataError(f"the text {self.name} is not UTF-8 (byte {at}); convert it first") from error
        if "\0" in text:
            at = self._place(first + begun + len(text[: text.index("\0")].encode()))
            raise DataError(f"the text {self.name} holds a NUL byte (byte {at}), so it is binary or UTF-16; {CONVERT}")
        return text.replace("\r\n", "\n").replace("\r", "\n")

    def _place(self, at: int) -> int:
        """Where a byte is in the file."""
        return at + (self.offset if self.unpacked is None else 0)

    def without_mark(self) -> "_Part":
        """The same without the mark at its beginning that says UTF-8.

        Raises:
            DataError: the mark says another encoding.
        """
        start = self.read(0, min(4, self.size))
        for name, mark in OTHERS.items():
            if start.startswith(mark):
                raise DataError(f"the text {self.name} is {name}; {CONVERT}")
        marked = len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0
        return replace(self, size=self.size - marked, offset=self.offset + marked)


class Content:
    """A text.

    Attributes:
        size: its bytes.
    """

    def __init__(self, paths: str | Sequence[str], field: str | None = None) -> None:
        """Find its files, and unpack what is not plain.

        Args:
            paths: as for `text_files`.
            field: column of records.

        Raises:
            DataError: a file cannot be read, or the disk has no room.
        """
        self._parts: list[_Part] = []
        self._begins: list[int] = []
        self._unpacked: IO[bytes] | None = None
        self.size = 0
        for name in text_files(paths).files:
            begin = self.size + len(LINE_END) if self._parts else 0
            part = _Part(name, begin, _size(name)) if is_plain(name) else self._unpack(name, begin, field)
            part = part.without_mark()
            self._parts.append(part)
            self._begins.append(begin)
            self.size = part.begin + part.size

    def _unpack(self, name: str, begin: int, field: str | None) -> _Part:
        try:
            if self._unpacked is None:
                self._unpacked = tempfile.TemporaryFile()  # has no name; mode 0600  # noqa: SIM115 - closed with this object
            offset = self._unpacked.seek(0, os.SEEK_END)
            unpack(name, field, self._unpacked)
            self._unpacked.flush()
            return _Part(name, begin, self._unpacked.tell() - offset, self._unpacked, offset)
        except OSError as error:
            raise DataError(
                f"the text {name} cannot be unpacked to the folder for temporary files: {error.strerror}; free some disk "
                "space, or name another folder in the environment variable TMPDIR"
            ) from error

    def text(self, begin: int = 0, end: int | None = None) -> str:
        """The characters between two bytes that are there as a whole.

        Raises:
            DataError: a file cannot be read, or is not UTF-8.
        """
        return "\n".join(part.decoded(first, last) for part, first, last in self._between(begin, end))

    def pieces(self) -> Iterator[str]:
        """The text in pieces of at most `PIECE` bytes, which end with a line where there is a line end in them."""
        begin = 0
        while begin < self.size:
            end = min(begin + PIECE, self.size)
            if end < self.size:
                data = LINE_END.join(part.read(first, last) for part, first, last in self._between(begin, end))
                end = begin + _cut(data)
            yield self.text(begin, end)
            begin = end

    def _between(self, begin: int, end: int | None) -> Iterator[tuple[_Part, int, int]]:
        """The files between two bytes, each with its first and last byte; two of them have the line end between them."""
        end = self.size if end is None else end
        for part in self._parts[max(0, bisect.bisect_right(self._begins, begin) - 1) :]:
            if part.begin > end:
                return
            if begin <= part.begin + part.size:
                yield part, max(begin - part.begin, 0), min(end - part.begin, part.size)


def _cut(data: bytes) -> int:
    """Where a piece best ends: after a line, so that tokens on both sides are those of the whole text; in no character.

    A tokenizer may join several line ends to one token, so a line end that stands alone is best.
    """
    for pattern in (rb"\S\n(?=\S)", rb"\n(?=[^\n])", rb"\S(?= )"):
        found = None
        for found in re.finditer(pattern, data):  # noqa: B007 - the last one
            pass
        if found:
            return found.end()
    return next((at for at in range(len(data) - 1, 0, -1) if data[at] & 0xC0 != 0x80), len(data))


def _size(name: str) -> int:
    try:
        return Path(name).stat().st_size
    except (OSError, ValueError) as error:
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: Exception) -> DataError:
    return DataError(f"the text {name} cannot be read: {getattr(error, 'strerror', None) or error}")
