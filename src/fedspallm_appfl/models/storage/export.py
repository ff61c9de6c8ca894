"""Write the pruned model as a plain Hugging Face folder, and check the result.

Every safetensors shard of the dense checkpoint is copied as a file, and each pruned matrix is written over its bytes in
the copy, one after the other. The model is never built, and one matrix is in memory at a time. A pickled checkpoint is
first converted to one safetensors file. All other files in the folder (config, tokenizer, licence, chat templates in
subfolders) are copied unchanged; the model's card becomes README.base.md.

The new folder has the size of the dense one, because zeros are stored. Only the uploads are smaller.
"""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from fedspallm_appfl.errors import ModelError
from fedspallm_appfl.models.layout import Linear
from fedspallm_appfl.models.lazy_model import Skeleton
from fedspallm_appfl.models.storage.checkpoint import CheckpointFiles
from fedspallm_appfl.models.storage.stored import Place
from fedspallm_appfl.tensors.sparsity import already_zero
from fedspallm_appfl.wire.packed import Packed
from fedspallm_appfl.wire.store import PackedStore

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".h5", ".msgpack", ".ot", ".onnx", ".gguf", ".pth", ".pt")
CARD, BASE_CARD = "README.md", "README.base.md"  # the card of the base model makes room for that of the pruned one
DTYPE_NAMES = {  # as in the header of a safetensors file
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}


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
    for name, file in _companions(skeleton.folder):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with _partial(folder / name) as partial:
            shutil.copy(file, partial)
    files = skeleton.files
    for shard in ["model.safetensors"] if files.pickled else files.shards:
        source = skeleton.folder / (next(iter(files.shards)) if files.pickled else shard)
        with _partial(folder / shard) as partial:
            if files.pickled:
                _convert(files, partial)
            else:
                shutil.copyfile(source, partial)  # content only: the source may be a link or read-only
            _put_in(skeleton, pruned, partial)
            shutil.copymode(source, partial)


def _companions(source: Path, inside: str = "") -> Iterator[tuple[str, Path]]:
    """What lies beside the weights and in subfolders, as (name in the new folder, file); hidden files are left out.

    A link to a folder is not entered, and a link to a file is followed only where it stays within the model, so that
    nothing else of this machine lands in a folder that may be passed on.
    """
    cached = source.parent.name == "snapshots"  # of the hub's cache, where files are links to `blobs`
    home = (source.parents[1] if cached else source).resolve()
    for file in sorted((source / inside).iterdir()):
        name = f"{inside}/{file.name}" if inside else file.name
        about_weights = file.suffix in WEIGHT_SUFFIXES or file.name.endswith(".bin.index.json")
        if file.name.startswith((".", "__pycache__")) or about_weights or _older_card(source, name):
            continue
        if file.is_dir() and not file.is_symlink():
            yield from _companions(source, name)
        elif file.is_file() and file.resolve().is_relative_to(home):
            yield BASE_CARD if name == CARD else name, file


def _older_card(source: Path, name: str) -> bool:
    """Whether a file is the card of a base model's base model, which gives way to that of the base model."""
    return name == BASE_CARD and (source / CARD).is_file()


@contextmanager
def _partial(file: Path) -> Iterator[Path]:
    """A temporary path for a file that gets its name once it is complete."""
    partial = file.with_name(f"{file.name}.partial")
    partial.unlink(missing_ok=True)  # left by a killed run; it may be read-only
    try:
        yield partial
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


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
        stream.readinto(_bytes_of(slab))  # type: ignore[attr-defined]
    inside.copy_(weight)
    stream.seek(start)
    stream.write(_bytes_of(slab))


def _convert(files: CheckpointFiles, file: Path) -> None:
    """Write a pickled checkpoint as one safetensors file; names that share a tensor each get a copy."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers needs it
    end = 0
    for key in sorted(files.keys(), key=lambda key: -files.shape_and_dtype(key)[1].itemsize):  # all aligned
        shape, dtype = files.shape_and_dtype(key)
        if dtype not in DTYPE_NAMES:
            raise ModelError(f"{files.folder}: {key} is {dtype}, which safetensors does not support; convert it first")
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    words = json.dumps(header).encode()
    words += b" " * (-len(words) % 8)
    with file.open("wb") as stream:
        stream.write(len(words).to_bytes(8, "little") + words)
        for key in list(header)[1:]:
            stream.write(_bytes_of(files.read(key)))


def _bytes_of(tensor: Tensor) -> memoryview:
    """The entries of a tensor in row-major order, as in a safetensors file."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


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
