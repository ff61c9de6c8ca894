"""Further models from the statistics of a `gram` run, without asking a client again."""

import copy
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from fedspallm_appfl.allocation.choice import allocated
from fedspallm_appfl.devices import choose_device
from fedspallm_appfl.errors import ConfigError, ModelError, first_line, quoted, shortened
from fedspallm_appfl.models.layout import Layout
from fedspallm_appfl.models.lazy_model import Skeleton
from fedspallm_appfl.models.storage.export import MatrixSparsity
from fedspallm_appfl.pruning import registry
from fedspallm_appfl.reports import card
from fedspallm_appfl.reports.progress import RunProgress
from fedspallm_appfl.reports.report import model_table
from fedspallm_appfl.rounds.folds.context import STATISTICS
from fedspallm_appfl.rounds.folds.statistics import prune_input
from fedspallm_appfl.rounds.folds.unreached import unseen
from fedspallm_appfl.runs import evaluation, experiment, run_dir
from fedspallm_appfl.settings import plugins
from fedspallm_appfl.settings.paths import is_folder
from fedspallm_appfl.settings.reading import load_config
from fedspallm_appfl.settings.schema import Config, Recovery
from fedspallm_appfl.tensors.target import parse_target
from fedspallm_appfl.tensors.targets import Sparsity
from fedspallm_appfl.validation.files import unfit
from fedspallm_appfl.validation.rules import check
from fedspallm_appfl.wire.store import GramStore, PackedStore

FURTHER = "further"


@dataclass(frozen=True)
class Model:
    """A model to be made.

    Attributes:
        target: the target of each matrix.
        folder: where it goes.
    """

    target: Sparsity
    folder: Path

    @property
    def text(self) -> str:
        """Its target, or the default one."""
        return str(self.target.default)

    def is_there(self) -> bool:
        """Whether it has been made; what was interrupted has no manifest."""
        return (self.folder / "manifest.json").is_file()


def prune(run: Path, targets: Sequence[str], pruner: str | None, console: Console, overwrite: bool = False) -> None:
    """Prune a model for each target, into `further/PRUNER-TARGET` of a run, and measure all of them.

    Args:
        run: directory of a run with `algorithm: gram`.
        targets: ratios or n:m; equal ones in two spellings are one.
        pruner: another pruner than that of the run; it begins without the run's `refit`.
        console: where the table goes.
        overwrite: replace models that are there.

    Raises:
        ConfigError: the run has no statistics, somebody else is at work in it, a target or pruner is none, or a model is
            there already.
        DataError: a text of the evaluation cannot be read.
        PruningError: a matrix cannot be pruned.
        ModelError: a model cannot be written.
    """
    config = _config(run, pruner)
    skeleton, store = Skeleton.of(config), GramStore(run / STATISTICS)
    models = _models(run, config, targets, skeleton.layout)
    with run_dir.locked(run, "wait until it is done"), run_dir.scratch(run) as work:
        _require_absent(models, overwrite)
        texts = evaluation.held_out(config)
        methods, matrices = dict(evaluation.DENSE), {}
        for model in models:
            console.print(f"pruning to {model.text} with {config.pruners()}", highlight=False)
            model = replace(model, target=_allocated(config, model.target))
            packed = pruned(config, model.target, skeleton, store, work / model.folder.name)
            _require_all(run, skeleton, packed)
            matrices[model.text] = _written(config, model, skeleton, packed)
            methods[model.text] = packed.get
            if not texts:  # nobody reads it again; there is none of it where nothing was pruned
                shutil.rmtree(packed.folder, ignore_errors=True)
        with RunProgress(console, 1, 1) as progress:
            rows = evaluation.evaluate(config, texts, methods, progress) if texts else {}
        for model in models:
            measured = {"dense": rows["dense"], "this model": rows[model.text]} if rows else {}
            card.write(model.folder, config, measured)
    title = f"Perplexity, {config.pruners()} with the statistics of {run}"
    console.print(model_table(title, rows, matrices, skeleton.block_weights))
    for model in models:
        console.print(f"model   {model.folder / 'model'}", highlight=False, markup=False)


def _models(run: Path, config: Config, targets: Sequence[str], layout: Layout) -> list[Model]:
    """What is to be made, each once."""
    given = config.client_configs.train_configs.sparsity
    aims = dict.fromkeys(_target(text, layout, given) for text in targets)
    return [Model(target, run / FURTHER / f"{config.pruners()}-{folder_name(str(target.default))}") for target in aims]


def _require_absent(models: Sequence[Model], overwrite: bool) -> None:
    there = [str(model.folder) for model in models if model.is_there()]
    if there and not overwrite:
        raise ConfigError(
            f"{', '.join(there)}: made before; give --overwrite to replace what is there, or other targets"
        )


