"""The hidden states between two blocks, for all batches: in memory, or in a mapped temporary file.

In memory they are a list. A file holds them if the calibration windows of a client do not fit into its memory; the
kernel writes and drops pages as needed. It is used like the list and gives the same bits.

Legend: n windows, B windows in a batch, T tokens in a window, H hidden size.
"""

import mmap
import os
import tempfile
from collections.abc import Iterator

import torch
from torch import Tensor

from fedspallm_appfl.errors import ConfigError, ModelError, quoted

ACTIVATIONS = ("memory", "file")
ALIGNMENT = 64  # bytes; of tensors in memory too, and some kernels round otherwise where a tensor begins elsewhere


class HiddenStatesFile:
    """Hidden states of all batches in a temporary file without a name, which disappears with this object.

    They are made from private text: only the user can read the file.
    """

    def __init__(self, windows: int, client: str) -> None:
        """Allocate nothing before the first batch is known.

        Args:
            windows: rows of all batches together, windows or tokens; no batch is larger than the first.
            client: client to name in errors.
        """
        self._windows = windows
        self._client = client
        self._file: Tensor | None = None  # bytes
        self._step = 0  # bytes from the start of a batch to the start of the next
        self._batches: list[Tensor] = []  # views of it
        self._device = torch.device("cpu")

    def append(self, hidden: Tensor) -> None:
        """Copy one more batch, (B, T, H) or (T, H), into the file.

        Raises:
            ConfigError: the disk has no room for the file.
        """
        if self._file is None:
            self._device, self._step = hidden.device, -(-hidden.nbytes // ALIGNMENT) * ALIGNMENT
            self._file = _mapped_file(-(-self._windows // len(hidden)) * self._step, self._client)
        begin = len(self._batches) * self._step
        view = self._file[begin : begin + hidden.nbytes].view(hidden.dtype).view(hidden.shape)
        self._batches.append(view.copy_(hidden))

    def copy(self) -> "HiddenStatesFile":
        """The same in a file of its own.

        Raises:
            ConfigError: the disk has no room for it.
        """
        made = HiddenStatesFile(self._windows, self._client)
        for hidden in self:
            made.append(hidden)
        return made

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Tensor:
        """One batch, (B, T, H), on its original device; on a CPU a view of the file."""
        return self.on(self._device, number)

    def on(self, device: torch.device, number: int) -> Tensor:
        """One batch, (B, T, H), on any device, and not on another one on the way."""
        return self._batches[number].to(device)

    def __setitem__(self, number: int, hidden: Tensor) -> None:
        """Replace a batch by the output of a block.

        Raises:
            ModelError: its shape or dtype differs.
        """
        view = self._batches[number]
        if (hidden.shape, hidden.dtype) != (view.shape, view.dtype):
            raise ModelError(
                f"client {self._client}: a block turns hidden states {view.dtype} {list(view.shape)} into {hidden.dtype} "
                f"{list(hidden.shape)}, but a file needs the same shape and dtype; set `data.activations` to memory"
            )
        view.copy_(hidden)


HiddenStates = list[Tensor] | HiddenStatesFile


def hidden_states(activations: str, windows: int, client: str) -> HiddenStates:
    """Where the hidden states of so many windows go.

    Raises:
        ConfigError: `activations` is none of `ACTIVATIONS`.
    """
    if activations not in ACTIVATIONS:
        raise ConfigError(
            f"client {client}: `data.activations` is one of {', '.join(ACTIVATIONS)}; got {quoted(activations)}"
        )
    return HiddenStatesFile(windows, client) if activations == "file" else []


def _mapped_file(size: int, client: str) -> Tensor:
    folder = "the folder for temporary files"
    try:
        folder = tempfile.gettempdir()
        with tempfile.TemporaryFile(dir=folder) as file:  # has no name, or loses it at once; mode 0600
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk raises an error here, not a signal later
            mapped = mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise ConfigError(
            f"client {client}: `data.activations` is file, but {folder} has no room for {size:,} bytes of hidden states: "
            f"{error.strerror}; free some disk space, name another folder in the environment variable TMPDIR, or set it to "
            "memory"
        ) from error
    return torch.frombuffer(mapped, dtype=torch.uint8)
