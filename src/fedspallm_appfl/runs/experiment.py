"""One experiment from its configuration to its run directory (see `run_dir`)."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from torch import Tensor

from fedspallm_appfl import __version__
from fedspallm_appfl.algorithms import registry
from fedspallm_appfl.allocation.choice import allocated
from fedspallm_appfl.errors import ConfigError, FedSpaLLMError, ModelError, Terminated, first_line, shortened
from fedspallm_appfl.events import Event, EventLog, OnEvent
from fedspallm_appfl.models.lazy_model import Skeleton, replaced_attention
from fedspallm_appfl.models.perplexity import PrunedBlock
from fedspallm_appfl.models.storage.export import MatrixSparsity, save_model
from fedspallm_appfl.reports import card, finished
from fedspallm_appfl.reports.progress import RunProgress
from fedspallm_appfl.reports.report import absence_line, closing, versions
from fedspallm_appfl.reports.result import Result
from fedspallm_appfl.reports.tracking.observer import Trackers
from fedspallm_appfl.rounds.beginning import BEGINNING, manifest_of
from fedspallm_appfl.rounds.folds.context import GLOBAL, STATISTICS
from fedspallm_appfl.rounds.participants import algorithm_of, comparisons, participants, roster, whole
from fedspallm_appfl.rounds.server import GlobalModel
from fedspallm_appfl.runs import run_dir
from fedspallm_appfl.runs.evaluation import DENSE, evaluate, held_out
from fedspallm_appfl.runs.processes import ALONE, Workers
from fedspallm_appfl.settings.schema import Config, plain
from fedspallm_appfl.tensors.targets import parse_sparsity
from fedspallm_appfl.validation.words import attention_words
from fedspallm_appfl.wire.durable import write_text
from fedspallm_appfl.wire.store import PackedStore

TARGETS = "targets.json"  # in the server's state
BEFORE, RECOVERED = "before", "recovered"  # rows of a table
Launch = Callable[[Config, Path, OnEvent], Any]
logger = logging.getLogger(__name__)


def run(
    config: Config,
    launch: Launch,
    console: Console,
    overwrite: bool = False,
    resume: bool = False,
    among: Workers = ALONE,
) -> Result:
    """Run an experiment and write its results; on the server where there are several processes.

    Args:
        config: a configuration without problems.
        launch: runs the rounds and returns the aggregator.
        console: where progress and the closing table go.
        overwrite: replace the results of an earlier run.
        resume: go on with one that was cut off.
        among: processes that share the evaluation.

    Returns:
        What it has shown.
    """
    rounds, recovery = config.server_configs.num_global_epochs, config.recovery.rounds
    with RunProgress(console, rounds, len(participants(config)), recovery) as progress:
        results, log = conduct(config, launch, overwrite, progress, resume=resume, among=among)
    console.print(closing(config, results, log))
    if absent := absence_line(log):
        console.print(f"[bold red]clients {escape(absent)}[/]; why: report.md", highlight=False)
    report = Path(config.run_dir).expanduser() / finished.PAGE
    console.print(f"model   {results.model}\nreport  {report}", highlight=False, markup=False)
    if (report.parent / STATISTICS).is_dir():
        console.print(f"more    fedspallm prune {report.parent} --sparsity ...", highlight=False, markup=False)
    return results


def conduct(
    config: Config,
    launch: Launch,
    overwrite: bool,
    *listeners: OnEvent,
    dense: bool = True,
    resume: bool = False,
    among: Workers = ALONE,
) -> tuple[Result, EventLog]:
    """Run an experiment and write its results, without showing them.

    Args:
        config: a configuration without problems.
        launch: runs the rounds and returns the aggregator.
        overwrite: replace the results of an earlier run.
        *listeners: get every event as it happens.
        dense: measure the perplexity of the dense model too.
        resume: go on with a run that was cut off.
        among: processes that share the evaluation.

    Returns:
        What it has shown, and all events.

    Raises:
        FedSpaLLMError: the experiment fails; what the evaluation needs is looked at before anything is sent.
    """
    texts = held_out(config)
    with run_dir.claimed(config, overwrite, resume) as folder:
        goes_on = run_dir.is_cut_off(folder)
        trackers = Trackers()
        log = EventLog(folder / run_dir.MARK, *listeners, trackers)
        if goes_on:
            _require_version(log)
        rounds = config.server_configs.num_global_epochs
        log({"event": "start", "clients": list(roster(config)), "rounds": rounds, "version": __version__})
        if goes_on:
            log({"event": "resumed"})
        with _telling_why(log):
            trackers.begin(config, folder, log)
            results = _worked(config, launch, folder, log, texts, DENSE if dense else {}, among)
        try:
            shutil.rmtree(folder / run_dir.STATE)
        except OSError as error:  # the results are whole
            logger.warning("%s cannot be removed: %s; nothing needs it any more", folder / run_dir.STATE, error)
    return results, log


def _worked(
    config: Config,
    launch: Launch,
    folder: Path,
    log: EventLog,
    texts: Mapping[str, Tensor],
    dense: Mapping[str, PrunedBlock],
    among: Workers,
) -> Result:
    """Prune, write and measure."""
    told = _allocated(config, folder / run_dir.STATE, log)
    aggregator = _launched(told, launch, folder, log)
    if named := replaced_attention(aggregator.skeleton.model):
        log({"event": "notice", "text": attention_words(named)})
    _keep_statistics(folder)
    _write(told, folder, aggregator.skeleton, aggregator.global_model, log)
    log({"event": "written"})
    methods = dict(dense) | _methods(config, aggregator.global_model, log)
    known = {event["method"]: event["perplexity"] for event in log.of("evaluation")}  # before it was cut off
    perplexity = evaluate(config, texts, methods, log, known, among) if texts else {}
    _write_cards(config, folder, perplexity, log)
    log({"event": "end", "versions": versions(), "dtype": str(aggregator.skeleton.dtype).removeprefix("torch.")})
    results = finished.result_of(folder, config, log)
    finished.write(folder, config, results, log)
    return results


@contextmanager
def _telling_why(log: EventLog) -> Iterator[None]:
    """Write down why a run ends before its time, for those who watch it; a full disk keeps no word of it."""
    try:
        yield
    except (Exception, KeyboardInterrupt, Terminated) as error:
        with suppress(ModelError):
            log({"event": "failed", "why": _why(error)})
        raise


def _why(error: BaseException) -> str:
    if isinstance(error, FedSpaLLMError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return f"ended by {error}" if isinstance(error, Terminated) else f"{type(error).__name__}: {first_line(error)}"


def _require_version(log: EventLog) -> None:
    began = [event.get("version") for event in log.of("start")]
    if began and began[0] != __version__:
        raise ConfigError(
            f"the run was begun by fedspallm_appfl {began[0]}, and this is {__version__}: bits might differ; go on with "
            "that version, or begin anew with --overwrite"
        )


def _allocated(config: Config, state: Path, log: EventLog) -> Config:
    """The configuration with the targets that are chosen at the first start and hold for later ones."""
    file = state / TARGETS
    if file.is_file():
        try:
            return config.with_sparsity(parse_sparsity(json.loads(file.read_text("utf-8"))))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise ModelError(
                f"{file} is damaged: {shortened(first_line(error))}; begin anew with --overwrite"
            ) from error
    told = allocated(config, log)
    write_text(file, json.dumps(plain(told.client_configs.train_configs.sparsity)))
    return told


def _launched(config: Config, launch: Launch, folder: Path, log: EventLog) -> Any:
    """Run the rounds. What was pruned is written before recovery begins, so that it outlives whatever happens then."""

    def on_event(event: Event) -> None:
        if event["event"] == "training":  # and no earlier: until then a later start needs them where they were made
            _keep_statistics(folder)
        if event["event"] == "pruned":
            write_pruned(config, Skeleton.of(config), PackedStore(folder / run_dir.STATE / GLOBAL), folder)
        log(event)

    try:
        return launch(config, folder / run_dir.STATE, on_event)
    except FedSpaLLMError as error:
        if not log.of("pruned"):
            raise
        again = f"fedspallm recover {folder} CONFIG.yaml run_dir=ANOTHER tries again"
        raise type(error)(f"{error}. The model as it was pruned is in {folder}: {again}") from error


def _keep_statistics(folder: Path) -> None:
    """Put sums where `fedspallm prune` looks for them."""
    if (folder / run_dir.STATE / STATISTICS).is_dir():
        (folder / run_dir.STATE / STATISTICS).rename(folder / STATISTICS)


def _write(config: Config, folder: Path, skeleton: Skeleton, model: GlobalModel, log: EventLog) -> None:
    """Write the pruned model, or one for each client."""
    algorithm = algorithm_of(config)
    if not algorithm.apart:
        write_pruned(config, skeleton, model.done, folder)
        return
    for client in whole(config, log):
        store = model.store(algorithm.store_of(client) or "")
        write_pruned(config, skeleton, store, folder / "models" / client)


def _write_cards(config: Config, folder: Path, perplexity: dict[str, dict[str, float]], log: EventLog) -> None:
    """Write the card of the model, or of each client's: the dense model's perplexity stands beside its own."""
    algorithm = algorithm_of(config)
    dense = {name: perplexity[name] for name in DENSE if name in perplexity}
    if not algorithm.apart:
        names = (BEFORE, RECOVERED) if config.recovery.model else (config.algorithm,)
        mine = {name: perplexity[name] for name in names} if perplexity else {}
        card.write(folder, config, dense | mine)
        return
    for client in whole(config, log):
        row = perplexity.get(algorithm.store_of(client) or "")
        card.write(folder / "models" / client, config, dense | {"this model": row} if row else {})


def _methods(config: Config, model: GlobalModel, log: EventLog) -> dict[str, PrunedBlock]:
    """What is measured: name, or name/client, -> the pruned blocks of a model; the global one comes last."""
    methods: dict[str, PrunedBlock] = {}
    if config.recovery.model:
        return {BEFORE: model.store(BEGINNING).get, RECOVERED: model.done.get}
    for algorithm in map(registry.find, (*comparisons(config), config.algorithm)):
        if algorithm.apart:
            stores = [algorithm.store_of(client) or "" for client in whole(config, log)]
            methods |= {store: model.store(store).get for store in stores}
        else:
            methods[algorithm.name] = (
                model.done if algorithm.name == config.algorithm else model.store(algorithm.name)
            ).get
    return methods


def write_pruned(config: Config, skeleton: Skeleton, store: PackedStore, folder: Path) -> list[MatrixSparsity]:
    """Write `model/` and `manifest.json` into a folder; returns the sparsity of every matrix, read back from disk.

    Raises:
        ModelError: there is no room, or what was written is not what was meant.
    """
    matrices = save_model(skeleton, store, folder / "model")
    zeros, entries = sum(matrix.zeros for matrix in matrices), sum(matrix.entries for matrix in matrices)
    sparsity = config.client_configs.train_configs.sparsity
    targets = [
        str(sparsity.of(block, linear.name))
        for block, linears in enumerate(skeleton.layout.blocks)
        for linear in linears
    ]
    manifest = {
        "model": config.model.path,
        "algorithm": config.algorithm,
        "seed": config.seed,
        "fedspallm_appfl": __version__,
        "target": str(sparsity.default if config.allocates else sparsity),
        "allocation": plain(config.allocation),
        "pruner": config.pruners(),
        "block_weights": skeleton.block_weights,
        "prunable": entries,
        "dense_bytes": entries * skeleton.stored_dtype.itemsize,
        "zeros": zeros,
        "sparsity": zeros / entries,
        "zeros_before": sum(matrix.zeros_before for matrix in matrices),
        "zeros_back": sum(matrix.zeros_back for matrix in matrices),
        "prune": plain(config.prune),
        "matrices": [matrix.to_dict() | {"target": target} for matrix, target in zip(matrices, targets, strict=True)],
    }
    before = manifest_of(config.recovery.model)  # who pruned it stays true
    manifest |= {name: before[name] for name in ("algorithm", "pruner", "target", "allocation") if before}
    write_text(folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    return matrices
