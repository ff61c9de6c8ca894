"""A model that was pruned before, by whatever tool, as what the server begins with: its zeros are the masks.

A matrix takes part in recovery if it has zeros beyond those of the dense model, at least `LEAST` of its entries. The others
stay as they are: whoever left them dense meant it so.
"""

import copy
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from fedspallm_appfl.errors import ModelError, first_line, shortened
from fedspallm_appfl.models.lazy_model import Skeleton
from fedspallm_appfl.models.storage.checkpoint import resolve_model
from fedspallm_appfl.rounds.folds.context import GLOBAL
from fedspallm_appfl.settings.paths import is_file
from fedspallm_appfl.settings.schema import Allocation, Config, ServerSettings
from fedspallm_appfl.tensors.patterns import full_name
from fedspallm_appfl.tensors.target import Target, parse_target, share_of
from fedspallm_appfl.tensors.targets import Sparsity, Targets
from fedspallm_appfl.wire.packed import pack
from fedspallm_appfl.wire.store import PackedStore

BEGINNING = "beginning"  # folder of the server's state: the model as it was
LEAST = Fraction(1, 100)  # share of a matrix that is zero beyond the dense model's zeros


def manifest_of(path: str | None) -> dict[str, Any]:
    """What the run that made a model says of it; empty for a model of another tool.

    Raises:
        ModelError: the file cannot be read.
    """
    folder = Path(path or "").expanduser()
    file = (folder.parent if folder.name == "model" else folder) / "manifest.json"
    if path is None or is_file(folder / "config.json") and folder.name != "model" or not is_file(file):
        return {}
    try:
        manifest: dict[str, Any] = json.loads(file.read_text("utf-8"))
        {one["name"]: parse_target(one["target"]) for one in manifest["matrices"]}
        {name: manifest[name] for name in ("algorithm", "pruner", "target", "allocation")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        why = shortened(first_line(error))
        raise ModelError(f"{file} is not the manifest of a run: {why}; remove it, or name another model") from error
    return manifest


def to_recover(config: Config, path: str) -> Config:
    """The configuration of an experiment as one that recovers a model: its targets are those of the model.

    Raises:
        ModelError: there is no model, or it is not the dense one pruned.
    """
    made = copy.deepcopy(config)
    made.recovery.model, made.recovery.rounds = path, config.recovery.rounds or 1
    made.allocation = Allocation()  # nothing is chosen any more
    targets, others = _read(made, path)
    made.prune.ignore = [*config.prune.ignore, *others]
    return made.with_sparsity(_together(targets))


def _read(config: Config, path: str) -> tuple[dict[str, tuple[Target, int]], list[str]]:
    """The targets and entries of the matrices that take part, and patterns of those that do not."""
    asked = {one["name"]: parse_target(one["target"]) for one in manifest_of(path).get("matrices", [])}
    dense = Skeleton.of(config)
    pruned = opened(config, dense)
    targets: dict[str, tuple[Target, int]] = {}
    others: list[str] = []
    for block, linears in enumerate(dense.layout.blocks):
        mine: dict[str, tuple[Target, int]] = {}
        for linear in linears:
            now, before = (of.dense_weight(block, linear) == 0 for of in (pruned, dense))
            zeros = int(now.count_nonzero())
            if zeros - int(before.count_nonzero()) >= LEAST * linear.entries:
                target = asked.get(dense.place(block, linear).name)
                fits = target is not None and target.zeros(linear.entries) == zeros
                target = target if target is not None and fits else share_of(zeros, linear.entries)
                mine[linear.name] = target, linear.entries
        left = [linear.name for linear in linears if linear.name not in mine]
        others += [full_name(block, name) for name in left] if mine else [f"blocks.{block}"] if left else []
        targets |= {full_name(block, name): one for name, one in mine.items()}
        for skeleton in (dense, pruned):
            skeleton.files.release()
    if not targets:
        raise ModelError(
            f"{path} has no zeros beyond those of {dense.folder} in the matrices that prune.include and prune.ignore "
            "leave: nothing to recover"
        )
    return targets, others


def _together(targets: Mapping[str, tuple[Target, int]]) -> Sparsity:
    """One target, and those of matrices that have another: what most have, or the share of all if they differ."""
    [(usual, times)] = Counter(target for target, _ in targets.values()).most_common(1)
    if 2 * times < len(targets):
        sizes = targets.values()
        usual = share_of(sum(target.zeros(entries) for target, entries in sizes), sum(entries for _, entries in sizes))
    others = tuple((name, target) for name, (target, _) in targets.items() if target != usual)
    return Targets(usual, others) if others else usual


def begin(settings: ServerSettings, dense: Skeleton, folder: Path) -> None:
    """Store the pruned model as the global one, and beside it as what it was.

    Args:
        settings: name the pruned model.
        dense: the model that it was made of.
        folder: of the server's state.

    Raises:
        ModelError: it is not the dense model with other numbers in the matrices that are pruned, or its zeros are not those
            that the targets say.
    """
    pruned = opened(settings, dense)
    _require_same_rest(dense, pruned)
    for block, linears in enumerate(dense.layout.blocks):
        weights = {linear.name: pruned.dense_weight(block, linear) for linear in linears}
        packed = {name: pack(weight, weight != 0, dense.stored_dtype) for name, weight in weights.items()}
        for name, one in packed.items():
            target, zeros = settings.sparsity.of(block, name), one.entries - one.kept
            if target.zeros(one.entries) != zeros:
                raise ModelError(
                    f"{pruned.folder}: block {block}, {name} has {zeros} zeros in {one.entries} entries, not sparsity "
                    f"{target}; start it with fedspallm recover, which takes targets from the model"
                )
        for store in (GLOBAL, BEGINNING) if packed else ():
            PackedStore(folder / store).save(block, packed)
        pruned.files.release()


def opened(settings: Config | ServerSettings, dense: Skeleton) -> Skeleton:
    """The pruned model, without weights.

    Raises:
        ModelError: there is none, or its matrices are not those of the dense model.
    """
    where = resolve_model(settings.recovery.model or "", key="`recovery.model`")
    pruned = Skeleton.of(replace(settings, model=replace(settings.model, path=str(where))))
    if pruned.layout != dense.layout or pruned.stored_dtype != dense.stored_dtype:
        raise ModelError(
            f"recovery.model: {where} is not {dense.folder} pruned: its matrices have other names or shapes, or are "
            f"{pruned.stored_dtype} instead of {dense.stored_dtype}; name the dense model that it was made of in model.path"
        )
    return pruned


def _require_same_rest(dense: Skeleton, pruned: Skeleton) -> None:
    """Refuse a model that differs where nothing is recovered."""
    for name, mine, its in _rest(dense, pruned):
        if mine.shape != its.shape or not torch.equal(mine, its):
            raise ModelError(
                f"{pruned.folder}: {name} differs from that of {dense.folder}, and only matrices that take part in "
                "recovery may; take the dense model that it was made of, and leave pruned matrices out of prune.ignore"
            )


def _rest(dense: Skeleton, pruned: Skeleton) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    inside = {dense.layout.parameter(block, one) for block, of in enumerate(dense.layout.blocks) for one in of}
    for name, _ in dense.model.named_parameters():
        if name not in inside:
            yield name, dense.read(name, torch.device("cpu"), None), pruned.read(name, torch.device("cpu"), None)
