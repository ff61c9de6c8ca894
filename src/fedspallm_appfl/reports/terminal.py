"""Tables on the console that lose nothing in a narrow terminal."""

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table


class ConsoleTable(Table):
    """A table that folds words which are wider than their column; by itself rich ends them in an ellipsis."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw it."""
        for column in self.columns:
            column.overflow = "fold"
        yield from super().__rich_console__(console, options)
