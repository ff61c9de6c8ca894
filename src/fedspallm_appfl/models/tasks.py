"""Accuracy of model folders on tasks of the library lm-eval, all of them on the same questions.

Only here is lm-eval named. It runs the whole model in memory, as `transformers` loads it.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from fedspallm_appfl.devices import choose_device
from fedspallm_appfl.errors import ConfigError, DataError, extra, first_line, quoted, shortened
from fedspallm_appfl.models.storage.checkpoint import DTYPES, CheckpointFiles, resolve_model
from fedspallm_appfl.models.storage.packing import load_packed
from fedspallm_appfl.settings import custom_code
from fedspallm_appfl.texts.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Score:
    """What one model reached in one metric of a task.

    Attributes:
        task: name of the task, or of a group of tasks.
        metric: as lm-eval calls it, e.g. `acc`; with the filter of answers behind a comma if there is one.
        value: mean over the questions.
        error: standard error of the mean; None where lm-eval has none.
        questions: how many were asked; None for a group.
    """

    task: str
    metric: str
    value: float
    error: float | None
    questions: int | None

    def to_dict(self) -> dict[str, Any]:
        """Its entry in JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.value:.4f}" + ("" if self.error is None else f" ± {self.error:.4f}")


def score(
    models: Sequence[str],
    tasks: Sequence[str],
    folder: str | None = None,
    limit: int | None = None,
    batch: int = 8,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, list[Score]]:
    """Ask models the questions of some tasks.

    Args:
        models: folders, dense or packed, or hub names.
        tasks: names that lm-eval knows, or that files in `folder` declare.
        folder: with YAML files of further tasks; tasks that are all there need no network.
        limit: at most so many questions of each task, the first ones.
        batch: questions in a forward pass.
        dtype: arithmetic; `auto` is as stored, but float32 for float16 on a CPU.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        trust_remote_code: run Python code that a model folder brings along.

    Returns:
        Model -> its scores, task by task.

    Raises:
        ConfigError: lm-eval is not installed, or the device is not there.
        DataError: there is no such task, or its questions cannot be read or fetched.
        ModelError: a folder is no model.
    """
    where = choose_device(device, 0)
    sources = {model: resolve_model(model, key="MODEL") for model in models}
    lm_eval, wrapper = _library()
    manager, questions = _questions(tasks, folder)
    found = {}
    for model, source in sources.items():
        if trust_remote_code:
            custom_code.allow(source)
        loaded = wrapper(pretrained=_load(source, dtype, where), tokenizer=load_tokenizer(source), batch_size=batch)
        results = lm_eval.simple_evaluate(
            model=loaded, tasks=questions, task_manager=manager, limit=limit, log_samples=False
        )
        found[model] = _scores(results)
    return found


def _library() -> tuple[Any, Any]:
    """lm-eval, and its class for models of transformers.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ConfigError(f"--tasks needs the package lm-eval ({first_line(error)}); {extra('tasks')}") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what is meant here
    return lm_eval, HFLM


def _questions(tasks: Sequence[str], folder: str | None) -> tuple[Any, list[Any]]:
    """The tasks with their questions, read once for all models.

    Raises:
        DataError: names the task that cannot be had.
    """
    from lm_eval.tasks import TaskManager

    if folder is not None and not Path(folder).is_dir():
        raise DataError(f"--task-folder {quoted(folder)} is no folder; name one with YAML files of tasks")
    manager = None if folder is None else TaskManager(include_path=folder, include_defaults=False)
    if manager is None or not set(tasks) <= set(manager.all_tasks):  # going through those of lm-eval takes seconds
        manager = TaskManager(include_path=folder)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise DataError(
            f"task {quoted(unknown[0])} is none that lm-eval knows"
            + (f", nor in {folder}" if folder else "; --task-folder names a folder with YAML files of your own")
        )
    return manager, [part for task in tasks for part in _loaded(manager, task)]


def _loaded(manager: Any, task: str) -> list[Any]:
    try:
        found = manager.load(task)
    except Exception as error:  # a task is a file of others, with code and data of its own
        unreachable = isinstance(error, OSError)
        advice = (
            "; its data come from the hub: fetch them where it can be reached (HF_HOME says where they are kept), or name "
            "a local task with --task-folder"
        )
        raise DataError(
            f"the questions of task {quoted(task)} cannot be had: {type(error).__name__}: {shortened(first_line(error))}"
            f"{advice if unreachable else ''}"
        ) from error
    return [found["groups"][task]] if task in found["groups"] else list(found["tasks"].values())


def _load(source: Path, dtype: str, device: str) -> PreTrainedModel:
    kind = {} if dtype == "auto" else {"dtype": DTYPES[dtype]}
    if CheckpointFiles(source).packed:
        model = load_packed(source, **kind)
    else:
        model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=custom_code.allowed(source), **kind)
    if dtype == "auto" and device == "cpu" and model.dtype == torch.float16:
        model = model.float()  # a CPU is slow at float16
    return model.to(device).eval()  # type: ignore[arg-type]


def _scores(results: dict[str, Any]) -> list[Score]:
    """lm-eval has `metric,filter` -> value and `metric_stderr,filter` -> standard error, or words."""
    scores = []
    for task, row in results["results"].items():
        asked = results["n-samples"].get(task, {}).get("effective")
        for key, value in row.items():
            metric, _, kept = key.partition(",")
            if not kept or metric.endswith("_stderr") or not isinstance(value, float | int):
                continue
            error = row.get(f"{metric}_stderr,{kept}")
            name = metric if kept == "none" else key
            scores.append(Score(task, name, float(value), error if isinstance(error, float) else None, asked))
    return scores
