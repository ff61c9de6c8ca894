"""docs/configuration.md against the schema that it is made from."""

from pathlib import Path

from fedspallm_appfl.algorithms import registry as algorithms
from fedspallm_appfl.pruning import registry as pruners
from fedspallm_appfl.settings import page, schema

PAGE = Path(__file__).parents[2] / "docs/configuration.md"


def test_the_page_is_what_the_schema_makes_of_it():
    text = PAGE.read_text("utf-8")
    assert text.count(page.BEGIN) == text.count(page.END) == 1
    assert page.written(text) == text, "run make docs"


def test_a_row_tells_key_value_default_and_meaning():
    rows = page.table().splitlines()
    assert "| `client_configs.data.windows` | whole number, from 1 | 128 | calibration windows drawn from it |" in rows
    assert "| `clients.N.client_id` | text |  | letters, digits, `-`, `_` and `.`; different for every client |" in rows
    assert not [row for row in rows if row.count("|") != 5 or row.endswith("|  |")]


def test_the_choices_that_need_no_torch_are_those_of_the_registries():
    assert schema.ALGORITHMS == algorithms.BUILT_IN
    assert schema.PRUNERS == pruners.BUILT_IN
