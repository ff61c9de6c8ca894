"""A model that was pruned before, by whatever tool, as what the server begins with: its zeros are the masks."""

from dataclasses import replace
from pathlib import Path

import torch

from fedspallm_appfl.errors import ConfigError, ModelError
from fedspallm_appfl.models.lazy_model import Skeleton
from fedspallm_appfl.rounds.folds import GLOBAL
from fedspallm_appfl.settings.reading import load_config
from fedspallm_appfl.settings.schema import ServerSettings
from fedspallm_appfl.tensors.target import parse_target
from fedspallm_appfl.tensors.targets import Sparsity
from fedspallm_appfl.wire.packed import pack
from fedspallm_appfl.wire.store import PackedStore

BEGINNING = "beginning"  # folder of the server's state: the model as it was
DIGITS = 4  # of a sparsity that was counted


def folder_of(path: str) -> Path:
    """The model folder that a path means: itself, or that of a run directory.

    Raises:
        ConfigError: it is neither.
    """
    folder = Path(path).expanduser()
    inside = folder if (folder / "config.json").is_file() else folder / "model"
    if not (inside / "config.json").is_file():
        raise ConfigError(f"recovery.model: {path} is neither a model folder nor a run_dir with one in model/")
    return inside


def begin(settings: ServerSettings, dense: Skeleton, folder: Path) -> None:
    """Store the pruned model as the global one, and beside it as what it was.

    Args:
        settings: name the pruned model.
        dense: the model that it was made of.
        folder: of the server's state.

    Raises:
        ModelError: it is not the dense model with other numbers in the matrices that are pruned.
    """
    where, pruned = _opened(settings, dense)
    for block, linears in enumerate(dense.layout.blocks):
        weights = {linear.name: pruned.dense_weight(block, linear) for linear in linears}
        if any(bool((weight == 0).any()) for weight in weights.values()):
            packed = {name: pack(weight, weight != 0, dense.stored_dtype) for name, weight in weights.items()}
            for store in (GLOBAL, BEGINNING):
                PackedStore(folder / store).save(block, packed)
        pruned.files.release()
    if not PackedStore(folder / GLOBAL).blocks():
        raise ModelError(
            f"{where} has no zeros in the matrices that prune.include and prune.ignore leave: nothing to keep"
        )


def _opened(settings: ServerSettings, dense: Skeleton) -> tuple[Path, Skeleton]:
    where = folder_of(settings.recovery.model or "")
    pruned = Skeleton.of(replace(settings, model=replace(settings.model, path=str(where))))
    if pruned.layout != dense.layout or pruned.stored_dtype != dense.stored_dtype:
        raise ModelError(
            f"{where} is not {dense.folder} pruned: its matrices have other names or shapes, or are {pruned.stored_dtype} "
            f"instead of {dense.stored_dtype}; name the dense model that it was made of in model.path"
        )
    inside = {dense.layout.parameter(block, one) for block, of in enumerate(dense.layout.blocks) for one in of}
    for name, parameter in dense.model.named_parameters():
        if name not in inside:
            mine, its = (one.read(name, torch.device("cpu"), None) for one in (dense, pruned))
            if parameter.shape != its.shape or not torch.equal(mine, its):
                raise ModelError(
                    f"{where}: {name} differs from that of {dense.folder}, and only pruned matrices may; take the dense "
                    "model that it was made of"
                )
    return where, pruned


def sparsity_of(path: str) -> Sparsity:
    """The target that a pruned model was made for, where its run says so, else its share of zeros in matrices."""
    inside = folder_of(path)
    config = inside.parent / "config.yaml"
    if config.is_file():
        asked: Sparsity = load_config(config)[0].client_configs.train_configs.sparsity
        return asked
    skeleton = Skeleton(str(inside))
    zeros = entries = 0
    for block, linears in enumerate(skeleton.layout.blocks):
        for linear in linears:
            weight = skeleton.dense_weight(block, linear)
            zeros, entries = zeros + int((weight == 0).sum()), entries + weight.numel()
        skeleton.files.release()
    return parse_target(str(round(zeros / entries, DIGITS)))
