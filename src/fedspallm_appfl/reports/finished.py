"""A run that has ended, as its directory has it: what it has shown, and its reports, which can be made anew at any time."""

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedspallm_appfl.errors import ConfigError, ModelError, first_line, refuse, shortened
from fedspallm_appfl.events import EventLog
from fedspallm_appfl.models.storage.export import MatrixSparsity
from fedspallm_appfl.reports.own_text import own_texts
from fedspallm_appfl.reports.pages.page import write_page
from fedspallm_appfl.reports.report import write_report
from fedspallm_appfl.reports.result import Result
from fedspallm_appfl.rounds.participants import algorithm_of, whole
from fedspallm_appfl.settings import plugins
from fedspallm_appfl.settings.paths import is_file
from fedspallm_appfl.settings.reading import load_config
from fedspallm_appfl.settings.schema import Config

PAGE, REPORT = "report.html", "report.md"


def opened(folder: Path) -> tuple[Config, Result, EventLog]:
    """Configuration, results and events of a run.

    Raises:
        ConfigError: there is no run that has ended.
        ModelError: a file of it is damaged.
    """
    if not all(is_file(folder / name) for name in ("config.yaml", "metrics.jsonl")):
        raise ConfigError(f"{shortened(folder)} holds no run (no config.yaml or metrics.jsonl); name its run_dir")
    log = EventLog(folder / "metrics.jsonl")
    if not log.of("end"):
        raise ConfigError(f"the run in {folder} has not ended; finish it with fedspallm resume {folder}")
    config, problems = load_config(folder / "config.yaml", [f"run_dir={json.dumps(str(folder))}"])
    refuse(str(folder / "config.yaml"), problems)
    plugins.load(config.plugins)
    return config, result_of(folder, config, log), log


def result_of(folder: Path, config: Config, log: EventLog) -> Result:
    """What a run has shown. Of models that are apart the manifest of the last one counts.

    Raises:
        ModelError: there is no manifest, or it is damaged.
    """
    apart = algorithm_of(config).apart
    file = (folder / "models" / whole(config, log)[-1] if apart else folder) / "manifest.json"
    try:
        manifest = json.loads(file.read_text("utf-8"))
        matrices = [_matrix(entry) for entry in manifest["matrices"]]
        targets = {entry["name"]: str(entry["target"]) for entry in manifest["matrices"]}
        weights, nbytes = int(manifest["block_weights"]), int(manifest["dense_bytes"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        why = shortened(first_line(error))
        raise ModelError(f"{file} is no manifest of this version ({why}); run the experiment again") from error
    perplexity = _with_means({event["method"]: event["perplexity"] for event in log.of("evaluation")})
    place = folder / ("models" if apart else "model")
    return Result(perplexity, matrices, weights, nbytes, place, own_texts(log), targets)


def write(folder: Path, config: Config, results: Result, log: EventLog) -> None:
    """Write report.html, and report.md last: a run that has it is finished."""
    write_page(folder / PAGE, config, results, log)
    write_report(folder / REPORT, config, results, log)


def _matrix(entry: Mapping[str, Any]) -> MatrixSparsity:
    known = {key: value for key, value in entry.items() if key != "target"}
    return MatrixSparsity(**known | {"shape": tuple(known["shape"])})


def _with_means(rows: Mapping[str, Mapping[str, float]]) -> dict[str, Mapping[str, float]]:
    """One row, the geometric mean over the clients' own models (name/client), in the place of one for each of them."""
    together: dict[str, list[Mapping[str, float]]] = {}
    for method, row in rows.items():
        together.setdefault(method.partition("/")[0], []).append(row)
    return {
        method: {text: statistics.geometric_mean(one[text] for one in of) for text in of[0]} if len(of) > 1 else of[0]
        for method, of in together.items()
    }
