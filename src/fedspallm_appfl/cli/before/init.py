"""`fedspallm init`: five questions, and an experiment of one's own that is ready to run."""

import argparse
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from fedspallm_appfl.cli.arguments import command
from fedspallm_appfl.cli.checked import checked, console, introduce
from fedspallm_appfl.errors import ConfigError, DataError, FedSpaLLMError
from fedspallm_appfl.settings import yaml_text
from fedspallm_appfl.settings.imports import importing
from fedspallm_appfl.settings.presets import PRESETS
from fedspallm_appfl.tensors.targets import parse_sparsity
from fedspallm_appfl.texts.files import ENDINGS, TOKENS, endings, text_files

WINDOWS, LENGTH = 128, 2048  # of calibration, where texts and model have as many
FEW, SHORT = 32, 128  # where texts are short windows are, down to SHORT tokens, until there are FEW
OWN = 8  # windows that each client keeps to measure on
SURE = 0.9  # of the windows of a large text, which are estimated
PLAIN = re.compile(r"[\w./-]+", re.ASCII)  # paths that may stand within `${here:...}`
UNFIT = re.compile(r"[^\w.-]+", re.ASCII)  # what ids of clients do not have


@dataclass(frozen=True)
class Question:
    """What is asked for, unless an option has answered it.

    Attributes:
        option: that answers it.
        words: the question.
        otherwise: the answer if nothing is typed; None if there has to be one.
        about: help of the option.
        several: the answer is a list of words.
        check: raises a ConfigError for an answer that cannot be.
    """

    option: str
    words: str
    otherwise: str | None
    about: str
    several: bool = False
    check: Callable[[Any], object] = lambda answer: None


def add(verbs: Any) -> None:
    """Declare the verb."""
    parser = command(
        verbs,
        "init",
        "Ask five questions and write the configuration of an experiment; options answer them beforehand.",
        "fedspallm init mine.yaml",
        "fedspallm init mine.yaml --model examples/demo/model --sparsity 0.6 "
        "--clients austen=examples/demo/text/austen/calib.txt bible=examples/demo/text/bible/calib.txt",
    )
    parser.add_argument("file", metavar="FILE.yaml", type=Path, help="is written; must not be there")
    for one in QUESTIONS:
        parser.add_argument(f"--{one.option}", nargs="+" if one.several else None, help=one.about)
    parser.set_defaults(work=work)


def work(args: argparse.Namespace) -> int:
    """Do it."""
    if args.file.exists():
        raise ConfigError(f"{args.file} is there already; choose another name, or remove it")
    answers = {one.option: _answer(one, getattr(args, one.option)) for one in QUESTIONS}
    made, shown = experiment(args.file, answers), console()
    text = _written(args.file, made.config)
    try:
        args.file.parent.mkdir(parents=True, exist_ok=True)
        args.file.write_text(text, "utf-8")
    except OSError as error:
        raise ConfigError(f"{args.file} cannot be written: {error}; name another file") from error
    try:
        config = checked(str(args.file), (), files=True, overwrite=True)
    except BaseException:
        args.file.unlink()
        raise
    introduce(config, shown)
    for line in (*made.notes, f"wrote {args.file}; what it takes, and the run:"):
        shown.print(line, highlight=False, markup=False)
    shown.print(f"  fedspallm estimate {args.file}\n  fedspallm run {args.file}", highlight=False, markup=False)
    return 0


def _answer(question: Question, given: Any) -> Any:
    """What an option says, or what is typed.

    Raises:
        ConfigError: neither is there.
    """
    if given is not None:
        return given
    if not sys.stdin.isatty():
        if question.otherwise is None:
            raise ConfigError(f"init: --{question.option} is missing, and nobody can be asked; give {question.about}")
        return question.otherwise.split() if question.several else question.otherwise
    default = f" [{question.otherwise}]" if question.otherwise else ""
    shown = console()
    shown.soft_wrap = True  # a question that is folded loses the space before the answer
    while True:
        try:
            typed = shown.input(f"{question.words}{default}: ", markup=False).strip() or question.otherwise
        except EOFError as error:
            raise ConfigError(f"init: no answer for --{question.option}; nothing was written") from error
        if typed is None:
            continue
        answer = typed.split() if question.several else typed
        try:
            question.check(answer)
        except FedSpaLLMError as error:
            console().print(f"{error}", highlight=False, markup=False)
        else:
            return answer


