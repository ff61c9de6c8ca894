"""Write the pruned model as a plain Hugging Face folder, and check the result.

Every safetensors shard of the dense checkpoint is copied as a file, and each pruned matrix is written over its bytes in
the copy, one after the other. The model is never built, and one matrix is in memory at a time. A pickled or packed
checkpoint is first converted to one safetensors file. All other files in the folder (config, tokenizer, licence, chat
templates in subfolders) are copied unchanged; the model's card becomes README.base.md.

The new folder has the size of the dense one, because zeros are stored; `packing` makes a smaller copy.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from fedspallm_appfl.errors import ModelError
from fedspallm_appfl.models.layout import Linear
from fedspallm_appfl.models.lazy_model import Skeleton
from fedspallm_appfl.models.storage.checkpoint import SAFETENSORS, CheckpointFiles
from fedspallm_appfl.models.storage.folder import BASE_CARD, CARD, companions, partial_file
from fedspallm_appfl.models.storage.stored import Place
from fedspallm_appfl.models.storage.written import DTYPE_NAMES, as_stored, bytes_of, write_tensors
from fedspallm_appfl.tensors.sparsity import already_zero
from fedspallm_appfl.wire.packed import Packed
from fedspallm_appfl.wire.store import PackedStore


@dataclass(frozen=True)
class MatrixSparsity:
    """Sparsity of one matrix, read back from disk.

    Attributes:
        name: name of the weight in the checkpoint.
        block: index of its decoder block.
        shape: (O, I).
        entries: O * I.
        zeros: entries that the mask prunes; all of them are zero on disk.
        zeros_on_disk: entries that are zero on disk; more if a kept weight is exactly zero.
        sparsity: zeros / entries.
        zeros_before: entries that are zero in the dense model.
        zeros_back: of these, how many are not zero any more.
    """

    name: str
    block: int
    shape: tuple[int, int]
    entries: int
    zeros: int
    zeros_on_disk: int
    sparsity: float
    zeros_before: int = 0
    zeros_back: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Its entry in the manifest."""
        return asdict(self)


def write_model(skeleton: Skeleton, pruned: PackedStore, folder: Path) -> None:
    """Copy the dense model and replace the pruned matrices.

    A file gets its name only when it is complete, so a killed run leaves no partial file.

    Args:
        skeleton: the dense model.
        pruned: the pruned blocks; all other blocks stay dense.
        folder: where to write; created if needed.

    Raises:
        ModelError: a pruned matrix differs from the dense one in shape or dtype, or a tensor of a pickled checkpoint
            has a dtype that safetensors does not support.
        OSError: the disk is full, or the folder is not writable.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, file in companions(skeleton.folder):
        if not _older_card(skeleton.folder, name):
            with partial_file(folder / (BASE_CARD if name == CARD else name)) as partial:
                shutil.copy(file, partial)
    files = skeleton.files
    converted = files.pickled or files.packed
    if not converted and (skeleton.folder / SAFETENSORS[1]).is_file():
        with partial_file(folder / SAFETENSORS[1]) as partial:
            shutil.copy(skeleton.folder / SAFETENSORS[1], partial)
    for shard in SAFETENSORS[:1] if converted else files.shards:
        source = skeleton.folder / (next(iter(files.shards)) if converted else shard)
        with partial_file(folder / shard) as partial:
            if converted:  # names that share a tensor each get a copy
                write_tensors(partial, as_stored(files, files.keys()))
            else:
                shutil.copyfile(source, partial)  # content only: the source may be a link or read-only
            _put_in(skeleton, pruned, partial)
            shutil.copymode(source, partial)


def _older_card(source: Path, name: str) -> bool:
    """Whether a file is the card of a base model's base model, which gives way to that of the base model."""
    return name == BASE_CARD and (source / CARD).is_file()


