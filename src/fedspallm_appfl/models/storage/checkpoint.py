"""Read the weights of a Hugging Face folder one tensor at a time.

Safetensors shards are mapped, never loaded whole. A pickled checkpoint (`pytorch_model*.bin`) works too; it is opened with
`weights_only=True` and, where its format allows, mapped.

A packed folder (`packing`) reads as the dense one does.

Hashes tell whether two sites hold the same dense model; they read a few pages of each weight, not the whole checkpoint.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fedspallm_appfl.errors import ModelError, first_line, quoted, shortened
from fedspallm_appfl.models.storage.packed_file import PackedFile
from fedspallm_appfl.settings import custom_code, schema
from fedspallm_appfl.settings.paths import is_file, is_folder
from fedspallm_appfl.settings.schema import Model

DTYPES = {name: getattr(torch, name) for name in schema.DTYPES}
BY_SITE = ("_name_or_path", "transformers_version")  # keys of config.json that say where and how a copy was written
SAMPLE = 64  # values from the beginning of each tensor
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
PACKED_INDEX = "packed.safetensors.index.json"
OTHER_WEIGHTS = ["*.h5", "*.msgpack", "*.ot", "*.onnx", "*.gguf"]  # on the hub, and not used
SMALL = ["*.json", "*.model", "*.txt", "*.py"]  # configuration, tokenizer, and code of the model's own


def resolve_model(path: str, weights: bool = True, key: str = "`model.path`") -> Path:
    """The folder of a model: a local folder, a run directory, or a name on the hub, downloaded or found in the cache.

    Args:
        path: folder, run directory or hub name.
        weights: whether they are needed; without them only the small files of a model on the hub are fetched.
        key: where the path was named.

    Raises:
        ModelError: the path is none of them, or there is no `config.json` in it.
    """
    folder = Path(path).expanduser()
    return model_in(folder if is_folder(folder) else _from_hub(path, weights, key), key)


def model_in(folder: Path, key: str) -> Path:
    """The model that a folder is, or that of a run directory.

    Raises:
        ModelError: there is none.
    """
    for place in (folder, folder / "model"):
        if is_file(place / "config.json"):
            return place
    apart = sorted(folder.glob("models/*/model/config.json"))
    fix = (
        f"it has one for each client: name one of them, such as {apart[0].parent}"
        if apart
        else "name a folder saved by save_pretrained, or the run_dir of a finished run"
    )
    raise ModelError(f"{folder} holds no model: there is no config.json in it; {fix}, in {key}")


def allow_code_of(model: Model) -> None:
    """Let the code of the model of a configuration run in this process, if it says so.

    Raises:
        ModelError: there is no such model.
    """
    if model.trust_remote_code:
        custom_code.allow(resolve_model(model.path, weights=False))


def is_hub_name(name: str) -> bool:
    """Whether a model of this name could be on the hub; a path of a folder that is not there could not."""
    return not name.startswith((".", "/", "~")) and name.count("/") == 1


def _from_hub(name: str, weights: bool, key: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if not is_hub_name(name):
        raise ModelError(
            f"model path {quoted(name)} is no folder here and no hub name (owner/model, e.g. openai-community/gpt2); "
            f"check {key}"
        )
    try:
        only = None if weights else SMALL
        return Path(snapshot_download(name, allow_patterns=only, ignore_patterns=OTHER_WEIGHTS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        why = shortened(first_line(error))
        raise ModelError(
            f"model path {quoted(name)} is no folder here and could not be fetched from the hub ({why}); "
            f"download it first, then give the folder in {key}"
        ) from error


class CheckpointFiles:
    """The tensors of one model folder, by name.

    Attributes:
        folder: the model folder.
        shards: file name -> names of the tensors it holds.
        pickled: whether the weights are in a pickled checkpoint.
        packed: whether matrices with zeros are packed.
    """

    def __init__(self, folder: Path) -> None:
        """Open a model folder.

        Raises:
            ModelError: there are no weights in a format that can be read.
        """
        self.folder = folder
        self.shards: dict[str, list[str]] = {}
        self._file_of: dict[str, str] = {}
        self._open: dict[str, Any] = {}
        names = _weight_files(folder)
        self.pickled = names[0].endswith(".bin")
        self.packed = not any((folder / name).is_file() for name in SAFETENSORS + PICKLED)
        for name in names:
            self.shards[name] = list(self._reader(name).keys())
            self._file_of.update(dict.fromkeys(self.shards[name], name))
        if self.packed and self._file_of != json.loads((folder / PACKED_INDEX).read_text())["weight_map"]:
            raise ModelError(f"{folder}: its files hold other tensors than {PACKED_INDEX} says; pack the model again")

    def __contains__(self, key: str) -> bool:
        return key in self._file_of

    def keys(self) -> list[str]:
        """Names of all tensors."""
        return list(self._file_of)

    def read(self, key: str) -> Tensor:
        """One tensor, a view of the mapped file unless it was packed: copy it before changing it."""
        reader = self._reader(self._file_of[key])
        return reader[key] if self.pickled else reader.get_tensor(key)

    def shape_and_dtype(self, key: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of one tensor."""
        if self.packed:
            return self._reader(self._file_of[key]).shape_and_dtype(key)
        tensor = self.read(key)
        return tuple(tensor.shape), tensor.dtype

    def release(self) -> None:
        """Close the files: pages that were read are no longer the process's. They are opened again when needed."""
        if not self.pickled:
            self._open.clear()

    def _reader(self, name: str) -> Any:
        if name not in self._open:
            path = self.folder / name
            try:
                self._open[name] = self._opened(path)
            except Exception as error:  # every library that parses a damaged file has its own error type
                raise ModelError(
                    f"{path} cannot be opened as a checkpoint: {shortened(first_line(error), 1000)}"
                ) from error
        return self._open[name]

    def _opened(self, path: Path) -> Any:
        if self.packed:
            return PackedFile(path)
        return _load_pickled(path) if self.pickled else safe_open(path, framework="pt")


