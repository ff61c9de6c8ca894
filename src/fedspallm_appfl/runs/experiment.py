"""One experiment from its configuration to its run directory (see `run_dir`)."""

import json
import math
import shutil
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from safetensors import SafetensorError
from torch import Tensor

from fedspallm_appfl import __version__
from fedspallm_appfl.devices import choose_device
from fedspallm_appfl.errors import ConfigError, DataError, ModelError
from fedspallm_appfl.events import EventLog, OnEvent
from fedspallm_appfl.models.export import MatrixSparsity, check_model, write_model
from fedspallm_appfl.models.lazy_model import LazyModel, Skeleton
from fedspallm_appfl.models.perplexity import PrunedBlock, held_out_windows, perplexities
from fedspallm_appfl.models.text import cut_windows, load_tokenizer, read_text
from fedspallm_appfl.rounds.folds import STATISTICS
from fedspallm_appfl.rounds.server import GlobalModel
from fedspallm_appfl.runs import run_dir
from fedspallm_appfl.runs.progress import RunProgress
from fedspallm_appfl.runs.report import Results, absence_line, closing, write_report
from fedspallm_appfl.settings.schema import Config
from fedspallm_appfl.validation.rules import too_long
from fedspallm_appfl.wire.store import PackedStore

Launch = Callable[[Config, Path, OnEvent], Any]
DEFAULT_LENGTH = 2048
DENSE: Mapping[str, PrunedBlock] = {"dense": lambda block: None}  # the reference for every perplexity


def run(config: Config, launch: Launch, console: Console, overwrite: bool = False) -> Results:
    """Run an experiment and write its results; with several processes, only the server calls this.

    Args:
        config: a configuration without problems.
        launch: runs the rounds and returns the aggregator.
        console: for progress and the final table.
        overwrite: replace the results of an earlier run.

    Returns:
        What it has shown.
    """
    with RunProgress(console, config.server_configs.num_global_epochs, len(config.participants())) as progress:
        results, log = conduct(config, launch, overwrite, progress)
    console.print(closing(config, results, log))
    if absent := absence_line(log):
        console.print(f"[bold red]clients {escape(absent)}[/]; why: report.md", highlight=False)
    report = Path(config.run_dir).expanduser() / "report.md"
    console.print(f"model   {results.model}\nreport  {report}", highlight=False, markup=False)
    if (report.parent / STATISTICS).is_dir():
        console.print(f"more    fedspallm prune {report.parent} --sparsity ...", highlight=False, markup=False)
    return results


def conduct(
    config: Config, launch: Launch, overwrite: bool, *listeners: OnEvent, dense: bool = True
) -> tuple[Results, EventLog]:
    """Run an experiment and write its results, without printing them.

    Args:
        config: a configuration without problems.
        launch: runs the rounds and returns the aggregator.
        overwrite: replace the results of an earlier run.
        *listeners: get every event as it happens.
        dense: measure the perplexity of the dense model too.

    Returns:
        What it has shown, and all events.

    Raises:
        FedSpaLLMError: the experiment fails; the inputs of the evaluation are checked before anything is sent.
    """
    texts = held_out(config)
    with run_dir.claimed(config, overwrite) as folder:
        log = EventLog(folder / run_dir.MARK, *listeners)
        rounds = config.server_configs.num_global_epochs
        log({"event": "start", "clients": list(config.roster()), "rounds": rounds})
        aggregator = launch(config, folder / "state", log)
        statistics_folder = folder / "state" / STATISTICS
        if statistics_folder.is_dir():
            statistics_folder.rename(folder / STATISTICS)  # for `fedspallm prune`
        results = _finish(config, folder, aggregator.skeleton, aggregator.global_model, texts, log, dense)
        log({"event": "end"})
        write_report(folder / "report.md", config, results, log)
        shutil.rmtree(folder / "state")
    return results, log


def _finish(
    config: Config,
    folder: Path,
    skeleton: Skeleton,
    model: GlobalModel,
    texts: Mapping[str, Tensor],
    log: EventLog,
    dense: bool,
) -> Results:
    methods: dict[str, PrunedBlock] = dict(DENSE) if dense else {}
    left_out = {event["client"] for event in log.of("absent")}  # an incomplete model cannot be compared
    alone = {f"standalone/{c}": model.store(f"standalone/{c}") for c in config.roster() if c not in left_out}
    if config.algorithm == "standalone":
        for name, store in alone.items():
            matrices = write_pruned(config, skeleton, store, folder / "models" / name.removeprefix("standalone/"))
        place = folder / "models"
    else:
        matrices, place = write_pruned(config, skeleton, model.done, folder), folder / "model"
    log({"event": "written"})
    if "standalone" in (config.algorithm, *config.comparisons()):
        methods |= {name: store.load for name, store in alone.items()}
    if "fedavg" in config.comparisons():
        methods["fedavg"] = model.store("fedavg").load
    if config.algorithm != "standalone":
        methods[config.algorithm] = model.done.load
    perplexity = evaluate(config, texts, methods, log) if texts else {}
    dense_bytes = sum(matrix.entries for matrix in matrices) * skeleton.stored_dtype.itemsize
    return Results(_with_mean_of_standalone(perplexity), matrices, dense_bytes, place)


