"""What a run has shown, for people: in a terminal, in a notebook, and as numbers."""

import io
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Column
from rich.text import Text

from fedspallm_appfl.algorithms import registry
from fedspallm_appfl.errors import ModelError
from fedspallm_appfl.models.storage.export import MatrixSparsity
from fedspallm_appfl.reports.own_text import HEAD, TITLE, OwnText, rows
from fedspallm_appfl.reports.terminal import ConsoleTable

WIDTH = 120  # characters


class Shown:
    """An object that people read: its representation is what the command line would print."""

    def __rich__(self) -> RenderableType:
        """What there is to see."""
        raise NotImplementedError

    def __repr__(self) -> str:
        """Plain text."""
        console = Console(file=io.StringIO(), width=WIDTH, color_system=None, force_terminal=False, force_jupyter=False)
        with console.capture() as captured:
            console.print(self.__rich__())
        return captured.get().rstrip()

    def _repr_html_(self) -> str:
        """The same for a notebook."""
        console = Console(file=io.StringIO(), width=WIDTH, record=True, force_jupyter=False)
        console.print(self.__rich__())
        return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")


@contextmanager
def no_bars() -> Iterator[None]:
    """Keep transformers from drawing progress bars."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@dataclass(frozen=True, repr=False)
class Result(Shown):
    """The results of a run.

    Attributes:
        perplexity: method -> text -> perplexity; `standalone` is the geometric mean over the clients' own models.
        matrices: sparsity of each prunable matrix, read back from disk.
        block_weights: all weights in the decoder blocks, prunable or not.
        dense_bytes: bytes of all prunable weights of the dense model in the checkpoint's dtype.
        model: folder of the pruned model, or of the clients' own ones.
        own: client -> perplexities on its own held-out text, and `(all)`; empty if nobody has measured.
        targets: name of a matrix -> its target; empty where they are not known.
    """

    perplexity: Mapping[str, Mapping[str, float]]
    matrices: Sequence[MatrixSparsity]
    block_weights: int
    dense_bytes: int
    model: Path
    own: Mapping[str, OwnText] = field(default_factory=dict)
    targets: Mapping[str, str] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """Share of the prunable weights that is pruned."""
        return sum(one.zeros for one in self.matrices) / sum(one.entries for one in self.matrices)

    def load(self, **kwargs: Any) -> Any:
        """The pruned model, as transformers loads it.

        Args:
            **kwargs: for `AutoModelForCausalLM.from_pretrained`.

        Raises:
            ModelError: the algorithm makes a model for each client.
        """
        from transformers import AutoModelForCausalLM

        if not (self.model / "config.json").is_file():
            raise ModelError(f"{self.model} holds a model for each client: load one of its folders")
        with no_bars():
            return AutoModelForCausalLM.from_pretrained(self.model, **kwargs)

    def __rich__(self) -> RenderableType:
        """Perplexity, sparsity and where the model is."""
        lines = Text(f"{sparsity_line(self.matrices, self.block_weights)}\nmodel: {self.model}")
        if not self.perplexity:
            return lines
        return Group(
            Text("Perplexity"), perplexity_table(list(next(iter(self.perplexity.values()))), self.perplexity), lines
        )


def sparsity_line(matrices: Sequence[MatrixSparsity], block_weights: int) -> str:
    """Exact sparsity of all weights in the blocks and of the pruned matrices, as a sentence."""
    pruned = [matrix for matrix in matrices if matrix.zeros]
    zeros, entries = sum(m.zeros for m in pruned), sum(m.entries for m in pruned)
    if not pruned:
        return "no matrix was pruned"
    dense = f"; {count(len(matrices) - len(pruned), 'matrix')} left dense" if len(pruned) < len(matrices) else ""
    return (
        f"{zeros:,} of {block_weights:,} weights in the blocks are pruned ({100 * zeros / block_weights:.2f} %): "
        f"{100 * zeros / entries:.4f} % of {entries:,} in {count(len(pruned), 'pruned matrix')}{dense}"
    )


def zeros_line(matrices: Sequence[MatrixSparsity]) -> str | None:
    """What became of the zeros that the dense model had among these weights; None if it had none."""
    before, back = sum(m.zeros_before for m in matrices), sum(m.zeros_back for m in matrices)
    if not before:
        return None
    kept = f"{before - back:,} of {before:,} weights that were zero in the dense model are still zero"
    if not back:
        return kept
    return f"{kept}; {back:,} came back, as prune.keep_zeros is false or the pruner or algorithm is one of a plugin"


def perplexity_table(texts: Sequence[str], perplexity: Mapping[str, Mapping[str, float]]) -> ConsoleTable:
    """A row for each method, a column for each text, and the geometric mean."""
    table = ConsoleTable("", *(Column(escape(text), justify="right") for text in texts))
    table.add_column("mean", justify="right", style="bold")
    for method, row in perplexity.items():
        table.add_row(label(method), *(f"{row[text]:.2f}" for text in texts), f"{mean(row):.2f}")
    return table


def label(method: str) -> str:
    """What a table calls a method: an algorithm's title, or the name of what is none."""
    if method not in registry.names():
        return method
    title = registry.find(method).title
    return f"{title} (mean)" if is_apart(method) else title


def is_apart(method: str) -> bool:
    """Whether a row is that of clients by themselves."""
    return method in registry.names() and registry.find(method).apart


def mean(row: Mapping[str, float]) -> float:
    """The geometric mean over texts."""
    return statistics.geometric_mean(row.values())


def count(number: int, what: str) -> str:
    """A number of things in words: 2, matrix -> "2 matrices"."""
    plural = {"matrix": "matrices", "pruned matrix": "pruned matrices"}.get(what, f"{what}s")
    return f"{number} {what if number == 1 else plural}"


def own_table(found: Mapping[str, OwnText]) -> ConsoleTable:
    """Perplexities on the clients' own text."""
    columns = [Column(name, justify="right" if number else "left") for number, name in enumerate(HEAD)]
    table = ConsoleTable(*columns, title=TITLE, title_justify="left")
    for row in rows(found, 2):
        table.add_row(*map(escape, row))
    return table
