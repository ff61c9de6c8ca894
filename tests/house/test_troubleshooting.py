"""Messages that docs/troubleshooting.md quotes are those of the source."""

import ast
import re

from helpers.paths import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")


def said():
    """All texts of the source, with `…` where a value is put in."""
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_every_message_of_the_page_is_in_the_source():
    quoted = re.findall(r"^### (`+)(.*)\1$", PAGE, re.MULTILINE)
    texts = "\n".join(said())
    assert len(quoted) == PAGE.count("\n### ") >= 15
    assert [one for _, one in quoted if one.strip("…") not in texts] == []


def test_every_message_has_a_cause_and_a_fix():
    parts = re.split(r"^### .*$", PAGE, flags=re.MULTILINE)[1:]
    assert [part for part in parts if (part.count("**Cause.**"), part.count("**Fix.**")) != (1, 1)] == []
