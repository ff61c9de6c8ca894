"""Sums stored between rounds, for `fold: cumulative`."""

import dataclasses
import json
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedspallm_appfl.aggregation.l0_mean import L0Sums
from fedspallm_appfl.aggregation.votes import Votes
from fedspallm_appfl.errors import ModelError

SumsT = TypeVar("SumsT", L0Sums, Votes)


def save_sums(sums: SumsT, file: Path) -> None:
    """Write sums over those in the file.

    Raises:
        ModelError: the disk is full, or the folder cannot be written.
    """
    fields = {field.name: getattr(sums, field.name) for field in dataclasses.fields(sums)}
    tensors = {name: value.cpu() for name, value in fields.items() if isinstance(value, Tensor)}
    numbers = {name: json.dumps(value) for name, value in fields.items() if isinstance(value, int | float)}
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    try:
        save_file(tensors, partial, metadata=numbers)
        partial.replace(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"sums cannot be stored in {file}: {error}; free disk space there") from error


def load_sums(kind: type[SumsT], file: Path, device: str) -> SumsT:
    """Read stored sums of one kind."""
    with safe_open(file, framework="pt", device=device) as stored:
        numbers = {name: json.loads(text) for name, text in stored.metadata().items()}
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (no iterator)
    return kind(**tensors, **numbers)
