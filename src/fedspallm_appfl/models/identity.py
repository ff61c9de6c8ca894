"""Whether two sites hold the same dense model: hashes that read a few pages of each weight, not the whole checkpoint."""

import hashlib
import json
from pathlib import Path

import torch

from fedspallm_appfl.errors import ModelError
from fedspallm_appfl.models.checkpoint import CheckpointFiles

BY_SITE = ("_name_or_path", "transformers_version")  # keys of config.json that differ between copies of a model
SAMPLE = 64  # values from the beginning of each tensor


def config_hash(folder: Path) -> str:
    """A hash of the content of `config.json`, independent of its formatting.

    Raises:
        ModelError: the file cannot be read.
    """
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        meant = {key: value for key, value in config.items() if key not in BY_SITE}
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{folder / 'config.json'} cannot be read: {error}") from error
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
    """Both hashes as they are sent: `config/weights`."""
    return f"{config_hash(folder)}/{weights_hash(folder)}"


def _short(digest: "hashlib._Hash") -> str:
    return digest.hexdigest()[:16]
