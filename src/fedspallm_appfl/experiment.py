"""One experiment from its configuration to its run directory.

A run directory holds `config.yaml` (resolved), `metrics.jsonl` (an event a line), `model/` (a Hugging Face folder),
`manifest.json` (sparsity of every matrix, read back from disk) and `report.md`.
"""

import json
import math
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from fedspallm_appfl.calibration import cut_windows, load_tokenizer, read_text
from fedspallm_appfl.config import Config
from fedspallm_appfl.config_rules import run_dir_problem
from fedspallm_appfl.devices import choose_device
from fedspallm_appfl.errors import ConfigError, DataError
from fedspallm_appfl.evaluation import PrunedBlock, perplexities
from fedspallm_appfl.events import EventLog, OnEvent
from fedspallm_appfl.export import check_model, write_model
from fedspallm_appfl.global_model import GlobalModel
from fedspallm_appfl.lazy_model import LazyModel, Skeleton
from fedspallm_appfl.progress import RunProgress
from fedspallm_appfl.report import Results, closing, write_report

Launch = Callable[[Config, Path, OnEvent], Any]
DEFAULT_LENGTH = 2048
OWN_FILES = ("config.yaml", "metrics.jsonl", "report.md", "manifest.json", "model", "state")


def prepare_run_dir(config: Config, overwrite: bool) -> Path:
    """Make the run directory, or clear the one that may be overwritten of what runs write.

    Raises:
        ConfigError: it exists and must not be overwritten.
    """
    problem = run_dir_problem(config, overwrite)
    if problem:
        raise ConfigError(problem)
    folder = Path(config.run_dir)
    for name in OWN_FILES:
        old = folder / name
        if old.is_dir():
            shutil.rmtree(old)
        elif old.exists():
            old.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config.to_yaml(), "utf-8")
    return folder


def run(config: Config, launch: Launch, console: Console, overwrite: bool = False) -> Results:
    """Run an experiment and write its results; on the server where there are several processes.

    Args:
        config: a configuration without problems.
        launch: runs the rounds and returns the aggregator.
        console: where progress and the closing table go.
        overwrite: replace the results of an earlier run.

    Returns:
        What it has shown.
    """
    folder = prepare_run_dir(config, overwrite)
    rounds, clients = config.server_configs.num_global_epochs, len(config.clients)
    with RunProgress(console, rounds, clients) as progress:
        log = EventLog(folder / "metrics.jsonl", progress)
        log({"event": "start", "clients": list(config.roster()), "rounds": rounds})
        aggregator = launch(config, folder / "state", log)
        results = _finish(config, folder, aggregator.skeleton, aggregator.global_model, log)
    write_report(folder / "report.md", config, results, log)
    shutil.rmtree(folder / "state")
    log({"event": "end"})
    console.print(closing(config, results, log))
    console.print(f"model   {results.model}\nreport  {folder / 'report.md'}", highlight=False, markup=False)
    return results


def _finish(config: Config, folder: Path, skeleton: Skeleton, model: GlobalModel, log: EventLog) -> Results:
    write_model(skeleton, model.done, folder / "model")
    matrices = check_model(skeleton, model.done, folder / "model")
    manifest = {
        "target": config.client_configs.train_configs.sparsity,
        "matrices": [matrix.to_dict() for matrix in matrices],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
    perplexity = _evaluate(config, model, log) if config.evaluation.texts else {}
    dense = sum(matrix.entries for matrix in matrices) * skeleton.stored_dtype.itemsize
    return Results(perplexity, matrices, dense, folder / "model")


def _evaluate(config: Config, model: GlobalModel, log: EventLog) -> dict[str, dict[str, float]]:
    """Perplexity of dense, the comparisons and the global model, all with the same settings."""
    device = choose_device(config.evaluation.device, 0)
    lazy = LazyModel(config.model.path, config.model.blocks, config.model.dtype, device)
    tokenizer, settings = load_tokenizer(lazy.skeleton.folder), config.evaluation
    texts = {
        name: cut_windows(tokenizer, read_text(text), settings.length)[: settings.windows]
        for name, text in settings.texts.items()
    }

    methods: dict[str, PrunedBlock] = {"dense": lambda block: None}
    if "standalone" in settings.compare:
        methods |= {f"standalone/{client}": model.comparison(f"standalone/{client}").load for client in config.roster()}
    if "fedavg" in settings.compare:
        methods["fedavg"] = model.comparison("fedavg").load
    methods["fedspallm"] = model.done.load
    rows = {}
    for number, (method, pruned) in enumerate(methods.items(), 1):
        rows[method] = perplexities(lazy, texts, pruned, settings.batch)
        log({"event": "evaluation", "method": method, "of": [number, len(methods)], "perplexity": rows[method]})
    return _with_mean_of_standalone(rows)


def _with_mean_of_standalone(rows: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """One row, the mean over the clients alone, in the place of one for each of them."""
    alone = [row for method, row in rows.items() if method.startswith("standalone/")]
    together: dict[str, dict[str, float]] = {}
    for method, row in rows.items():
        if not method.startswith("standalone/"):
            together[method] = row
        elif "standalone" not in together:
            together["standalone"] = {text: statistics.mean(one[text] for one in alone) for text in row}
    return together


def evaluate_folder(
    folder: str, texts: list[str], length: int | None, windows: int | None, batch: int, dtype: str, device: str
) -> dict[str, float]:
    """Perplexity of a model folder on text files, for `fedspallm evaluate`.

    Args:
        folder: model folder or hub name.
        texts: text files or folders.
        length: tokens in a window; None for 2048, or what the model takes if that is less.
        windows: at most so many of each text; None for all.
        batch: windows in a forward pass.
        dtype: arithmetic.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
    """
    lazy = LazyModel(folder, None, dtype, choose_device(device, 0))
    longest = getattr(lazy.model.config, "max_position_embeddings", None) or math.inf
    length = length or int(min(longest, DEFAULT_LENGTH))
    if length > longest:
        raise DataError(f"--length is at most {longest} for this model (max_position_embeddings), got {length}")
    if length < 2:
        raise DataError("--length is at least 2, since the first token of a window is not predicted; got 1")
    tokenizer = load_tokenizer(lazy.skeleton.folder)
    cut = {text: cut_windows(tokenizer, read_text(text), length)[:windows] for text in texts}
    return perplexities(lazy, cut, batch=batch)
