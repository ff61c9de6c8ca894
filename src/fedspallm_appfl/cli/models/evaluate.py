"""`fedspallm evaluate`."""

import argparse
from typing import Any

from fedspallm_appfl.cli.arguments import command, positive
from fedspallm_appfl.cli.checked import console
from fedspallm_appfl.settings.imports import uncollected
from fedspallm_appfl.settings.schema import BOSES, DTYPES


def add(verbs: Any) -> None:
    """Declare the verb."""
    parser = command(
        verbs,
        "evaluate",
        "Print the perplexity of a model folder on texts.",
        "fedspallm evaluate runs/demo/model --text examples/demo/text/austen/test.txt --length 256",
    )
    parser.add_argument("model", help="model folder, or hub name")
    parser.add_argument(
        "--text",
        nargs="+",
        required=True,
        metavar="TEXT",
        help="held-out texts, a row each; or wikitext2, ptb, c4",
    )
    parser.add_argument(
        "--length", type=positive, default=None, help="tokens in a window (default: 2048, or what the model takes)"
    )
    parser.add_argument(
        "--windows", type=positive, default=None, help="at most so many windows of each text (default: all)"
    )
    parser.add_argument("--batch", type=positive, default=8, help="windows in a forward pass (default: 8)")
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
    parser.set_defaults(work=work)


def work(args: argparse.Namespace) -> int:
    """Do it."""
    from rich.markup import escape
    from rich.table import Table

    with uncollected("transformers"):
        from fedspallm_appfl.runs.evaluation import evaluate_folder

    texts = {text: text for text in args.text}
    names = ("length", "windows", "batch", "dtype", "device", "bos", "field", "blocks", "trust_remote_code")
    measured = evaluate_folder(args.model, texts, **{name: getattr(args, name) for name in names})
    table = Table(title=f"Perplexity of {escape(args.model)}", title_justify="left")
    table.add_column("text", overflow="fold")
    table.add_column("perplexity", justify="right")
    for text, value in measured.perplexity.items():
        table.add_row(escape(text), f"{value:.3f}")
    shown = console()
    shown.print(table)
    shown.print(measured.how(), highlight=False)
    return 0
