"""docs/configuration.md against the schema that it is made from."""

import dataclasses
import re

from fedspallm_appfl.algorithms import registry as algorithms
from fedspallm_appfl.pruning import registry as pruners
from fedspallm_appfl.settings import page, schema
from fedspallm_appfl.settings.schema import Client, Config
from fedspallm_appfl.tensors.target import Target
from helpers.paths import ROOT

PAGE = ROOT / "docs" / "configuration.md"


def keys(value, prefix=""):
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        if dataclasses.is_dataclass(inner) and not isinstance(inner, Target):
            yield from keys(inner, f"{prefix}{field.name}.")
        elif field.name != "clients":
            yield f"{prefix}{field.name}", inner


def test_the_page_lists_every_key_with_its_default():
    listed = dict(re.findall(r"^\| `([\w.]+)` \| [^|]* \| (.*?) ?\|", PAGE.read_text("utf-8"), re.MULTILINE))
    expected = dict(keys(Config())) | {
        f"clients.N.{key}": getattr(Client(), key) for key in ("client_id", "endpoint_id", "identity")
    }
    assert listed.keys() == expected.keys()
    for key, default in expected.items():
        blank = default in (None, "", [], {})
        assert listed[key] == ("" if blank else str(default).lower() if isinstance(default, bool) else str(default)), (
            key
        )


def test_the_page_is_what_the_schema_makes_of_it():
    text = PAGE.read_text("utf-8")
    assert text.count(page.BEGIN) == text.count(page.END) == 1
    assert page.written(text) == text, "run make docs"
    assert page.written(text.replace("| `seed` |", "| `sed` |")) == text


def test_a_row_tells_key_value_default_and_meaning():
    rows = page.table().splitlines()
    assert "| `client_configs.data.windows` | whole number, from 1 | 128 | calibration windows drawn from it |" in rows
    assert "| `clients.N.client_id` | text |  | letters, digits, `-`, `_` and `.`; different for every client |" in rows
    assert not [row for row in rows if row.count("|") != 5 or row.endswith("|  |")]


def test_the_choices_that_need_no_torch_are_those_of_the_registries():
    assert schema.ALGORITHMS == algorithms.BUILT_IN
    assert schema.PRUNERS == pruners.BUILT_IN
