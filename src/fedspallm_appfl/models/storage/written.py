"""Write a safetensors file tensor by tensor, so that one of them, or a part of one, is in memory."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedspallm_appfl.errors import ModelError
from fedspallm_appfl.models.storage.checkpoint import CheckpointFiles

DTYPE_NAMES = {  # as in the header of a safetensors file
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}


@dataclass(frozen=True)
class Entry:
    """A tensor that is going to be written.

    Attributes:
        name: its name in the file.
        shape: its shape.
        dtype: its dtype.
        parts: makes its entries in row-major order, in tensors of that dtype or of as many bytes.
    """

    name: str
    shape: Sequence[int]
    dtype: torch.dtype
    parts: Callable[[], Iterable[Tensor]]


def as_stored(files: CheckpointFiles, keys: Iterable[str]) -> list[Entry]:
    """Tensors of a checkpoint as they are.

    Raises:
        ModelError: safetensors does not support a dtype.
    """
    entries = []
    for key in keys:
        shape, dtype = files.shape_and_dtype(key)
        if dtype not in DTYPE_NAMES:
            raise ModelError(f"{files.folder}: {key} is {dtype}, which safetensors does not support; convert it first")
        entries.append(Entry(key, shape, dtype, lambda key=key: [files.read(key)]))  # type: ignore[misc]
    return entries


def write_tensors(file: Path, entries: Iterable[Entry], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file; wide dtypes come first, so that all are aligned.

    Args:
        file: where to write.
        entries: the tensors.
        metadata: what stands in the header beside `format: pt`, which transformers needs.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    ordered, end = sorted(entries, key=lambda entry: -entry.dtype.itemsize), 0
    for entry in ordered:
        begin, end = end, end + math.prod(entry.shape) * entry.dtype.itemsize
        header[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [begin, end],
        }
    words = json.dumps(header).encode()
    words += b" " * (-len(words) % 8)
    with file.open("wb") as stream:
        stream.write(len(words).to_bytes(8, "little") + words)
        for entry in ordered:
            for part in entry.parts():
                stream.write(bytes_of(part))


def bytes_of(tensor: Tensor) -> memoryview:
    """The entries of a tensor in row-major order, as in a safetensors file."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
