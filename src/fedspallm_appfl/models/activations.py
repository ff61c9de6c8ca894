"""The hidden states between two blocks, of all batches: in memory, or in a temporary file that is mapped.

In memory they are a list. A file takes them where the calibration windows of a client are too many for its memory; the
kernel writes pages out and drops them as it needs to. It is used like the list and gives the same bits.

Legend: n windows, B windows in a batch, T tokens in a window, H hidden size.
"""

import mmap
import os
import tempfile
from collections.abc import Iterator

import torch
from torch import Tensor

from fedspallm_appfl.errors import ConfigError, ModelError

ALIGNMENT = 64  # bytes; of tensors in memory too, and some kernels round otherwise where a tensor begins elsewhere


class HiddenStatesFile:
    """Hidden states of all batches in a temporary file without a name, which is gone once this object is.

    They were made from private text: nobody but the user can read the file.
    """

    def __init__(self, windows: int, client: str) -> None:
        """Nothing is allocated before the first batch is known.

        Args:
            windows: n, in all batches together; no batch is larger than the first.
            client: whom to name in errors.
        """
        self._windows = windows
        self._client = client
        self._file: Tensor | None = None  # bytes
        self._step = 0  # bytes from the beginning of a batch to that of the next
        self._batches: list[Tensor] = []  # views of it
        self._device = torch.device("cpu")

    def append(self, hidden: Tensor) -> None:
        """Copy one more batch, (B, T, H), into the file.

        Raises:
            ConfigError: there is no room for the file.
        """
        if self._file is None:
            self._device, self._step = hidden.device, -(-hidden.nbytes // ALIGNMENT) * ALIGNMENT
            self._file = _mapped_file(-(-self._windows // len(hidden)) * self._step, self._client)
        begin = len(self._batches) * self._step
        view = self._file[begin : begin + hidden.nbytes].view(hidden.dtype).view(hidden.shape)
        self._batches.append(view.copy_(hidden))

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Tensor:
        """One batch, (B, T, H), on the device that it came from; on a CPU a view of the file."""
        return self._batches[number].to(self._device)

    def __setitem__(self, number: int, hidden: Tensor) -> None:
        """Copy what a block made of a batch into the place of what it was made from.

        Raises:
            ModelError: its shape or dtype is another.
        """
        view = self._batches[number]
        if (hidden.shape, hidden.dtype) != (view.shape, view.dtype):
            raise ModelError(
                f"client {self._client}: a block turns hidden states {view.dtype} {list(view.shape)} into {hidden.dtype} "
                f"{list(hidden.shape)}, and a file keeps them as they were; set `data.activations` to memory"
            )
        view.copy_(hidden)


HiddenStates = list[Tensor] | HiddenStatesFile


def hidden_states(activations: str, windows: int, client: str) -> HiddenStates:
    """Where the hidden states of so many windows go: `memory` or `file`."""
    return HiddenStatesFile(windows, client) if activations == "file" else []


def _mapped_file(size: int, client: str) -> Tensor:
    folder = "the folder for temporary files"
    try:
        folder = tempfile.gettempdir()
        with tempfile.TemporaryFile(dir=folder) as file:  # has no name, or loses it at once; mode 0600
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here and not a signal later
            mapped = mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise ConfigError(
            f"client {client}: `data.activations` is file, but {size:,} bytes for hidden states cannot be had in {folder}: "
            f"{error.strerror}; make room there, name another folder in the environment variable TMPDIR, or set it to "
            "memory"
        ) from error
    return torch.frombuffer(mapped, dtype=torch.uint8)
