"""Parts of a message as zstandard frames.

A packed object has `"zstd": ["mask", "values"]`, the parts that are frames (uint8). The bytes of a part are shuffled first:
all first bytes of its elements, then all second ones, because exponents repeat and mantissas do not. A part that does not
get smaller stays unchanged. The reader states the expected size of a part, so nothing larger is ever allocated. Every frame
has a checksum: bits that flip on the way are seen.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import zstandard
from torch import Tensor

from fedspallm_appfl.errors import UpdateError, quoted

ZSTD_LEVEL = 1  # higher levels find nothing more in masks and mantissas
HEADER = 512  # bytes of a frame beside its content, at most

Packed = Mapping[str, Any]  # as it travels
Parts = dict[str, tuple[int, torch.dtype]]  # name -> entries and dtype


def deflated(packed: Packed) -> dict[str, Any]:
    """The same with every tensor as a frame that is smaller so."""
    made, frames = dict(packed), []
    for part, tensor in packed.items():
        if isinstance(tensor, Tensor):
            frame = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True).compress(_shuffled(tensor))
            if len(frame) < tensor.numel() * tensor.element_size():
                made[part] = torch.frombuffer(bytearray(frame), dtype=torch.uint8)
                frames.append(part)
    return {**made, "zstd": frames}


def inflated(packed: Packed, part: str, where: str, count: int, dtype: torch.dtype) -> Tensor:
    """A part in its original form, one row.

    Args:
        packed: the object that holds it, compressed or not.
        part: its name.
        where: place to name in errors.
        count: entries that it must have.
        dtype: dtype that it must have.

    Raises:
        UpdateError: it is not a frame, or has other content.
    """
    if part not in _frames(packed, where):
        tensor = packed[part]
        right = tensor.dtype == dtype and tuple(tensor.shape) == (count,)
        require(right, where, f"{part} must be {count} entries of {dtype}, got {describe(tensor)}")
        return tensor.detach().resolve_neg().contiguous()
    return _inflated(packed[part], where, part, count, dtype)


def _frames(packed: Packed, where: str) -> list[str]:
    frames = packed.get("zstd", [])
    known = type(frames) is list and all(type(p) is str and isinstance(packed.get(p), Tensor) for p in frames)
    require(known, where, f"`zstd` lists which of the parts are compressed, got {quoted(frames)}")
    return frames


def _inflated(frame: Tensor, where: str, part: str, count: int, dtype: torch.dtype) -> Tensor:
    size = count * dtype.itemsize
    require(frame.dtype == torch.uint8 and frame.ndim == 1, where, f"{part}: not a frame but {describe(frame)}")
    most = size + size // 128 + HEADER
    require(frame.numel() <= most, where, f"{part}: the frame takes {frame.numel()} bytes, {most} are enough")
    try:
        data = frame.resolve_neg().contiguous().numpy().data
        header = zstandard.get_frame_parameters(data)
        promised = header.content_size  # this much would be allocated
        require(promised == size, where, f"{part}: the frame holds {promised} bytes, expected {size}")
        plain = zstandard.ZstdDecompressor(max_window_size=2**27).decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise UpdateError(f"refused an update from {where}: {part} cannot be decompressed: {error}") from error
    require(header.has_checksum, where, f"{part}: the frame has no checksum")
    unshuffled = np.frombuffer(plain, np.uint8).reshape(dtype.itemsize, count).T.copy()
    return torch.from_numpy(unshuffled).flatten().view(dtype)


def _shuffled(tensor: Tensor) -> memoryview:
    """All first bytes of the elements, then all second ones, and so on."""
    size = tensor.element_size()
    return np.ascontiguousarray(tensor.contiguous().view(torch.uint8).numpy().reshape(-1, size).T).data


def is_plain(part: Any) -> bool:
    """Whether a value is a tensor that numpy can read: no subclass, not sparse, not nested, all of it in CPU memory."""
    return (
        type(part) is Tensor
        and part.layout == torch.strided
        and not part.is_nested
        and not part.is_quantized
        and part.device.type == "cpu"
        and _is_in_memory(part)
    )


def _is_in_memory(tensor: Tensor) -> bool:
    """Whether the memory of a tensor holds all its entries: it may have been freed or cut since."""
    if not tensor.numel():
        return True
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (tensor.storage_offset() + last + 1) * tensor.element_size() <= tensor.untyped_storage().nbytes()


def describe(tensor: Tensor) -> str:
    """Dtype and shape as text."""
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"


def require(condition: bool, where: str, what: str) -> None:
    """Refuse an update.

    Raises:
        UpdateError: the condition does not hold.
    """
    if not condition:
        raise UpdateError(f"refused an update from {where}: {what}")
