"""Read the weights of a Hugging Face folder one tensor at a time.

Safetensors shards are mapped, never loaded whole. A pickled checkpoint (`pytorch_model*.bin`) also works; it is opened with
`weights_only=True` and, if its format allows, mapped.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fedspallm_appfl.errors import ModelError, first_line

SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
OTHER_WEIGHTS = ["*.h5", "*.msgpack", "*.ot", "*.onnx", "*.gguf"]  # on the hub, but not used
SMALL = ["*.json", "*.model", "*.txt"]  # configuration and tokenizer


def resolve_model(path: str, weights: bool = True, key: str = "`model.path`") -> Path:
    """The folder of a model: a local folder, or a hub name, which is downloaded or found in the cache.

    Args:
        path: folder or hub name.
        weights: whether they are needed; otherwise only the small files of a model on the hub are downloaded.
        key: the setting that named the path.

    Raises:
        ModelError: the path is neither, or the folder has no `config.json`.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        folder = _from_hub(path, weights, key)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is not a model: it has no config.json; name a folder saved by save_pretrained")
    return folder


def is_hub_name(name: str) -> bool:
    """Whether a model of this name could be on the hub; the path of a missing folder could not."""
    return not name.startswith((".", "/", "~")) and name.count("/") == 1


def _from_hub(name: str, weights: bool, key: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if not is_hub_name(name):
        raise ModelError(f"model path {name!r} is not a folder here and not a hub name (owner/model); check {key}")
    try:
        only = None if weights else SMALL
        return Path(snapshot_download(name, allow_patterns=only, ignore_patterns=OTHER_WEIGHTS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"model path {name!r} is not a folder here and could not be downloaded from the hub ({first_line(error)}); "
            f"download it first, then set {key} to the folder"
        ) from error


class CheckpointFiles:
    """The tensors of one model folder, by name.

    Attributes:
        folder: the model folder.
        shards: file name -> names of the tensors it holds.
        pickled: whether the weights are in a pickled checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        """Open a model folder.

        Raises:
            ModelError: there are no weights in a readable format.
        """
        self.folder = folder
        self.shards: dict[str, list[str]] = {}
        self._file_of: dict[str, str] = {}
        self._open: dict[str, Any] = {}
        names = _weight_files(folder)
        self.pickled = names[0].endswith(".bin")
        for name in names:
            self.shards[name] = list(self._reader(name).keys())
            self._file_of.update(dict.fromkeys(self.shards[name], name))

    def __contains__(self, key: str) -> bool:
        return key in self._file_of

    def keys(self) -> list[str]:
        """Names of all tensors."""
        return list(self._file_of)

    def read(self, key: str) -> Tensor:
        """One tensor, a view of the mapped file: copy it before changing it."""
        reader = self._reader(self._file_of[key])
        return reader[key] if self.pickled else reader.get_tensor(key)

    def shape_and_dtype(self, key: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of one tensor."""
        tensor = self.read(key)
        return tuple(tensor.shape), tensor.dtype

    def release(self) -> None:
        """Close the files: their pages no longer count as memory of the process. They are opened again when needed."""
        if not self.pickled:
            self._open.clear()

    def _reader(self, name: str) -> Any:
        if name not in self._open:
            path = self.folder / name
            try:
                self._open[name] = _load_pickled(path) if name.endswith(".bin") else safe_open(path, framework="pt")
            except Exception as error:  # every library has its own errors for damaged files
                raise ModelError(f"{path} cannot be opened as a checkpoint: {first_line(error)}") from error
        return self._open[name]


def _load_pickled(path: Path) -> dict[str, Tensor]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # the format from before torch 1.6 cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True)


def _weight_files(folder: Path) -> list[str]:
    for name in SAFETENSORS + PICKLED:
        if not (folder / name).is_file():
            continue
        if not name.endswith(".index.json"):
            return [name]
        try:
            shards = sorted(set(json.loads((folder / name).read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{folder / name} is not an index of weights: {error!r}; download the file again"
            ) from error
        outside = [shard for shard in shards if Path(shard).name != shard]
        if outside:
            raise ModelError(f"{folder / name} names {outside}, which are not file names; download the file again")
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise ModelError(f"{folder / name} names {missing}, which {folder} does not have; download the model again")
        return shards
    raise ModelError(f"{folder} has no weights; looked for {', '.join(SAFETENSORS + PICKLED)}")