def _put_in(skeleton: Skeleton, pruned: PackedStore, file: Path) -> None:
    """Write pruned matrices over the dense ones of a shard; blocks outside the shard are not read."""
    with file.open("r+b") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        data = stream.tell()
        for block in pruned.blocks():
            places = {linear.name: skeleton.place(block, linear) for linear in skeleton.layout.blocks[block]}
            here = {name: place for name, place in places.items() if place.key in header}
            packed = (pruned.get(block) or {}) if here else {}
            for name, place in here.items():
                _overwrite(stream, data, header[place.key], place, packed[name])


def _overwrite(stream: IO[bytes], data: int, entry: dict[str, Any], place: Place, packed: Packed) -> None:
    """Write a matrix over what was read: a tensor, an expert's part of it, or some rows of that."""
    weight = packed.unpack_weight()
    rows, columns = entry["shape"][-2:]
    slab = torch.empty(rows, columns, dtype=weight.dtype)
    start = data + entry["data_offsets"][0] + (place.expert or 0) * slab.nbytes
    inside = place.inside(slab)
    got = {"dtype": DTYPE_NAMES[weight.dtype], "shape": list(weight.shape)}
    expected = {"dtype": entry["dtype"], "shape": list(inside.shape)}
    if got != expected:
        raise ModelError(
            f"{place.name}: the dense matrix is {expected}, the pruned one {got}; they belong to different models"
        )
    if place.rows is not None:  # the other rows stay
        stream.seek(start)
        stream.readinto(bytes_of(slab))  # type: ignore[attr-defined]
    inside.copy_(weight)
    stream.seek(start)
    stream.write(bytes_of(slab))


def save_model(skeleton: Skeleton, pruned: PackedStore, folder: Path) -> list[MatrixSparsity]:
    """Write the pruned model and read it back.

    Args:
        skeleton: the dense model.
        pruned: the pruned blocks; blocks that are not in it stay dense.
        folder: where to write; made if need be.

    Returns:
        The sparsity of each prunable matrix, as it is on disk.

    Raises:
        ModelError: there is no room, or what was written is not what was meant.
    """
    try:
        write_model(skeleton, pruned, folder)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"the pruned model cannot be written to {folder}: {error}; make room there") from error
    return check_model(skeleton, pruned, folder)


def check_model(skeleton: Skeleton, pruned: PackedStore, folder: Path) -> list[MatrixSparsity]:
    """Read a written model back and count its zeros.

    Args:
        skeleton: the dense model.
        pruned: the pruned blocks that were written.
        folder: the folder that `write_model` wrote.

    Returns:
        One entry for each prunable matrix.

    Raises:
        ModelError: a pruned entry is not zero on disk.
    """
    written, manifest = CheckpointFiles(folder), []
    for block, linears in enumerate(skeleton.layout.blocks):
        packed = pruned.get(block) or {}
        for linear in linears:
            place, dense = skeleton.place(block, linear), skeleton.dense_weight(block, linear)
            manifest.append(_check_matrix(written, place, block, linear, packed.get(linear.name), dense))
        written.release()  # or all pages that were read would stay resident
        skeleton.files.release()
    return manifest


def _check_matrix(
    written: CheckpointFiles, place: Place, block: int, linear: Linear, packed: Packed | None, dense: Tensor
) -> MatrixSparsity:
    zero = place.view(written.read(place.key)) == 0
    entries, zeros, zeros_on_disk = zero.numel(), 0, int(zero.count_nonzero())
    before = already_zero(dense)
    known = () if before is None else (int(before.count_nonzero()), int((before & ~zero).count_nonzero()))
    if packed is not None:
        kept = packed.unpack_mask()
        zeros = entries - int(kept.count_nonzero())
        if not bool(zero.logical_or_(kept).all()):
            raise ModelError(
                f"{written.folder}: {place.name} is not zero where it was pruned; the file is damaged, write it again"
            )
    return MatrixSparsity(place.name, block, linear.shape, entries, zeros, zeros_on_disk, zeros / entries, *known)