@dataclass(frozen=True)
class Made:
    """What the answers give.

    Attributes:
        config: as plain keys and values.
        notes: lines for people: who the clients are, and what their texts mean for all.
    """

    config: dict[str, Any]
    notes: list[str]


def experiment(file: Path, answers: dict[str, Any]) -> Made:
    """The configuration that the answers give.

    Args:
        file: where it will be.
        answers: to all questions.

    Raises:
        ConfigError: clients, texts or the target cannot be made out.
    """
    _target(answers["sparsity"])
    told = _path_teller(file)
    (clients, left), texts = _found(answers["clients"]), _named(answers["evaluate"], "evaluate")
    skeleton, tokenizer = _opened(answers["model"])
    calibration, shortest = _windows(skeleton, tokenizer, clients, 0 if texts else OWN)
    notes = [f"client {name}: {path}" for name, path in clients.items()]
    notes += [f"not text, left out: {', '.join(left)}"] if left else []
    if calibration["windows"] < WINDOWS:
        notes.append(
            f"client {shortest} has the shortest text, {calibration['windows']} windows of {calibration['length']} tokens "
            "for pruning, and all take as many: more text gives a better model"
        )
    measured: dict[str, Any] = {"length": calibration["length"]}
    if texts:
        measured["texts"] = {name: told(path) for name, path in texts.items()}
    config = {
        "run_dir": f"runs/{file.stem}",
        "preset": answers["preset"],
        "model": {"path": told(answers["model"])} | _arithmetic(skeleton),
        "client_configs": {"train_configs": {"sparsity": yaml_text.load(answers["sparsity"])}, "data": calibration},
        "clients": [{"client_id": name, "data": {"text": told(path)}} for name, path in clients.items()],
        "evaluation": measured,
    }
    return Made(config, notes)


def _target(answer: str) -> None:
    try:
        parse_sparsity(answer)
    except ValueError as error:
        raise ConfigError(f"sparsity: {error}") from error


def _preset(answer: str) -> None:
    if answer not in PRESETS:
        raise ConfigError(f"preset: one of {', '.join(PRESETS)}, got {answer}")


def _readable(answer: list[str]) -> None:
    """Refuse clients, or texts of them, that cannot be read."""
    with importing("transformers"):
        from fedspallm_appfl.texts.checks import look_at
    for path in _found(answer)[0].values():
        look_at(path, None)


def _found(answer: list[str]) -> tuple[dict[str, str], list[str]]:
    """Client -> its text, and what in their folder is none."""
    if len(answer) != 1 or "=" in answer[0]:
        return _named(answer, "clients"), []
    folder = Path(answer[0]).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"clients: {folder} is not a folder; name each client's text as NAME=PATH, or give a folder")
    try:
        every = [one for one in sorted(folder.iterdir()) if not one.name.startswith(".")]
    except OSError as error:
        raise ConfigError(f"clients: the folder {folder} cannot be read: {error.strerror}") from error
    found = [one for one in every if _is_text(one)]
    names = [UNFIT.sub("-", one.name.partition(".")[0] if one.is_file() else one.name).strip("-.") for one in found]
    if len(set(names)) < len(found) or not found:
        raise ConfigError(
            f"clients: {folder} has to hold a file or folder for each client, with different names, got "
            f"{', '.join(one.name for one in every) or 'nothing'}; name them as NAME=PATH"
        )
    left = [one.name for one in every if one not in found]
    return {name: str(one) for name, one in zip(names, found, strict=True)}, left


def _is_text(path: Path) -> bool:
    """Whether a file, or something in a folder, ends as texts do."""
    if path.is_file():
        return endings(path.name)[0] in (*ENDINGS, TOKENS)
    try:
        return bool(text_files(str(path)).files)
    except DataError:
        return False


