"""What is in a file that is not plain text: one column of its records, with an empty line between two of them.

The library `datasets` reads records, as a stream: no copy of private text stays in a cache.
"""

import gzip
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import zstandard

from fedspallm_appfl.errors import DataError, extra, first_line
from fedspallm_appfl.texts.files import HUB, PLAIN, RECORDS, endings, is_online, is_saved

BETWEEN = "\n\n"  # two records
RECORDS_AT_ONCE = 256
DEFAULT_FIELD = "text"
DEFAULT_SPLIT = "train"
AT_ONCE = 2**20  # bytes
C4_RECORDS = 1100  # as the scripts of SparseGPT and Wanda take them


def is_plain(file: str) -> bool:
    """Whether the bytes of a file are its text."""
    ending, packed = endings(file)
    return not (packed or ending in RECORDS or is_online(file) or is_saved(file))


def unpack(file: str, field: str | None, into: IO[bytes]) -> None:
    """Write the text of a file that is not plain, in UTF-8.

    Args:
        file: a compressed text, a file of records, a folder that `datasets` has saved, or a data set of the hub.
        field: the column; None for `text`, or else the only column with text.
        into: takes the text.

    Raises:
        DataError: it cannot be read, has no such column, or `datasets` is not installed.
        OSError: there is no room for the text.
    """
    ending, packed = endings(file)
    if packed and ending not in RECORDS:
        for part in _decompressed(file, packed):
            into.write(part)
        return
    for number, record in enumerate(_records(file, field)):
        into.write(((_between(file) if number else "") + record).encode("utf-8", "replace"))


def _decompressed(file: str, packed: str) -> Iterator[bytes]:
    try:
        with Path(file).open("rb") as raw:
            yield from _gunzipped(raw) if packed == ".gz" else _unframed(raw)
    except (gzip.BadGzipFile, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"the text {file} cannot be unpacked: {first_line(error)}") from error
    except OSError as error:
        raise DataError(f"the text {file} cannot be read: {error.strerror}") from error


def _gunzipped(raw: IO[bytes]) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=raw) as stream:
        yield from iter(lambda: stream.read(AT_ONCE), b"")


def _unframed(raw: IO[bytes]) -> Iterator[bytes]:
    """One frame after the other; the stream readers of the library take a part of one for the whole."""
    made = zstandard.ZstdDecompressor()
    frame, left = made.decompressobj(), b""
    while left := left or raw.read(AT_ONCE):
        frame = made.decompressobj() if frame.eof else frame
        yield frame.decompress(left)
        left = frame.unused_data
    if not frame.eof:
        raise EOFError("it ends in the middle of a frame")


def _between(file: str) -> str:
    return " " if file in ("ptb", "c4") and is_online(file) else BETWEEN


def _records(file: str, field: str | None) -> Iterator[str]:
    """The texts of a file of records."""
    library = _datasets(file)
    with tempfile.TemporaryDirectory(prefix="fedspallm-") as cache:
        try:
            found = _data_set(library, file, cache)
            yield from _column(found, file, _field_of(file, field))
        except DataError:
            raise
        except Exception as error:  # noqa: BLE001 - it raises errors of many libraries
            raise _unreadable(file, error) from error


def _unreadable(file: str, error: Exception) -> DataError:
    what = "the data set" if is_online(file) else "the text"
    advice = (
        "; it comes from the Hugging Face hub: is that reachable, and is the name right?" if is_online(file) else ""
    )
    why = first_line(error)
    return DataError(f"{what} {file} cannot be read: {why}{advice}", private=why)


def _datasets(file: str) -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{file} is not plain text, and what reads it is not installed: name text ({', '.join(PLAIN)}), or "
            f"{extra('data')}"
        ) from error
    return datasets


def _data_set(library: ModuleType, file: str, cache: str) -> Any:
    """A data set that is read from its beginning to its end."""
    online = {"split": DEFAULT_SPLIT, "streaming": True, "cache_dir": cache}
    if is_online(file):
        return library.load_dataset(**{**online, **_hub_names(file)})
    if is_saved(file):
        found = library.load_from_disk(file)
        if not isinstance(found, dict):
            return found
        if len(found) != 1:
            raise DataError(
                f"the text {file} has the splits {', '.join(found)}; name one, as {file}/{next(iter(found))}"
            )
        return next(iter(found.values()))
    if not Path(file).is_file():
        raise DataError(f"the text {file} cannot be read: No such file or directory")
    literally = "".join(f"[{one}]" if one in "*?[" else one for one in file)
    return library.load_dataset(RECORDS[endings(file)[0]], data_files=[literally], **online)


def _hub_names(file: str) -> dict[str, Any]:
    """What `load_dataset` is asked for: `hf:owner/name:config:split@revision`, or a text of the papers by its name.

    Sources: WikiText2, PTB and C4 as the scripts of SparseGPT and Wanda take them.
    """
    if file == "wikitext2":
        return {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test"}
    if file == "ptb":  # the original is a script, which is no longer run
        parquet = "refs/convert/parquet"
        return {"path": "ptb-text-only/ptb_text_only", "name": "penn_treebank", "split": "test", "revision": parquet}
    if file == "c4":
        shard = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
        return {"path": "allenai/c4", "data_files": shard, "split": "validation"}
    names, _, revision = file.removeprefix(HUB).partition("@")
    path, config, split, *more = [*names.split(":"), "", ""]
    if not path or any(more):
        raise DataError(f"a data set of the hub is hf:owner/name:config:split@revision, or shorter; got {file}")
    asked = {"path": path, "name": config, "split": split or DEFAULT_SPLIT, "revision": revision}
    return {key: value for key, value in asked.items() if value}


def _field_of(file: str, field: str | None) -> str | None:
    return "sentence" if file == "ptb" and is_online(file) else field


def _column(found: Any, file: str, field: str | None) -> Iterator[str]:
    """The texts of a column; records without one are skipped."""
    left = C4_RECORDS if file == "c4" and is_online(file) else None
    name = None
    for table in found.with_format("arrow").iter(batch_size=RECORDS_AT_ONCE):
        name = name or _chosen(table.schema, file, field)
        if name not in table.column_names:
            continue
        for record in table.column(name).to_pylist():
            if record is not None and left != 0:
                if not isinstance(record, str):
                    raise DataError(f"the text {file}: its column {name} holds {type(record).__name__}, not text")
                left = left - 1 if left else left
                yield record
        if left == 0:
            return


def _chosen(schema: Any, file: str, field: str | None) -> str:
    """The column with the text.

    Raises:
        DataError: there is none, or it is not clear which.
    """
    text = [one.name for one in schema if str(one.type) in ("string", "large_string", "string_view")]
    if (field or DEFAULT_FIELD) in schema.names:
        return field or DEFAULT_FIELD
    if field is None and len(text) == 1:
        return text[0]
    many = f"has {len(text) or 'no'} columns with text, and none is called {DEFAULT_FIELD}"
    asked = f"has no column {field}" if field else many
    columns = ", ".join(schema.names)  # those of a table without a header are its first record
    raise DataError(f"the text {file} {asked}; set field to one of its columns: {columns}", private=columns)