def pruned(config: Config, target: Sparsity, skeleton: Skeleton, store: GramStore, folder: Path) -> PackedStore:
    """Prune the whole model with stored sums.

    Args:
        config: names the pruner and its settings.
        target: of each matrix.
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
    for block in packed.blocks():
        _add_unseen(config, target, skeleton, packed, block)
    return packed


def _add_unseen(config: Config, target: Sparsity, skeleton: Skeleton, packed: PackedStore, block: int) -> None:
    """Add experts of which there are no sums, because too few tokens reached them."""
    experts = [linear for linear in skeleton.layout.blocks[block] if linear.expert]
    done = (packed.get(block) or {}) if experts else {}
    missing = [linear for linear in experts if linear.name not in done]
    dense = config.server_configs.aggregator_kwargs.unreached == "dense"
    for linear in missing:
        weight = skeleton.dense_weight(block, linear).float()
        done[linear.name] = unseen(weight, target.of(block, linear.name), dense, skeleton.stored_dtype)
    if missing:
        packed.save(block, done)


def _config(run: Path, pruner: str | None) -> Config:
    if not is_folder(run):
        raise ConfigError(f"there is no folder {shortened(run)}; name the run_dir of a finished run")
    if run_dir.at_work(run):
        raise ConfigError(f"another run or fedspallm prune is using {run}; wait until it is done")
    if run_dir.is_cut_off(run) and not (run / STATISTICS).is_dir():
        raise ConfigError(f"the run in {run} was cut off; finish it with fedspallm resume {run}")
    if not ((run / STATISTICS).is_dir() and (run / "manifest.json").is_file()):
        raise ConfigError(
            f"{run} holds no {STATISTICS}/; name the run_dir of a finished run with algorithm gram and gram.propagate dense"
        )
    config, problems = load_config(run / "config.yaml")
    config.recovery = Recovery()  # that was of the run's own model
    config.server_configs.roster = None  # nobody is asked again, so nobody signs
    for client in config.clients:
        client.identity = None
    if pruner is not None:
        for train in (owner.train_configs for owner in (config.client_configs, *config.clients)):
            train.refit = train.refit and train.pruner == pruner  # chosen for that pruner; others may not take it
            train.pruner = pruner
        plugins.load(config.plugins)
        if pruner not in registry.names():
            problems.append(f"--pruner: one of {', '.join(registry.names())}; got {quoted(pruner)}")
    problems = problems or check(config)
    if problems:
        raise ConfigError("; ".join(problems))
    return config


def _target(text: str, layout: Layout, given: Sparsity) -> Sparsity:
    """A target in the place of the default one of the run; what it says of some matrices stands."""
    try:
        target = given.with_default(parse_target(text))
    except ValueError as error:
        raise ConfigError(f"--sparsity: {error}") from error
    for problem in unfit(layout, target):
        raise ConfigError(problem)
    return target


def _allocated(config: Config, target: Sparsity) -> Sparsity:
    """The targets of all matrices, chosen as in the run if it has chosen any."""
    return allocated(config.with_sparsity(target)).client_configs.train_configs.sparsity


def folder_name(text: str) -> str:
    """A target as the name of a folder."""
    return text.replace(":", "-").replace("/", "_")  # 1/3 is a share too


def _prune_input(
    config: Config, target: Sparsity, skeleton: Skeleton, store: GramStore, packed: PackedStore, block: int, leader: str
) -> None:
    """Prune the matrices that take one input."""
    found = store.load(block, leader)
    assert found is not None, "the store listed it"
    linears, sums, rounded = found
    shapes = skeleton.layout.pruned.get(block, {})
    if not linears or any(shapes.get(name, (0, 0))[1] != len(sums.upper) for name in linears):
        raise ModelError(
            f"{store.folder} holds statistics of block {block}, {leader} that are not of this model; run the experiment "
            "again"
        )
    device = choose_device(config.server_configs.device, 0)
    moved = replace(sums, upper=sums.upper.to(device))
    weights = {name: skeleton.dense_matrix(block, name).to(device).float() for name in linears}
    train = config.client_configs.train_configs
    settings = replace(train, sparsity=target)
    how = rounded, train.threads, (block, leader), config.prune.keep_zeros, skeleton.stored_dtype
    packed.add(block, prune_input(weights, moved, settings, *how))


def _require_all(run: Path, skeleton: Skeleton, packed: PackedStore) -> None:
    """Refuse to leave dense what the run has pruned."""
    before = _pruned_before(run / "manifest.json")
    for block, linears in enumerate(skeleton.layout.blocks):
        done = packed.get(block) or {}
        for linear in linears:
            if linear.name not in done and (done or skeleton.place(block, linear).name in before):
                raise ModelError(
                    f"{run / STATISTICS} lacks the statistics of block {block}, {linear.name}; run the experiment again"
                )


def _pruned_before(manifest: Path) -> set[str]:
    """Names of the matrices that a run has pruned."""
    try:
        matrices = json.loads(manifest.read_text("utf-8"))["matrices"]
        return {str(matrix["name"]) for matrix in matrices if matrix["zeros"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{manifest} is damaged: {shortened(first_line(error))}; run the experiment again") from error


def _written(config: Config, model: Model, skeleton: Skeleton, packed: PackedStore) -> list[MatrixSparsity]:
    """Write a model in the place of what is there."""
    mine = copy.deepcopy(config)
    mine.client_configs.train_configs.sparsity = model.target
    try:
        if model.folder.exists():
            shutil.rmtree(model.folder)
    except OSError as error:
        raise ModelError(f"{model.folder} cannot be replaced: {error}; remove it first") from error
    return experiment.write_pruned(mine, skeleton, packed, model.folder)