def _load_pickled(path: Path) -> dict[str, Tensor]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # the format from before torch 1.6 cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True)


def _weight_files(folder: Path) -> list[str]:
    for name in (*SAFETENSORS, *PICKLED, PACKED_INDEX):
        if not (folder / name).is_file():
            continue
        if not name.endswith(".index.json"):
            return [name]
        try:
            shards = sorted(set(json.loads((folder / name).read_text())["weight_map"].values()))
            outside = [shard for shard in shards if Path(shard).name != shard]
            missing = [shard for shard in shards if not (folder / shard).is_file()]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(
                f"{folder / name} is not an index of weights: {shortened(repr(error))}; fetch the file again"
            ) from error
        if outside:
            raise ModelError(f"{folder / name} names {quoted(outside)}, which are no file names; fetch the file again")
        if missing:
            raise ModelError(
                f"{folder / name} names {quoted(missing)}, which {folder} does not hold; fetch the model again"
            )
        return shards
    raise ModelError(f"{folder} holds no weights; looked for {', '.join((*SAFETENSORS, *PICKLED, PACKED_INDEX))}")


def config_hash(folder: Path) -> str:
    """A hash of what `config.json` means, whatever its formatting.

    Raises:
        ModelError: the file cannot be read.
    """
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        meant = {key: value for key, value in config.items() if key not in BY_SITE}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ModelError(f"{folder / 'config.json'} cannot be read: {shortened(error)}") from error
    return _short(hashlib.sha256(json.dumps(meant, sort_keys=True).encode()))


def weights_hash(folder: Path) -> str:
    """A hash of names, shapes and dtypes of all tensors, and of the first values of each.

    Raises:
        ModelError: the checkpoint cannot be read.
    """
    files, digest = CheckpointFiles(folder), hashlib.sha256()
    for key in sorted(files.keys()):
        tensor = files.read(key)
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.flatten()[:SAMPLE].contiguous().view(torch.uint8).numpy().tobytes())
    return _short(digest)


def model_hash(folder: Path) -> str:
    """Both hashes, as they travel: `config/weights`."""
    return f"{config_hash(folder)}/{weights_hash(folder)}"


def _short(digest: "hashlib._Hash") -> str:
    return digest.hexdigest()[:16]
