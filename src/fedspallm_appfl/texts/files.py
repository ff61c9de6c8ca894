"""Which files a text means: a file, a folder with its subfolders, a pattern, a data set, or a list of these.

A file that is named by itself is read whatever its ending. In a folder the ending decides, in any case; what is left out
is named, so that nobody prunes on half of a text without knowing.
"""

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedspallm_appfl.errors import DataError, quoted

PLAIN = (".txt", ".md")
RECORDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}  # ending -> reader of `datasets`
PACKED = (".gz", ".zst")
TOKENS = ".safetensors"
ENDINGS = (*PLAIN, *RECORDS)
HUB = "hf:"  # a data set of the hub, as `hf:owner/name:config:split@revision`
NAMED = ("wikitext2", "ptb", "c4")  # texts of the papers, where no file has that name
SAVED = (("dataset_dict.json",), ("dataset_info.json", "state.json"))  # what `save_to_disk` leaves in a folder
SHOWN = 5  # names of files that are left out


@dataclass(frozen=True)
class Found:
    """The files of a text.

    Attributes:
        files: files, folders that `datasets` has saved, and data sets of the hub, in the order of the text.
        left_out: what lies in the folders beside them.
    """

    files: tuple[str, ...]
    left_out: tuple[str, ...] = ()

    def left_out_words(self) -> str:
        """What was left out, in words; empty if nothing."""
        more = len(self.left_out) - SHOWN
        return ", ".join(self.left_out[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def text_files(paths: str | Sequence[str]) -> Found:
    """The files of a text.

    Args:
        paths: a file, a folder, a pattern such as `notes/**/*.jsonl`, a data set (`hf:...`), or a list of these.

    Raises:
        DataError: something cannot be found, a folder holds no text, or a home directory is not known.
    """
    files: dict[str, None] = {}  # each once, where patterns and folders overlap
    left_out: dict[str, None] = {}
    for name in [paths] if isinstance(paths, str) else paths:
        for path in [name] if is_online(name) else _matching(_expanded(name)):
            found = _in_folder(Path(path)) if _is_folder(path) else Found((path,))
            files |= dict.fromkeys(found.files)
            left_out |= dict.fromkeys(found.left_out)
    return Found(tuple(files), tuple(left_out))


def are_tokens(paths: str | Sequence[str]) -> bool:
    """Whether a text is tokenized already.

    Raises:
        DataError: as for `text_files`, or some of its files are tokenized and others are not.
    """
    files = text_files(paths).files
    tokens = [file for file in files if file.endswith(TOKENS)]
    if tokens and len(tokens) < len(files):
        raise DataError(f"the text {tokens[0]} is tokenized and others beside it are not; tokenize all or none")
    return bool(tokens)


def endings(file: str) -> tuple[str, str]:
    """(ending of the content, ending of the compression or nothing), in small letters: `a.JSONL.gz` -> `.jsonl`, `.gz`."""
    path = Path(file.lower())
    packed = path.suffix if path.suffix in PACKED else ""
    return (path.with_suffix("").suffix if packed else path.suffix), packed


def is_online(name: str) -> bool:
    """Whether a text comes from the hub."""
    return name.startswith(HUB) or (name in NAMED and not Path(name).exists())


def is_saved(path: str) -> bool:
    """Whether a folder was saved by `datasets`."""
    return any(all(Path(path, name).is_file() for name in names) for names in SAVED)


def _expanded(path: str) -> str:
    try:
        return str(Path(path).expanduser())
    except RuntimeError as error:
        raise DataError(f"the text {path} cannot be found: {error}") from error


def _matching(path: str) -> list[str]:
    """The path itself, or what a pattern matches."""
    if not glob.has_magic(path) or os.path.lexists(path):
        return [path]
    found = sorted(glob.glob(path, recursive=True))  # noqa: PTH207 - a pattern may begin at the root
    if not found:
        raise DataError(f"the text {quoted(path)} matches no file; name a file, a folder or another pattern")
    folders = {Path(one) for one in found if Path(one).is_dir()}
    return [one for one in found if folders.isdisjoint(Path(one).parents)]  # what is in a folder comes with it


def _is_folder(path: str) -> bool:
    if is_online(path):
        return False
    try:
        Path(path).stat()
    except FileNotFoundError:
        return False  # said where it is read
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"the text {quoted(path)} cannot be found: {why}; name a file or a folder") from error
    return Path(path).is_dir() and not is_saved(path)


def _in_folder(folder: Path) -> Found:
    inside = sorted(_walk(folder))
    text = [is_saved(str(one)) or endings(one.name)[0] in ENDINGS for one in inside]
    if not any(text):
        raise DataError(
            f"the folder {folder} has no text; name a file, or a folder with files that end in {', '.join(ENDINGS)}, "
            f"or in one of these and {' or '.join(PACKED)}"
        )
    files, others = (
        tuple(str(one) for one, kind in zip(inside, text, strict=True) if kind == of) for of in (True, False)
    )
    return Found(files, others)


def _walk(folder: Path) -> Iterator[Path]:
    """All files in a folder and its subfolders; a saved data set is one."""
    for root, folders, files in os.walk(folder, onerror=_refuse):
        saved = [name for name in folders if is_saved(f"{root}/{name}")]
        linked = [name for name in folders if Path(root, name).is_symlink()]  # not followed, so left out
        folders[:] = [name for name in folders if name not in saved]
        yield from (Path(root, name) for name in {*files, *saved, *linked})


def _refuse(error: OSError) -> None:
    raise DataError(f"the text {error.filename} cannot be read: {error.strerror}") from error
