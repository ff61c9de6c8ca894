"""The table of all keys in docs/configuration.md, made from `schema`.

`python -m fedspallm_appfl.settings.page docs/configuration.md` writes it into the page, between its two marks.
"""

import dataclasses
import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedspallm_appfl.settings.schema import Client, Config, Rule, plain
from fedspallm_appfl.tensors.targets import Sparsity

BEGIN, END = "<!-- keys: made from settings/schema.py by make docs -->\n", "<!-- end of keys -->\n"
WORDS = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    list: "list",
    dict: "keys and values",
}


def table() -> str:
    """All keys in the order of the file, a row each, in Markdown."""
    rows = ["| key | value | default | means |", "| --- | --- | --- | --- |", *_rows(Config, "")]
    own = {one.name for one in dataclasses.fields(Client)} - {"train_configs", "data", "comm_configs"}
    rows += [row for row in _rows(Client, "clients.N.") if row.split("`")[1].removeprefix("clients.N.") in own]
    return "\n".join(rows) + "\n"


def written(page: str) -> str:
    """A page with the table between its marks.

    Raises:
        ValueError: the page has no marks.
    """
    if BEGIN not in page or END not in page:
        raise ValueError(f"the page has no marks {BEGIN.strip()} and {END.strip()}")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table()}{END}{after}"


def _rows(kind: type, path: str) -> Iterator[str]:
    hints = typing.get_type_hints(kind)
    for one in dataclasses.fields(kind):
        hint, where = hints[one.name], f"{path}{one.name}"
        if "rule" in one.metadata:
            rule = one.metadata["rule"]
            yield f"| `{where}` | {_value(hint, rule)} | {_default(one)} | {rule.says} |"
        elif dataclasses.is_dataclass(hint):
            yield from _rows(typing.cast(type, hint), f"{where}.")


def _value(hint: Any, rule: Rule) -> str:
    """What may stand there."""
    if rule.choices and hint != list[str]:
        return "a word"
    if hint == Sparsity:
        return "number, text, or keys and values"
    kinds = typing.get_args(hint) if typing.get_origin(hint) is types.UnionType else (hint,)
    words = " or ".join(WORDS[typing.get_origin(kind) or kind] for kind in kinds if kind is not types.NoneType)
    if rule.range:
        return f"{words}, {re.split('[,;] got', rule.range)[0]}"
    if rule.least is None:
        return words
    return f"{words}, above 0" if isinstance(rule.least, float) and not rule.least else f"{words}, from {rule.least:g}"


def _default(one: Any) -> str:
    made = one.default_factory() if one.default is dataclasses.MISSING else one.default
    shown = plain(made)
    return "" if shown in (None, "", [], {}) else str(shown).lower() if isinstance(shown, bool) else str(shown)


def main(file: str) -> None:
    """Write the table into a page."""
    page = Path(file)
    page.write_text(written(page.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