def _named(answer: list[str], option: str) -> dict[str, str]:
    """Name -> path."""
    pairs = [word.partition("=") for word in answer]
    wrong = [word for word, (name, _, path) in zip(answer, pairs, strict=True) if not (name and path)]
    names = [name for name, _, _ in pairs]
    if wrong or len(set(names)) < len(names):
        raise ConfigError(f"{option}: expected NAME=PATH for each, with different names, got {' '.join(answer)}")
    return {name: path for name, _, path in pairs}


def _path_teller(file: Path) -> Callable[[str], str]:
    """How a path is written: relative to the file where that is possible; names on the hub and of data sets as they are."""

    def told(path: str) -> str:
        there = Path(path).expanduser()
        if not there.exists():
            return path
        relative = os.path.relpath(there, file.parent)
        if "${" in str(there.resolve()):
            raise ConfigError(f"init: the path {path} holds ${{, which configurations take for a reference; rename it")
        return f"${{here:{relative}}}" if PLAIN.fullmatch(relative) else str(there.resolve())

    return told


def _opened(model: str) -> tuple[Any, Any]:
    """The model without its weights, and its tokenizer."""
    with importing("transformers"):
        from fedspallm_appfl.models.lazy_model import without_weights
        from fedspallm_appfl.models.storage.checkpoint import resolve_model
        from fedspallm_appfl.texts.tokenizer import load_tokenizer
    folder = resolve_model(model, weights=False, key="--model")
    return without_weights(folder, "auto"), load_tokenizer(folder)


def _arithmetic(skeleton: Any) -> dict[str, str]:
    """The key `dtype` where this machine has no GPU and is slow in the model's own arithmetic."""
    import torch

    from fedspallm_appfl.devices import is_slow

    return {"dtype": "float32"} if not torch.cuda.device_count() and is_slow(skeleton.dtype) else {}


def _windows(skeleton: Any, tokenizer: Any, texts: dict[str, str], own: int) -> tuple[dict[str, int], str]:
    """How many windows of how many tokens every client has, and the client with the shortest text."""
    from fedspallm_appfl.models.lazy_model import longest_window
    from fedspallm_appfl.texts.windows import Cut, about_how_many

    length = min(LENGTH, longest_window(skeleton) or LENGTH)
    while True:
        least, client = min((about_how_many(text, Cut(length), tokenizer), name) for name, text in texts.items())
        windows = min(WINDOWS, int(SURE * least) - own)
        if windows >= FEW or length // 2 < SHORT:
            return {"windows": max(1, windows), "length": length}, client
        length //= 2


def _written(file: Path, made: dict[str, Any]) -> str:
    count = f"{len(made['clients'])} client{'s' * (len(made['clients']) > 1)}"
    heading = f"# {count}. All keys: docs/configuration.md\n#\n# Launch     fedspallm run {file}\n"
    parts = [yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True) for key, value in made.items()]
    return "\n".join([heading, *parts])


QUESTIONS = (
    Question("model", "Model, a folder or a name on the hub", None, "a folder, or a name on the hub", check=_opened),
    Question(
        "clients",
        "Texts of the clients, NAME=PATH for each, or a folder with one file or folder for each",
        None,
        "NAME=PATH for each client, or a folder with one file or folder for each",
        several=True,
        check=_readable,
    ),
    Question(
        "sparsity",
        "Share of weights to prune, or a pattern such as 2:4",
        "0.5",
        "a ratio, or n:m (0.5)",
        check=_target,
    ),
    Question(
        "preset",
        "Preset: paper (as published), fast (in seconds), best (lowest perplexity)",
        "paper",
        f"{', '.join(PRESETS)} (paper)",
        check=_preset,
    ),
    Question(
        "evaluate",
        "Held-out texts, NAME=PATH for each; empty: each client measures on its own text",
        "",
        "held-out texts, NAME=PATH for each; without it each client measures on its own text",
        several=True,
        check=partial(_named, option="evaluate"),
    ),
)
