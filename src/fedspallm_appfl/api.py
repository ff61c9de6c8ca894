"""The Python API: prune, run, validate, estimate and evaluate, as objects and exceptions (docs/python.md).

Nothing is printed, except the progress that is asked for. What cannot be run raises a `FedSpaLLMError` that states the
rule, the value and the fix.
"""

import difflib
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedspallm_appfl.errors import ConfigError, ModelError, first_line, quoted, refuse
from fedspallm_appfl.estimates import memory, over_globus, traffic
from fedspallm_appfl.estimates.duration import Durations, durations
from fedspallm_appfl.estimates.job import Job
from fedspallm_appfl.estimates.memory import Memory
from fedspallm_appfl.estimates.processes import settled
from fedspallm_appfl.estimates.traffic import RoundTraffic
from fedspallm_appfl.models.lazy_model import Skeleton
from fedspallm_appfl.models.storage.checkpoint import allow_code_of
from fedspallm_appfl.reports.progress import console
from fedspallm_appfl.reports.result import Result, Shown, no_bars
from fedspallm_appfl.runs import evaluation, experiment, run_dir, serial
from fedspallm_appfl.runs.evaluation import Measured
from fedspallm_appfl.runs.processes import Workers
from fedspallm_appfl.settings.reading import load_config as read_file
from fedspallm_appfl.settings.reading import read_config
from fedspallm_appfl.settings.rules import wrong_values
from fedspallm_appfl.settings.schema import (
    AggregatorKwargs,
    CommConfigs,
    Config,
    Data,
    Evaluation,
    Gram,
    Model,
    Paths,
    Prune,
    SchedulerKwargs,
    ServerConfigs,
    TrainConfigs,
    plain,
)
from fedspallm_appfl.texts.files import ENDINGS, HUB, TOKENS, are_tokens, endings
from fedspallm_appfl.validation import files as with_files
from fedspallm_appfl.validation import rules

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Text = str | Path | Sequence[str] | Sequence[Path] | Tensor
GUESSED = {"rounds": "num_global_epochs", "epochs": "num_global_epochs"}  # what people write for it
LONGEST_NAME = 255  # bytes that file systems allow
GROUPS: dict[str, type] = {  # where a setting is looked for by its own name, in this order
    "": Config,
    "client_configs.train_configs": TrainConfigs,
    "client_configs.data": Data,
    "client_configs.comm_configs": CommConfigs,
    "server_configs": ServerConfigs,
    "server_configs.aggregator_kwargs": AggregatorKwargs,
    "server_configs.scheduler_kwargs": SchedulerKwargs,
    "gram": Gram,
    "model": Model,
    "prune": Prune,
}


def prune(
    model: "str | Path | PreTrainedModel",
    clients: Mapping[str, Text],
    run_dir: str | Path,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    evaluate: Mapping[str, Text] | None = None,
    overwrite: bool = False,
    progress: bool = False,
    **settings: Any,
) -> Result:
    """Prune a model on the texts of several clients, in this process.

    Args:
        model: a folder, a hub name, or a loaded model, which is left as it is.
        clients: id -> its text: a file, a folder, a data set, a list of these, a list of strings that are texts
            themselves, or token ids, int (n,) or (windows, length).
        run_dir: folder for the results.
        tokenizer: of a loaded model, where there are texts to tokenize.
        evaluate: name -> held-out text, of the same kinds.
        overwrite: replace the results of an earlier run in the folder.
        progress: show what the command line shows while it runs.
        **settings: keys of a configuration (see `load_config`); `sparsity`, `algorithm` and `pruner` above all. `length` is
            2048, or less if the model takes less; `evaluation` takes windows of that length, on the clients' device.

    Returns:
        Perplexities, sparsities, and the folder of the pruned model.

    Raises:
        ConfigError: lists everything that keeps it from being run.
        FedSpaLLMError: it fails.
    """
    if taken := {"path", "text", "client_id"} & set(settings):
        raise ConfigError(f"{', '.join(sorted(taken))}: model and clients say that; leave it out")
    with tempfile.TemporaryDirectory(prefix="fedspallm-") as folder:
        place, raw = Path(folder), _nested(settings)
        raw["run_dir"] = str(run_dir)
        texts, held_out = _all_paths("clients", clients, place), _all_paths("evaluate", evaluate or {}, place)
        raw["clients"] = [{"client_id": name, "data": {"text": text}} for name, text in texts.items()]
        raw.setdefault("model", {})["path"] = _model_path(
            model, tokenizer, [*texts.values(), *held_out.values()], place
        )
        shared = raw.setdefault("client_configs", {})
        data, device = shared.setdefault("data", {}), shared.get("train_configs", {}).get("device", "auto")
        if "length" not in data:
            data["length"] = _usual_length(raw["model"], clients.values())
        usual = {"texts": held_out, "length": data["length"], "batch": 8, "device": device}
        usual |= {name: data[name] for name in ("bos", "field") if name in data}
        told = raw.get("evaluation") or {}
        raw["evaluation"] = usual | told if isinstance(told, dict) else told
        config, problems = read_config(raw)
        refuse("fs.prune", problems)
        return _run(config, "fs.prune", overwrite, progress)


