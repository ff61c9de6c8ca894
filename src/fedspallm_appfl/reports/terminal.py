"""Tables on the console that lose nothing in a narrow terminal."""

from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.table import Table

from fedspallm_appfl.reports import parts


class ConsoleTable(Table):
    """A table that folds words which are wider than their column; by itself rich ends them in an ellipsis."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw it."""
        for column in self.columns:
            column.overflow = "fold"
        yield from super().__rich_console__(console, options)


def upright(table: parts.Table) -> ConsoleTable:
    """A table of a report, with a column for each of its rows if they are fewer than its columns."""
    whole = [table.head, *table.rows]
    (corner, *names), *lines = zip(*whole, strict=True) if len(table.rows) < len(table.head) else whole
    made = ConsoleTable(escape(corner), *map(escape, names))
    for column in made.columns[1:]:
        column.justify = "right"
    for line in lines:
        made.add_row(*map(escape, line))
    return made