def write_pruned(config: Config, skeleton: Skeleton, store: PackedStore, folder: Path) -> list[MatrixSparsity]:
    """Write `model/` and `manifest.json` into a folder; returns the sparsity of every matrix, read back from disk.

    Raises:
        ModelError: the disk is full, or the written files differ from what was meant.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_model(skeleton, store, folder / "model")
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"the pruned model cannot be written to {folder / 'model'}: {error}; free disk space there"
        ) from error
    matrices = check_model(skeleton, store, folder / "model")
    zeros, entries = sum(matrix.zeros for matrix in matrices), sum(matrix.entries for matrix in matrices)
    manifest = {
        "model": config.model.path,
        "algorithm": config.algorithm,
        "seed": config.seed,
        "fedspallm_appfl": __version__,
        "target": config.client_configs.train_configs.sparsity,
        "pruner": config.pruners(),
        "prunable": entries,
        "zeros": zeros,
        "sparsity": zeros / entries,
        "matrices": [matrix.to_dict() for matrix in matrices],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
    return matrices


def held_out(config: Config) -> dict[str, Tensor]:
    """The windows of each text of `evaluation`: name -> (n, length) int64 token ids.

    This happens before a run begins, because a missing text should not be found after hours of pruning.

    Raises:
        ConfigError: the windows are too long for the model, or the device does not exist.
        DataError: a text cannot be read, is too short or does not match the model.
    """
    settings = config.evaluation
    if not settings.texts:
        return {}
    skeleton = Skeleton(config.model.path, config.model.blocks)
    longest = getattr(skeleton.model.config, "max_position_embeddings", None)
    for problem in too_long("evaluation.length", settings.length, longest):
        raise ConfigError(problem)
    try:
        choose_device(settings.device, 0)
    except ConfigError as error:
        raise ConfigError(f"evaluation.device: {error}") from error
    known = load_tokenizer(skeleton.folder), skeleton.vocabulary
    return {
        name: held_out_windows(name, text, settings.length, *known)[: settings.windows]
        for name, text in settings.texts.items()
    }


def evaluate(
    config: Config, texts: Mapping[str, Tensor], methods: Mapping[str, PrunedBlock], log: OnEvent
) -> dict[str, dict[str, float]]:
    """Perplexity of each model on each text, all with the same settings: method -> text -> perplexity.

    Args:
        config: the experiment.
        texts: as returned by `held_out`.
        methods: name -> the pruned blocks of a model.
        log: gets an event for each model.
    """
    device = choose_device(config.evaluation.device, 0)
    lazy = LazyModel(config.model.path, config.model.blocks, config.model.dtype, device)
    rows = {}
    for number, (method, pruned) in enumerate(methods.items(), 1):
        rows[method] = perplexities(lazy, texts, pruned, config.evaluation.batch)
        log({"event": "evaluation", "method": method, "of": [number, len(methods)], "perplexity": rows[method]})
    return rows


def _with_mean_of_standalone(rows: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Replace the rows of single clients by one row, their geometric mean."""
    alone = [row for method, row in rows.items() if method.startswith("standalone/")]
    together: dict[str, dict[str, float]] = {}
    for method, row in rows.items():
        if not method.startswith("standalone/"):
            together[method] = row
        elif "standalone" not in together:
            together["standalone"] = {text: statistics.geometric_mean(one[text] for one in alone) for text in row}
    return together


@dataclass(frozen=True)
class Measured:
    """Perplexities and how they were measured.

    Attributes:
        perplexity: text -> perplexity.
        length: tokens in a window.
        windows: windows of all texts together.
        dtype: arithmetic.
    """

    perplexity: dict[str, float]
    length: int
    windows: int
    dtype: str


def evaluate_folder(
    folder: str, texts: list[str], length: int | None, windows: int | None, batch: int, dtype: str, device: str
) -> Measured:
    """Perplexity of a model folder on text files, for `fedspallm evaluate`.

    Args:
        folder: model folder or hub name.
        texts: text files or folders.
        length: tokens per window; None for 2048, or the model's maximum if that is less.
        windows: maximum number of windows of each text; None for all.
        batch: windows per forward pass.
        dtype: arithmetic; `auto` is as stored, except float32 for float16 on a CPU, where float16 is slow.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        DataError: a text cannot be read or is too short, or the length is not valid for this model.
    """
    where = choose_device(device, 0)
    if dtype == "auto" and where == "cpu" and Skeleton(folder).stored_dtype == torch.float16:
        dtype = "float32"
    lazy = LazyModel(folder, None, dtype, where)
    longest = getattr(lazy.model.config, "max_position_embeddings", None) or math.inf
    length = length or int(min(longest, DEFAULT_LENGTH))
    if length > longest:
        raise DataError(f"--length is at most {longest} for this model (max_position_embeddings), got {length}")
    if length < 2:
        raise DataError("--length is at least 2, since the first token of a window is not predicted; got 1")
    tokenizer = load_tokenizer(lazy.skeleton.folder)
    cut = {text: cut_windows(tokenizer, read_text(text), length)[:windows] for text in texts}
    rows = perplexities(lazy, cut, batch=batch)
    return Measured(rows, length, sum(map(len, cut.values())), str(lazy.dtype).removeprefix("torch."))
