"""Further models from the statistics of a `gram` run, without asking a client again."""

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from fedspallm_appfl import experiment
from fedspallm_appfl.blocks import Layout
from fedspallm_appfl.config import Config, load_config
from fedspallm_appfl.config_rules import check, indivisible
from fedspallm_appfl.devices import choose_device
from fedspallm_appfl.errors import ConfigError, ModelError
from fedspallm_appfl.evaluation import PrunedBlock
from fedspallm_appfl.events import ignore
from fedspallm_appfl.export import MatrixSparsity
from fedspallm_appfl.folds import STATISTICS, Aggregation, prune_input
from fedspallm_appfl.gram_store import GramStore
from fedspallm_appfl.lazy_model import Skeleton
from fedspallm_appfl.packed_store import PackedStore
from fedspallm_appfl.payload import pack
from fedspallm_appfl.pruning import PRUNERS, Settings
from fedspallm_appfl.report import model_table
from fedspallm_appfl.sparsity import Target, parse_target

FURTHER = "further"


def prune(run: Path, targets: Sequence[str], pruner: str | None, console: Console) -> None:
    """Prune a model for each target, into `further/TARGET` of a run, and measure all of them.

    Args:
        run: directory of a run with `algorithm: gram`.
        targets: ratios or n:m.
        pruner: another pruner than that of the run.
        console: where the table goes.

    Raises:
        ConfigError: the run has no statistics, or a target or pruner is none.
        PruningError: a matrix cannot be pruned.
        ModelError: a model cannot be written.
    """
    config = _config(run, pruner)
    skeleton, store = Skeleton(config.model.path, config.model.blocks), GramStore(run / STATISTICS)
    aims = {folder_name(text): (text, _target(text, skeleton.layout)) for text in targets}
    methods: dict[str, PrunedBlock] = dict(experiment.DENSE)
    matrices = {}
    with TemporaryDirectory(prefix="fedspallm-") as work:
        for name, (text, target) in aims.items():
            packed = pruned(config, target, skeleton, store, Path(work) / name)
            _require_all(run, skeleton, packed)
            matrices[text] = _written(config, text, skeleton, packed, run / FURTHER / name)
            methods[text] = packed.load
        rows = experiment.evaluate(config, methods, ignore) if config.evaluation.texts else {}
    console.print(model_table(config, rows, matrices))
    for name in aims:
        console.print(f"model   {run / FURTHER / name / 'model'}", highlight=False, markup=False)


def pruned(config: Config, target: Target, skeleton: Skeleton, store: GramStore, folder: Path) -> PackedStore:
    """Prune the whole model with stored sums.

    Args:
        config: names the pruner and its settings.
        target: ratio or n:m.
        skeleton: the dense model.
        store: sums of all clients.
        folder: where the packed blocks go.

    Raises:
        PruningError: a matrix cannot be pruned.
        ModelError: the sums are damaged, or there is no room.
    """
    packed = PackedStore(folder)
    for block, leader in store.units():
        _prune_input(config, target, skeleton, store, packed, block, leader)
    return packed


def _config(run: Path, pruner: str | None) -> Config:
    if not ((run / STATISTICS).is_dir() and (run / "manifest.json").is_file()):
        raise ConfigError(
            f"{run} holds no {STATISTICS}/; name the run_dir of a finished run with algorithm gram and gram.propagate dense"
        )
    config, problems = load_config(run / "config.yaml")
    if pruner is not None:
        for owner in (config.client_configs, *config.clients):
            owner.train_configs.pruner = pruner
        if pruner not in PRUNERS:
            problems.append(f"--pruner: one of {', '.join(PRUNERS)}; got {pruner!r}")
    problems = problems or check(config)
    if problems:
        raise ConfigError("; ".join(problems))
    return config


def _target(text: str, layout: Layout) -> Target:
    try:
        target = parse_target(text)
    except ValueError as error:
        raise ConfigError(f"--sparsity: {error}") from error
    for problem in indivisible(layout.blocks, target):
        raise ConfigError(problem)
    return target


def folder_name(text: str) -> str:
    """A target as the name of a folder."""
    return text.replace(":", "-").replace("/", "_")  # 1/2 is a share too


def _prune_input(
    config: Config, target: Target, skeleton: Skeleton, store: GramStore, packed: PackedStore, block: int, leader: str
) -> None:
    """Prune the matrices that take one input."""
    found = store.load(block, leader)
    assert found is not None, "the store listed it"
    linears, sums, rounded = found
    device = choose_device(config.server_configs.device, 0)
    moved = replace(sums, upper=sums.upper.to(device))
    weights = {name: skeleton.dense_matrix(block, name).to(device).float() for name in linears}
    train = config.client_configs.train_configs
    settings = replace(Settings.of(vars(train)), target=target)
    made = prune_input(
        weights, moved, Aggregation(settings, threads=train.threads), rounded, f"block {block}, {leader}"
    )
    packed.add(block, {name: pack(*matrix, skeleton.stored_dtype) for name, matrix in made.items()})


def _require_all(run: Path, skeleton: Skeleton, packed: PackedStore) -> None:
    """Refuse to leave dense what the run has pruned."""
    manifest = json.loads((run / "manifest.json").read_text("utf-8"))["matrices"]
    before = {matrix["name"] for matrix in manifest if matrix["zeros"]}
    for block, linears in enumerate(skeleton.layout.blocks):
        done = packed.load(block) or {}
        for linear in linears:
            if linear.name not in done and (done or skeleton.key(block, linear.name) in before):
                raise ModelError(
                    f"{run / STATISTICS} lacks the statistics of block {block}, {linear.name}; run the experiment again"
                )


def _written(config: Config, text: str, skeleton: Skeleton, packed: PackedStore, folder: Path) -> list[MatrixSparsity]:
    mine = copy.deepcopy(config)
    mine.client_configs.train_configs.sparsity = text
    return experiment.write_pruned(mine, skeleton, packed, folder)
