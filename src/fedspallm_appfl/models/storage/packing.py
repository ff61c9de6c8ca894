"""A packed copy of a model folder, the dense one from it, and the model in memory (docs/wire.md has the format).

No model is built to pack: every matrix of floats in the checkpoint for which it pays is packed, whatever it is of.
"""

import json
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from fedspallm_appfl.errors import ModelError
from fedspallm_appfl.models.lazy_model import without_weights
from fedspallm_appfl.models.storage.checkpoint import PACKED_INDEX, CheckpointFiles, resolve_model
from fedspallm_appfl.models.storage.folder import CARD, companions
from fedspallm_appfl.models.storage.packed_file import VERSION, as_integers
from fedspallm_appfl.models.storage.written import Entry, as_stored, write_tensors
from fedspallm_appfl.settings import custom_code
from fedspallm_appfl.tensors import bitmask
from fedspallm_appfl.wire.packed import packed_size

PART = 2**24  # entries that are in memory at a time; a multiple of 8, so that masks of parts are a part of the mask

FRONT = re.compile(r"\A(---\n.*?\n---\n+)?", re.DOTALL)  # of a card: what a hub reads
NOTE = (
    "> **Packed.** Zeros take no room here. Load this folder with `fedspallm_appfl.load_packed(FOLDER)`, or write\n"
    "> the dense one with `fedspallm unpack FOLDER OUT`. What is said below of files and loading is of that one.\n\n"
)  # in the card of a packed folder

Write = Callable[[CheckpointFiles, list[str], Path], None]


@dataclass(frozen=True)
class Size:
    """What packing saved.

    Attributes:
        dense: bytes of the weights before.
        packed: and after.
    """

    dense: int
    packed: int


def pack(model: str | Path, out: str | Path) -> Size:
    """Write a packed copy of a model folder.

    Args:
        model: folder or hub name.
        out: the new folder; it appears once it is complete.

    Raises:
        ModelError: the model cannot be read or is packed already, `out` is there already or inside the model, or there is
            no room.
    """
    source, files = _opened(model)
    if files.packed:
        raise ModelError(f"{source} is packed already; copy the folder")
    with _new_folder(source, Path(out)) as folder:
        placed = _write_shards(files, folder, "packed", _write_packed)
        _write_index(folder / PACKED_INDEX, placed)
        _change_card(folder, lambda card: FRONT.sub(lambda front: front[0] + NOTE, card, count=1))
    return Size(_bytes(source, files.shards), _bytes(Path(out), set(placed.values())))


def unpack(packed: str | Path, out: str | Path) -> None:
    """Write the dense copy of a packed folder; every tensor is what it was, bit by bit.

    Args:
        packed: folder that `pack` made, or hub name.
        out: the new folder; it appears once it is complete.

    Raises:
        ModelError: the folder is not packed or is damaged, `out` is there already or inside it, or there is no room.
    """
    source, files = _opened(packed)
    _require_packed(source, files)
    with _new_folder(source, Path(out)) as folder:
        placed = _write_shards(files, folder, "model", _write_dense)
        if len(files.shards) > 1:
            _write_index(folder / "model.safetensors.index.json", placed)
        _change_card(folder, lambda card: card.replace(NOTE, "", 1))


def load_packed(packed: str | Path, trust_remote_code: bool = False, **keywords: Any) -> PreTrainedModel:
    """The model of a packed folder, as `AutoModelForCausalLM.from_pretrained` would load the dense one.

    Args:
        packed: folder that `pack` made, or hub name.
        trust_remote_code: run Python code that the folder brings along.
        **keywords: of `from_pretrained`, such as `device_map`; without `dtype` it is that of the checkpoint.

    Raises:
        ModelError: the folder is not packed, it is damaged, or it needs code of its own that is not allowed to run.
    """
    source, files = _opened(packed)
    _require_packed(source, files)
    if trust_remote_code:
        custom_code.allow(source)
    kind = type(without_weights(source, "auto"))
    config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    weights = {key: files.read(key) for key in files.keys()}  # noqa: SIM118 - not a dict
    model = kind.from_pretrained(None, config=config, state_dict=weights, **keywords)
    model.config.name_or_path = model.name_or_path = str(packed)
    if model.can_generate() and (source / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source)
    return model


