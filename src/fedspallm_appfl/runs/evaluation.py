"""Perplexity of the models of a run, and of any model folder, on held-out text."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedspallm_appfl.devices import choose_device, give_back
from fedspallm_appfl.errors import ConfigError, DataError
from fedspallm_appfl.events import OnEvent
from fedspallm_appfl.models.lazy_model import LazyModel, Skeleton
from fedspallm_appfl.models.perplexity import PrunedBlock, perplexities
from fedspallm_appfl.models.storage.checkpoint import resolve_model
from fedspallm_appfl.runs.processes import ALONE, Workers, result
from fedspallm_appfl.settings import custom_code, plugins
from fedspallm_appfl.settings.schema import Config, Paths
from fedspallm_appfl.texts.checks import check_vocabulary, held_out_windows
from fedspallm_appfl.texts.tokenizer import beginning_words, tokenizer_for
from fedspallm_appfl.texts.windows import Cut, windows_of
from fedspallm_appfl.validation.files import too_long

DEFAULT_LENGTH = 2048
Rows = Mapping[str, dict[str, float]]  # method -> text -> perplexity
DENSE: Mapping[str, PrunedBlock] = {"dense": lambda block: None}  # what every perplexity stands beside


def held_out(config: Config) -> dict[str, Tensor]:
    """The windows of each text of `evaluation`: name -> (n, length) int64 token ids.

    Cut before a run begins, so that hours of pruning do not end at a text that is not there.

    Raises:
        ConfigError: the model takes no windows so long, or the device is not there.
        DataError: a text cannot be read, is too short or does not go with the model.
    """
    settings = config.evaluation
    if not settings.texts:
        return {}
    skeleton = Skeleton.of(config)
    for problem in too_long("evaluation.length", settings.length, skeleton.longest_window):
        raise ConfigError(problem)
    try:
        choose_device(settings.device, 0)
    except ConfigError as error:
        raise ConfigError(f"evaluation.device: {error}") from error
    known = tokenizer_for(skeleton.folder, *settings.texts.values()), skeleton.vocabulary
    cut = Cut(settings.length, settings.bos, settings.field)
    return {name: held_out_windows(name, text, cut, settings.windows, *known) for name, text in settings.texts.items()}


def evaluate(
    config: Config,
    texts: Mapping[str, Tensor],
    methods: Mapping[str, PrunedBlock],
    log: OnEvent,
    known: Rows | None = None,
    among: Workers = ALONE,
) -> dict[str, dict[str, float]]:
    """Perplexity of each model on each text, all with the same settings: method -> text -> perplexity.

    Args:
        config: the experiment.
        texts: as `held_out` has cut them.
        methods: name -> the pruned blocks of a model.
        log: gets an event for each model that is measured.
        known: what was measured before.
        among: processes that share models and texts.
    """
    rows = dict(known or {})
    todo = {method: pruned for method, pruned in methods.items() if method not in rows}
    for number, (method, row) in enumerate(_measured(config, texts, todo, among), len(methods) - len(todo) + 1):
        rows[method] = row
        log({"event": "evaluation", "method": method, "of": [number, len(methods)], "perplexity": row})
    return {method: rows[method] for method in methods}


def _measured(
    config: Config, texts: Mapping[str, Tensor], methods: Mapping[str, PrunedBlock], among: Workers
) -> Iterator[tuple[str, dict[str, float]]]:
    """Each method with its perplexities, in their order."""
    if among.count == 1:
        lazy = LazyModel.of(config, choose_device(config.evaluation.device, 0))
        for method, pruned in methods.items():
            yield method, perplexities(lazy, texts, pruned, config.evaluation.batch)
        return
    shares = _shares(texts, -(-among.count // max(1, len(methods))))
    tasks = len(methods) * len(shares)
    futures = {
        method: [
            among.submit(tasks, _perplexities, config, share, pruned, (number * len(shares) + place) % among.count)
            for place, share in enumerate(shares)
        ]
        for number, (method, pruned) in enumerate(methods.items())
    }
    for method, parts in futures.items():
        row = {name: one for part in parts for name, one in result(part, f"the perplexity of {method}").items()}
        yield method, {name: row[name] for name in texts}


def _shares(texts: Mapping[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """Texts in so many parts of about the same size, or fewer."""
    parts: list[dict[str, Tensor]] = [{} for _ in range(min(count, len(texts)))]
    for name in sorted(texts, key=lambda name: -texts[name].numel()):
        min(parts, key=lambda part: sum(map(Tensor.numel, part.values())))[name] = texts[name]
    return parts


def _perplexities(config: Config, texts: Mapping[str, Tensor], pruned: PrunedBlock, place: int) -> dict[str, float]:
    """What a worker measures; where there are GPUs, on that of its place."""
    try:
        plugins.load(config.plugins)
        lazy = LazyModel.of(config, choose_device(config.evaluation.device, place))
        return perplexities(lazy, texts, pruned, config.evaluation.batch)
    finally:
        give_back()


@dataclass(frozen=True)
class Measured:
    """Perplexities and how they were measured.

    Attributes:
        perplexity: text -> perplexity.
        length: tokens in a window.
        windows: windows of all texts together.
        dtype: arithmetic.
        begin: how windows begin, in words; empty for texts that were tokenized already.
    """

    perplexity: dict[str, float]
    length: int
    windows: int
    dtype: str
    begin: str = ""

    def how(self) -> str:
        """How it was measured, in words."""
        begin = f"; {self.begin}" if self.begin else ""
        texts = f" of {len(self.perplexity)} texts together" if len(self.perplexity) > 1 else ""
        return f"{self.windows} windows{texts}, of {self.length} tokens, {self.dtype} arithmetic{begin}"


def evaluate_folder(
    folder: str,
    texts: Mapping[str, Paths],
    length: int | None = None,
    windows: int | None = None,
    batch: int = 8,
    dtype: str = "auto",
    device: str = "auto",
    blocks: str | None = None,
    trust_remote_code: bool = False,
    bos: str = "auto",
    field: str | None = None,
) -> Measured:
    """Perplexity of a model folder on texts.

    Args:
        folder: model folder or hub name.
        texts: name -> file, folder or list of these.
        length: tokens in a window; None for 2048, or what the model takes if that is less.
        windows: at most so many of each text; None for all.
        batch: windows in a forward pass.
        dtype: arithmetic; `auto` is as stored, but float32 for float16 on a CPU, which is slow at it.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        blocks: dotted name of the list of decoder blocks; None to search for it.
        trust_remote_code: run Python code that the model folder brings along.
        bos: `auto`, `first` or `never` (see `texts.windows.Cut`).
        field: column of records.

    Raises:
        DataError: a text cannot be read or is too short, or the length is not one for this model.
    """
    where = choose_device(device, 0)
    if trust_remote_code:
        custom_code.allow(resolve_model(folder, weights=False))
    if dtype == "auto" and where == "cpu" and Skeleton(folder, blocks).stored_dtype == torch.float16:
        dtype = "float32"
    lazy = LazyModel(folder, blocks, dtype, where)
    longest = lazy.skeleton.longest_window or math.inf
    length = length or int(min(longest, DEFAULT_LENGTH))
    if length > longest:
        raise DataError(f"length is at most {longest} for this model (max_position_embeddings), got {length}")
    if length < 2:
        raise DataError("length is at least 2, since the first token of a window is not predicted; got 1")
    tokenizer = tokenizer_for(lazy.skeleton.folder, *texts.values())
    how = Cut(length, bos, field)
    cut = {name: windows_of(text, how, tokenizer, windows) for name, text in texts.items()}
    for name, of in cut.items():
        check_vocabulary(of, lazy.skeleton.vocabulary, name)
    rows = perplexities(lazy, cut, batch=batch)
    begin = beginning_words(tokenizer, bos) if tokenizer is not None else ""
    return Measured(rows, length, sum(map(len, cut.values())), str(lazy.dtype).removeprefix("torch."), begin)