def run(
    config: Config | str | Path, *, overwrite: bool = False, resume: bool = False, progress: bool = False
) -> Result:
    """Run an experiment in this process and write its results, as `fedspallm run` does.

    Args:
        config: the experiment, or its YAML file.
        overwrite: replace the results of an earlier run in its `run_dir`.
        resume: go on with a run there that was cut off, if there is one.
        progress: show what the command line shows while it runs.

    Raises:
        ConfigError: lists everything that keeps it from being run.
        FedSpaLLMError: it fails.
    """
    return _run(*_opened(config), overwrite, progress, resume)


def _run(config: Config, name: str, overwrite: bool, progress: bool, resume: bool = False) -> Result:
    refuse(name, problems_of(config, globus=False, files=True, overwrite=overwrite, resume=resume))
    config = settled(config)
    with Workers(int(config.workers)) as among:
        launch = partial(serial.run, among=among)
        if not progress:
            return experiment.conduct(config, launch, overwrite, resume=resume, among=among)[0]
        return experiment.run(config, launch, console(), overwrite, resume, among)


def load_config(file: str | Path, **settings: Any) -> Config:
    """Read a configuration.

    Args:
        file: a YAML file.
        **settings: values that replace those of the file: a key by its own name where that is clear (`seed=1`,
            `sparsity="2:4"`, `length=256`), or a group with its keys (`evaluation={"length": 256}`).

    Raises:
        ConfigError: the file cannot be read, or lists every unknown key and value of a wrong type. Whether the values can
            be run is for `validate` and `run` to say.
    """
    if not isinstance(file, str | Path):
        raise ConfigError(f"a configuration is read from a YAML file, got {type(file).__name__}")
    config, problems = read_file(Path(file), (), _nested(settings))
    refuse(file, problems)
    return config


def validate(config: Config | str | Path, *, files: bool = True) -> list[str]:
    """Everything that keeps an experiment from being run; nothing if it can be. Wrong keys and types are told first, alone.

    Args:
        config: the experiment, or its YAML file.
        files: open model and text as well.

    Raises:
        ConfigError: the file cannot be read as YAML.
    """
    if isinstance(config, str | Path):
        config, problems = read_file(Path(config))
    else:
        config, problems = read_config(plain(config) if isinstance(config, Config) else config)
    if problems:
        return problems
    return problems_of(config, config.over_globus(), files, overwrite=True)


def evaluate(
    model: str | Path, texts: Mapping[str, Text] | str | Path, *, length: int | None = None, **settings: Any
) -> Measured:
    """Perplexity of a model.

    Args:
        model: folder or hub name.
        texts: name -> held-out text, of the kinds that `prune` takes; or one file.
        length: tokens in a window; None for 2048, or what the model takes if that is less.
        **settings: `windows`, `batch`, `dtype`, `device`, `bos`, `field`, `blocks` and `trust_remote_code`, as
            `fedspallm evaluate` takes them.

    Raises:
        DataError: a text cannot be read or is too short, or the length is not one for this model.
        ModelError: the model cannot be read.
    """
    if not isinstance(model, str | Path):
        raise ConfigError(f"model is a folder or a hub name, got {type(model).__name__}")
    checked, others = ("windows", "batch", "device", "bos", "field"), ("dtype", "blocks", "trust_remote_code")
    known = (*checked, *others)
    if unknown := set(settings) - set(known):
        raise ConfigError(f"there is no setting {', '.join(sorted(unknown))}; valid here are {', '.join(known)}")
    asked = Evaluation(length=length or 2, **{name: settings[name] for name in settings if name in checked})
    refuse("fs.evaluate", list(wrong_values(asked, "", [])))
    named = {str(texts): texts} if isinstance(texts, str | Path) else texts
    with tempfile.TemporaryDirectory(prefix="fedspallm-") as folder:
        paths = _all_paths("texts", named, Path(folder))
        return evaluation.evaluate_folder(str(model), paths, length, **settings)