def _change_card(folder: Path, change: Callable[[str], str]) -> None:
    """Change the card, if there is one; other bytes of it stay as they are."""
    card = folder / CARD
    if card.is_file():
        card.write_bytes(
            change(card.read_bytes().decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")
        )


def _opened(model: str | Path) -> tuple[Path, CheckpointFiles]:
    source = resolve_model(str(model), key="MODEL")
    return source, CheckpointFiles(source)


def _require_packed(source: Path, files: CheckpointFiles) -> None:
    if not files.packed:
        raise ModelError(f"{source} is not packed, it holds no {PACKED_INDEX}; load it with from_pretrained")


@contextmanager
def _new_folder(source: Path, out: Path) -> Iterator[Path]:
    """A folder with all files of a model but the weights, which gets its name once it is complete."""
    if out.exists() or out.is_symlink():
        raise ModelError(f"{out} is there already; name a new folder, or remove it")
    if out.resolve().is_relative_to(source.resolve()):
        raise ModelError(f"{out} would lie inside {source}, and be copied into itself; name a folder beside it")
    made = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    try:
        made.mkdir(parents=True)
        for name, file in companions(source):
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, made / name)
        yield made
        made.replace(out)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{out} cannot be written: {error}; make room there, or make its folder writable") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _write_shards(files: CheckpointFiles, folder: Path, stem: str, write: Write) -> dict[str, str]:
    """Write each file of a checkpoint anew, one after the other; returns tensor -> file."""
    placed, count = {}, len(files.shards)
    for number, keys in enumerate(files.shards.values(), 1):
        name = f"{stem}-{number:05}-of-{count:05}.safetensors" if count > 1 else f"{stem}.safetensors"
        write(files, keys, folder / name)
        placed.update(dict.fromkeys(keys, name))
        files.release()  # or all pages that were read would stay resident
    return placed


def _write_index(file: Path, placed: dict[str, str]) -> None:
    total = sum(one.stat().st_size for one in {file.parent / name for name in placed.values()})
    file.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": placed}, indent=1), "utf-8")


def _write_dense(files: CheckpointFiles, keys: list[str], file: Path) -> None:
    write_tensors(file, as_stored(files, keys))


def _write_packed(files: CheckpointFiles, keys: list[str], file: Path) -> None:
    entries, shapes = [], {}
    for dense in as_stored(files, keys):
        kept = _kept(files, dense) if dense.dtype.is_floating_point and len(dense.shape) > 1 else None
        names = (f"{dense.name}.mask", f"{dense.name}.values")
        if kept is None or any(name in files for name in names):
            entries.append(dense)
            continue
        size = -(-files.read(dense.name).numel() // 8)
        shapes[dense.name] = list(dense.shape)
        entries.append(Entry(names[0], [size], torch.uint8, partial(_masks, files, dense.name)))
        entries.append(Entry(names[1], [kept], dense.dtype, partial(_values, files, dense.name)))
    write_tensors(file, entries, {"format_version": VERSION, "packed": json.dumps(shapes)})


def _kept(files: CheckpointFiles, dense: Entry) -> int | None:
    """Entries of a matrix that have to be stored; None if packing does not pay."""
    kept = sum(int(part.count_nonzero()) for part in _parts(files, dense.name))
    entries = files.read(dense.name).numel()
    size = packed_size((1, entries), entries - kept, dense.dtype)
    return kept if size < entries * dense.dtype.itemsize else None


def _masks(files: CheckpointFiles, key: str) -> Iterator[Tensor]:
    return (bitmask.to_bits(part != 0) for part in _parts(files, key))


def _values(files: CheckpointFiles, key: str) -> Iterator[Tensor]:
    return (bitmask.gather(part, bitmask.to_bits(part != 0)) for part in _parts(files, key))


def _parts(files: CheckpointFiles, key: str) -> tuple[Tensor, ...]:
    """The bits of the entries of a matrix, in parts."""
    return as_integers(files.read(key)).reshape(-1).split(PART)


def _bytes(folder: Path, names: Any) -> int:
    return sum((folder / name).stat().st_size for name in names)
