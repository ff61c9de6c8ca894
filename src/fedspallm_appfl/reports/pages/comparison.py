"""Finished runs side by side, as a page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os.path import commonpath
from pathlib import Path
from typing import Any

from fedspallm_appfl.reports import finished
from fedspallm_appfl.reports.own_text import ALL, TITLE, OwnText, own_texts
from fedspallm_appfl.reports.pages.page import document, figure
from fedspallm_appfl.reports.pages.pictures import Bar, bars
from fedspallm_appfl.reports.parts import Table, bytes_text, html
from fedspallm_appfl.reports.report import traffic
from fedspallm_appfl.reports.result import Result, count, mean
from fedspallm_appfl.settings.schema import Config, plain
from fedspallm_appfl.settings.yaml_text import flat
from fedspallm_appfl.tensors.target import NM
from fedspallm_appfl.validation.words import how
from fedspallm_appfl.wire.durable import write_text

MEASURED = ("length", "windows", "bos", "field")  # settings of `evaluation` on which a perplexity depends
NOTHING = "No text was measured by all of these runs, so perplexities are not compared."
WITHIN = ("run_dir", "clients.", "workers")  # keys that differ without a word being said


@dataclass(frozen=True)
class Run:
    """What is shown of one run.

    Attributes:
        config: its configuration.
        results: what it has shown.
        own: client -> what it has measured on its own text.
        up: bytes of tensors that its clients have sent.
        seconds: of work.
    """

    config: Config
    results: Result
    own: Mapping[str, OwnText]
    up: int
    seconds: float

    @property
    def perplexity(self) -> Mapping[str, float]:
        """That of its own model on each text; empty if none was measured."""
        return list(self.results.perplexity.values())[-1] if self.results.perplexity else {}


def write_comparison(file: Path, folders: Sequence[Path]) -> tuple[Table, list[str]]:
    """Write a page that puts runs side by side.

    Returns:
        Its first table, what each run has come to; and a word where perplexities do not compare or are not there.

    Raises:
        ConfigError: a folder holds no run that has ended.
        ModelError: a file of a run is damaged, or there is no room.
    """
    runs = dict(zip(_names(folders), map(_opened, folders), strict=True))
    texts = _in_all([run.perplexity for run in runs.values()])
    clients = _in_all([run.own for run in runs.values()])
    summary = _summary(runs, texts, clients)
    unlike = _measured_unlike(runs, texts) if texts else []
    own_unlike = _own_unlike(runs, clients) if clients else []
    nothing = [] if texts or clients else [NOTHING]
    own: list[str | Table] = [f"## {TITLE}", *own_unlike, _own_texts(runs, clients)] if clients else [*nothing]
    body = [
        html(summary),
        *(_perplexity(runs, texts, unlike) if texts else []),
        *map(html, own),
        _one_each("Bytes of tensors up, by run.", {name: (run.up, bytes_text(run.up)) for name, run in runs.items()}),
        _one_each(
            "Seconds of work, by run.", {name: (run.seconds, f"{run.seconds:.0f} s") for name, run in runs.items()}
        ),
        *map(html, _differences(runs)),
    ]
    write_text(file, document(f"{count(len(runs), 'run')} side by side", body))
    return summary, unlike + own_unlike + nothing


def _opened(folder: Path) -> Run:
    config, results, log = finished.opened(folder)
    return Run(config, results, own_texts(log), sum(traffic(log)[0].values()), log.seconds)


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders without what all of them begin with."""
    whole = [str(folder.absolute()) for folder in folders]
    common = commonpath([str(Path(path).parent) for path in whole])
    return [str(Path(path).relative_to(common)) for path in whole]


def _in_all(measured: Sequence[Mapping[str, Any]]) -> list[str]:
    """What all runs have measured, in the order of the first."""
    return [name for name in measured[0] if all(name in of for of in measured)]