@dataclass(frozen=True, repr=False)
class Estimate(Shown):
    """What a run would send, how much memory it would take and how long (docs/configuration.md).

    Attributes:
        job: the experiment and the outline of its model.
    """

    job: Job

    @cached_property
    def traffic(self) -> list[RoundTraffic]:
        """Bytes that travel in each round."""
        return (over_globus if self.job.config.over_globus() else traffic).traffic(self.job)

    @cached_property
    def memory(self) -> dict[str, Memory]:
        """Client -> its memory; "server" -> that of the server."""
        clients = {client.client_id: memory.client_memory(self.job, client) for client in self.job.clients}
        return {**clients, "server": memory.server_memory(self.job)}

    @cached_property
    def durations(self) -> Durations:
        """Seconds of work, if it ran on this machine."""
        return durations(self.job)

    def __rich__(self) -> Any:
        """What the command line prints."""
        from fedspallm_appfl.estimates.tables import tables

        return tables(self.job)


def estimate(config: Config | str | Path) -> Estimate:
    """Estimate a run; opens the model, needs no text.

    Args:
        config: the experiment, or its YAML file.

    Raises:
        ConfigError: lists everything that keeps it from being run.
        ModelError: the model cannot be opened.
    """
    config, name = _opened(config)
    globus = config.over_globus()
    refuse(name, problems_of(config, globus, files=False, overwrite=True))
    return Estimate(Job.of(prepared(config, globus)))


def problems_of(config: Config, globus: bool, files: bool, overwrite: bool, resume: bool = False) -> list[str]:
    """Everything that keeps an experiment from being run.

    Args:
        config: well formed.
        globus: it is for a run over Globus Compute.
        files: open model and text as well.
        overwrite: earlier results may be replaced.
        resume: a run that was cut off may be gone on with.
    """
    problems = rules.check(config)
    config = prepared(config, globus)
    problems += rules.check_for_globus(config) if globus else rules.check_on_this_machine(config)
    problem = run_dir.problem(config, overwrite, resume) if config.run_dir else None
    problems += [problem] if problem else []
    if files:
        problems += with_files.check_with_files(config)
    if globus and files and not problems:
        problems += over_globus.check_sizes(config)
    if files and not problems and config.run_dir and not resume:
        problem = traffic.lack_of_room(Job.of(config))
        problems += [problem] if problem else []
    return problems


def prepared(config: Config, globus: bool) -> Config:
    """The configuration as it is run."""
    return rules.prepared_for_globus(config) if globus else config


def _opened(config: Config | str | Path) -> tuple[Config, str]:
    """The configuration, and what messages call it.

    Raises:
        ConfigError: it is none, or holds values of wrong types.
    """
    if isinstance(config, str | Path):
        return load_config(config), str(config)
    if not isinstance(config, Config):
        raise ConfigError(f"a configuration is a Config or the path of a YAML file, got {type(config).__name__}")
    made, problems = read_config(plain(config))  # its values may have been set by hand
    refuse("the configuration", problems)
    return made, "the configuration"


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by their own names, as a configuration has them.

    Raises:
        ConfigError: there is no setting of a name; names the nearest one.
    """
    raw: dict[str, Any] = {}
    for name, value in plain(settings).items():
        path = next((path for path, kind in GROUPS.items() if name in _names(kind)), None)
        if path is None:
            known = sorted({one for kind in GROUPS.values() for one in _names(kind)})
            near = [GUESSED[name]] if name in GUESSED else difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "docs/configuration.md has all of them"
            raise ConfigError(f"there is no setting {quoted(name)}; {hint}")
        for group in (path, "server_configs") if name == "device" else (path,):  # a device for all
            _merge(raw, [*filter(None, group.split(".")), name], value)
    return raw


def _names(kind: type) -> set[str]:
    return {one.name for one in fields(kind)}


def _merge(raw: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Set a value, or merge a group of them.

    Raises:
        ConfigError: what holds the key is no group.
    """
    *groups, last = path
    for group in groups:
        raw = raw.setdefault(group, {})
        if not isinstance(raw, dict):
            raise ConfigError(f"{group}: expected keys and values, got {quoted(raw)}")
    if isinstance(value, Mapping) and value:
        for name, one in value.items():
            _merge(raw, [last, str(name)], one)
    else:
        raw[last] = value


