"""`fedspallm evaluate`."""

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from fedspallm_appfl.cli.arguments import command, positive
from fedspallm_appfl.cli.checked import console
from fedspallm_appfl.errors import ConfigError
from fedspallm_appfl.settings.imports import importing
from fedspallm_appfl.settings.schema import BOSES, DTYPES

if TYPE_CHECKING:
    from fedspallm_appfl.models.tasks import Score
    from fedspallm_appfl.reports.terminal import ConsoleTable
    from fedspallm_appfl.runs.evaluation import Measured


def add(verbs: Any) -> None:
    """Declare the verb."""
    parser = command(
        verbs,
        "evaluate",
        "Print the perplexity of a model folder on texts, and its accuracy on tasks of lm-eval.",
        "fedspallm evaluate runs/demo/model --text examples/demo/text/austen/test.txt --length 256",
        "fedspallm evaluate runs/demo/model --against examples/demo/model --tasks hellaswag,piqa --limit 200",
    )
    parser.add_argument("model", help="model folder, dense or packed, run_dir of a finished run, or hub name")
    parser.add_argument("--against", metavar="MODEL", help="another model, shown first: the dense one")
    parser.add_argument(
        "--text",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="held-out texts, a row each; or wikitext2, ptb, c4",
    )
    parser.add_argument(
        "--length", type=positive, default=None, help="tokens in a window (default: 2048, or what the model takes)"
    )
    parser.add_argument(
        "--windows", type=positive, default=None, help="at most so many windows of each text (default: all)"
    )
    parser.add_argument("--tasks", metavar="NAME,...", help="tasks of lm-eval, which is an extra")
    parser.add_argument("--task-folder", metavar="FOLDER", help="YAML files of tasks of your own")
    parser.add_argument(
        "--limit", type=positive, default=None, help="at most so many questions of each task (default: all)"
    )
    parser.add_argument("--batch", type=positive, default=8, help="windows or questions in a forward pass (default: 8)")
    parser.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="arithmetic (default: as stored, but float32 for float16 on a CPU)",
    )
    parser.add_argument(
        "--blocks", metavar="NAME", help="dotted name of the list of decoder blocks (default: a search)"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that the model folder brings along"
    )
    parser.add_argument(
        "--bos",
        choices=BOSES,
        default="auto",
        help="begin-of-sequence: of each window as the tokenizer begins a text (auto, default), of the first, or never",
    )
    parser.add_argument("--field", help="column of records that holds the text")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    parser.add_argument("--json", action="store_true", help="everything, as JSON")
    parser.set_defaults(work=work)


def work(args: argparse.Namespace) -> int:
    """Do it."""
    if not args.text and not args.tasks:
        raise ConfigError("evaluate takes --text, --tasks or both; got neither")
    models = [model for model in (args.against, args.model) if model is not None]
    measured = _perplexities(args, models) if args.text else {}
    scores = _scores(args, models) if args.tasks else {}
    if args.json:
        sys.stdout.write(f"{json.dumps([_as_json(model, measured, scores) for model in models], indent=1)}\n")
        return 0
    shown = console()
    if measured:
        shown.print(_of_texts(models, measured))
        shown.print(measured[args.model].how(), highlight=False)
    if scores:
        shown.print(_of_tasks(models, scores))
    return 0


def _perplexities(args: argparse.Namespace, models: list[str]) -> "dict[str, Measured]":
    with importing("transformers"):
        from fedspallm_appfl.runs.evaluation import evaluate_folder

    names = ("length", "windows", "batch", "dtype", "device", "bos", "field", "blocks", "trust_remote_code")
    words = {name: getattr(args, name) for name in names}
    return {model: evaluate_folder(model, {text: text for text in args.text}, **words) for model in models}


def _scores(args: argparse.Namespace, models: list[str]) -> "dict[str, list[Score]]":
    with importing("transformers"):
        from fedspallm_appfl.models.tasks import score

    names = ("limit", "batch", "dtype", "device", "trust_remote_code")
    tasks = [task.strip() for task in args.tasks.split(",") if task.strip()]
    if not tasks:
        raise ConfigError(f"--tasks takes names with commas between them, got {args.tasks!r}")
    return score(models, tasks, args.task_folder, **{name: getattr(args, name) for name in names})


def _of_texts(models: list[str], measured: "dict[str, Measured]") -> "ConsoleTable":
    table = _table("Perplexity", models, ["text"], ["perplexity"])
    for text in measured[models[0]].perplexity:
        table.add_row(_plain(text), *(f"{measured[model].perplexity[text]:.3f}" for model in models))
    return table


def _of_tasks(models: list[str], scores: "dict[str, list[Score]]") -> "ConsoleTable":
    table = _table("Tasks", models, ["task", "metric", "questions"], ["score"])
    for row in zip(*(scores[model] for model in models), strict=True):
        asked = "" if row[0].questions is None else f"{row[0].questions:,}"
        table.add_row(_plain(row[0].task), _plain(row[0].metric), asked, *map(str, row))
    return table


def _table(title: str, models: list[str], left: list[str], alone: list[str]) -> "ConsoleTable":
    """A table with a column for each model; its name stands in the title if there is one model."""
    from fedspallm_appfl.reports.terminal import ConsoleTable

    table = ConsoleTable(title=f"{title} of {' and '.join(map(_plain, models))}", title_justify="left")
    for name in left:
        table.add_column(name, overflow="fold", justify="right" if name == "questions" else "left")
    for name in alone if len(models) == 1 else models:
        table.add_column(_plain(name), overflow="fold", justify="right")
    return table


def _plain(words: str) -> str:
    from rich.markup import escape

    return escape(words)


def _as_json(model: str, measured: "dict[str, Measured]", scores: "dict[str, list[Score]]") -> dict[str, Any]:
    found: dict[str, Any] = {"model": model}
    if measured:
        found |= {"perplexity": measured[model].perplexity, "how": measured[model].how()}
    return found | ({"tasks": [one.to_dict() for one in scores[model]]} if scores else {})