def _summary(runs: Mapping[str, Run], texts: Sequence[str], clients: Sequence[str]) -> Table:
    rows, own = [], ALL in clients
    for name, run in runs.items():
        row = {text: run.perplexity[text] for text in texts}
        numbers = [mean(row), *row.values()] if row else []
        numbers += [run.own[ALL].dense, run.own[ALL].pruned] if own else []
        costs = [f"{run.up:,}", f"{run.seconds:.0f}"]
        rows.append([name, how(run.config), _sparsity(run), *costs, *(f"{value:.3f}" for value in numbers)])
    shown = ["geometric mean", *texts] if texts else []
    shown += ["clients' own text, dense", "clients' own text"] if own else []
    return Table(["run", "how", "sparsity", "bytes up", "seconds", *shown], rows)


def _sparsity(run: Run) -> str:
    """The share of zeros, after a pattern that it follows."""
    target, share = run.config.client_configs.train_configs.sparsity.default, f"{run.results.sparsity:.4f}"
    return f"{target} ({share})" if isinstance(target, NM) else share


def _perplexity(runs: Mapping[str, Run], texts: Sequence[str], unlike: Sequence[str]) -> list[str]:
    """Bars by text, after the word that they do not compare if they do not."""
    groups = {
        text: [Bar(name, run.perplexity[text], f"{run.perplexity[text]:.2f}", "own") for name, run in runs.items()]
        for text in texts
    }
    for text in texts:
        rows = {name: run.results.perplexity.get("dense", {}) for name, run in runs.items()}
        found = {f"dense, {name}": row[text] for name, row in rows.items() if text in row}
        if len(set(found.values())) == 1:
            found = {"dense": next(iter(found.values()))}
        groups[text] = [Bar(name, value, f"{value:.2f}", "dense") for name, value in found.items()] + groups[text]
    caption = "Perplexity by text, less is better. Each text has a scale of its own, from 0."
    return [html("## Perplexity"), *map(html, unlike), figure(bars(groups, caption), caption)]


def _measured_unlike(runs: Mapping[str, Run], texts: Sequence[str]) -> list[str]:
    ways = []
    for run in runs.values():
        settings, model = run.config.evaluation, run.config.model
        way = {f"evaluation.{key}": getattr(settings, key) for key in MEASURED}
        way |= {f"evaluation.texts.{text}": settings.texts.get(text) for text in texts}
        ways.append({"model.path": model.path, "model.dtype": model.dtype} | way)
    return _differently(ways)


def _differently(ways: Sequence[Mapping[str, Any]]) -> list[str]:
    """That runs have measured in different ways, and in what these differ; nothing where they are alike."""
    unlike = [key for key in ways[0] if len({repr(way[key]) for way in ways}) > 1]
    if not unlike:
        return []
    return [f"**These runs measured differently** ({', '.join(unlike)}), so perplexities do not compare."]


def _own_unlike(runs: Mapping[str, Run], clients: Sequence[str]) -> list[str]:
    ways = [
        {
            "model.path": run.config.model.path,
            "evaluation.length": run.config.evaluation.length,
            "tokens of clients": [run.own[one].tokens for one in clients],
        }
        for run in runs.values()
    ]
    return _differently(ways)


def _own_texts(runs: Mapping[str, Run], clients: Sequence[str]) -> Table:
    """What clients have measured on their own text."""
    head = ["client", *(f"{name}, {which}" for name in runs for which in ("dense", "pruned"))]
    rows = [
        [
            client,
            *(f"{value:.3f}" for run in runs.values() for value in (run.own[client].dense, run.own[client].pruned)),
        ]
        for client in clients
    ]
    return Table(head, rows)


def _one_each(caption: str, values: Mapping[str, tuple[float, str]]) -> str:
    return figure(bars({"": [Bar(name, *of, "own") for name, of in values.items()]}, caption), caption)


def _differences(runs: Mapping[str, Run]) -> list[str | Table]:
    """Keys of the configurations that are not the same in all runs; those of single clients are left out."""
    settings = [_settings(run.config) for run in runs.values()]
    keys = dict.fromkeys(key for one in settings for key in one)
    rows = [
        [key, *("-" if one.get(key) is None else str(one[key]) for one in settings)]
        for key in keys
        if not key.startswith(WITHIN) and len({repr(one.get(key)) for one in settings}) > 1
    ]
    return ["## Settings that differ", Table(["key", *runs], rows) if rows else "None."]


def _settings(config: Config) -> dict[str, Any]:
    return flat(plain(config)) | {"clients": ", ".join(client.client_id for client in config.clients)}