def _model_path(model: Any, tokenizer: Any, texts: Sequence[Paths], folder: Path) -> str:
    """Where the model lies; one in memory is saved first, with the tokenizer that the texts need.

    Raises:
        ConfigError: it is no model, or there is no tokenizer.
        ModelError: its weights are not there, or quantized.
    """
    if isinstance(model, str | Path):
        return str(model)
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ConfigError(f"model is a folder, a hub name or a loaded PreTrainedModel, got {type(model).__name__}")
    if any(one.device.type == "meta" for one in model.parameters()):
        raise ModelError(
            "model: some of its weights are on the meta device, so that there is nothing to prune; load them"
        )
    if getattr(model.config, "quantization_config", None) is not None:
        raise ModelError(
            "model: it is quantized, and what is left would be rounded again; load it in float16 or bfloat16"
        )
    if tokenizer is None and not all(map(are_tokens, texts)):
        raise ConfigError(
            "tokenizer: a loaded model comes with its tokenizer, as there are texts to tokenize; got None"
        )
    place = folder / "model"
    try:
        with no_bars():
            for part in (model, tokenizer):
                if part is not None:
                    part.save_pretrained(place)
    except (RuntimeError, ValueError, OSError, AttributeError) as error:
        raise ModelError(f"model: it cannot be saved to a temporary folder: {first_line(error)}") from error
    return str(place)


def _usual_length(model: Mapping[str, Any], texts: Iterable[Any]) -> int:
    """Tokens in a window where nobody says so: those of windows that are given, or 2048, or what the model takes."""
    given = [one.shape[1] for one in texts if isinstance(one, Tensor) and one.dim() == 2]
    if given:
        return int(given[0])
    try:
        allow_code_of(Model(path=model["path"], trust_remote_code=model.get("trust_remote_code") is True))
        longest = Skeleton(model["path"], model.get("blocks")).longest_window
    except ModelError:  # said where everything is checked
        longest = None
    return min(longest or evaluation.DEFAULT_LENGTH, evaluation.DEFAULT_LENGTH)


def _all_paths(argument: str, texts: Any, folder: Path) -> dict[str, Paths]:
    """Name -> where its text lies.

    Raises:
        ConfigError: these are no texts with names.
    """
    if not isinstance(texts, Mapping):
        raise ConfigError(f"{argument} is a dict of names and texts, got {type(texts).__name__}")
    if len(set(map(str, texts))) < len(texts):
        raise ConfigError(f"{argument}: names are texts and differ, got {list(texts)}")
    return {str(name): _paths(f"{argument}[{quoted(name)}]", text, folder) for name, text in texts.items()}


def _paths(where: str, text: Any, folder: Path) -> Paths:
    """Where a text lies; one in memory is written to a folder of this process first.

    Raises:
        ConfigError: it is no text.
    """
    if isinstance(text, str | Path):
        return str(text)
    if isinstance(text, Tensor):
        return _written_tokens(where, text, folder)
    if not isinstance(text, Sequence) or not text or not all(isinstance(one, str | Path) for one in text):
        raise ConfigError(
            f"{where} is a file, a folder, a list of files, a list of texts, or a tensor of token ids; got "
            f"{'an empty ' if isinstance(text, Sequence) and not text else ''}{type(text).__name__}"
        )
    files = [_is_file(one) for one in text]
    if all(files):
        return [str(one) for one in text]
    if any(files):
        one = text[files.index(True)]
        raise ConfigError(
            f"{where} is a list of files or a list of texts; {quoted(str(one))} looks like a file, others do not"
        )
    file = folder / f"{_count(folder)}.txt"
    file.write_text("\n".join(text), "utf-8")
    return str(file)


def _is_file(one: str | Path) -> bool:
    """Whether an item of a list names a file, be it there or not; texts have spaces."""
    if isinstance(one, Path):
        return True
    if not one or "\n" in one or len(one.encode()) > LONGEST_NAME:
        return False
    return one.startswith(HUB) or endings(one)[0] in (*ENDINGS, TOKENS) or Path(one).exists()


def _written_tokens(where: str, tokens: Tensor, folder: Path) -> str:
    whole = not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)
    there = tokens.layout == torch.strided and tokens.device.type != "meta"
    if not whole or not there or tokens.dim() not in (1, 2):
        raise ConfigError(
            f"{where}: token ids are whole numbers, (n,) or (windows, length); got {tokens.dtype} {list(tokens.shape)}"
        )
    from safetensors.torch import save_file

    file = folder / f"{_count(folder)}.safetensors"
    save_file({"tokens": tokens.long().cpu().contiguous()}, file)
    return str(file)


def _count(folder: Path) -> int:
    return len(list(folder.iterdir()))
