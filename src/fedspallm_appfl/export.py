"""Write the pruned model as a plain Hugging Face folder, and check what was written.

The dense checkpoint is copied shard by shard with the pruned matrices put in, under the same names and in the same dtype;
everything else in the folder (config, tokenizer, licence) is copied as it is. The model is never built.

A folder written so has the size of the dense one: the zeros are stored. What is smaller is what travelled.
"""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from fedspallm_appfl.blocks import Linear
from fedspallm_appfl.checkpoint_files import CheckpointFiles
from fedspallm_appfl.errors import ModelError
from fedspallm_appfl.lazy_model import Skeleton
from fedspallm_appfl.packed_store import PackedStore
from fedspallm_appfl.payload import unpack, unpack_mask

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".h5", ".msgpack", ".ot", ".onnx", ".gguf", ".pth", ".pt")


@dataclass(frozen=True)
class MatrixSparsity:
    """Sparsity of one matrix, read back from disk.

    Attributes:
        name: name of the weight in the checkpoint.
        block: index of its decoder block.
        shape: (O, I).
        entries: O * I.
        zeros: entries that the mask prunes; all of them are zero on disk.
        zeros_on_disk: entries that are zero on disk; more where a kept weight is exactly zero.
        sparsity: zeros / entries.
    """

    name: str
    block: int
    shape: tuple[int, int]
    entries: int
    zeros: int
    zeros_on_disk: int
    sparsity: float

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the manifest."""
        return asdict(self)


def write_model(skeleton: Skeleton, pruned: PackedStore, folder: Path) -> None:
    """Copy the dense model with pruned matrices put in.

    Args:
        skeleton: the dense model.
        pruned: the pruned blocks; blocks that are not in it stay dense.
        folder: where to write; made if need be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in skeleton.folder.iterdir():
        about_weights = file.suffix in WEIGHT_SUFFIXES or file.name.endswith(".bin.index.json")
        if file.is_file() and not about_weights and not file.name.startswith("."):
            shutil.copy(file, folder / file.name)
    places = {
        skeleton.key(block, linear.name): (block, linear)
        for block in pruned.blocks()
        for linear in skeleton.layout.blocks[block]
    }
    files = skeleton.files
    shards = {"model.safetensors": files.keys()} if files.pickled else files.shards
    for shard, keys in shards.items():
        tensors = {key: _tensor(files, key, places.get(key), pruned) for key in keys}
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        source = skeleton.folder / (shard if shard in files.shards else next(iter(files.shards)))
        shutil.copymode(source, folder / shard)  # safetensors would let nobody else read it


def _tensor(files: CheckpointFiles, key: str, place: tuple[int, Linear] | None, pruned: PackedStore) -> Tensor:
    if place is None:
        dense = files.read(key)
        return dense.clone() if files.pickled else dense  # tied tensors of a pickle share memory
    block, linear = place
    weight = unpack((pruned.load(block) or {})[linear.name])[0]
    return weight.T.contiguous() if linear.transposed else weight


def check_model(skeleton: Skeleton, pruned: PackedStore, folder: Path) -> list[MatrixSparsity]:
    """Read a written model back and count its zeros.

    Args:
        skeleton: the dense model.
        pruned: the pruned blocks that were put in.
        folder: what `write_model` wrote.

    Returns:
        One entry for each prunable matrix.

    Raises:
        ModelError: a pruned entry is not zero on disk.
    """
    written = CheckpointFiles(folder)
    manifest = []
    for block, linears in enumerate(skeleton.layout.blocks):
        packed = pruned.load(block) or {}
        for linear in linears:
            key = skeleton.key(block, linear.name)
            weight = written.read(key)
            weight = weight.T if linear.transposed else weight
            zero = weight == 0
            zeros = 0
            if linear.name in packed:
                mask = unpack_mask(packed[linear.name])
                zeros = int((~mask).sum())
                if not bool(zero[~mask].all()):
                    raise ModelError(
                        f"{folder}: {key} is not zero where it was pruned; the file is damaged, write it again"
                    )
            entries = weight.numel()
            manifest.append(MatrixSparsity(key, block, linear.shape, entries, zeros, int(zero.sum()), zeros / entries))
    return manifest
