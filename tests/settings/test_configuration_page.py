"""docs/configuration.md lists every key with its default, and no other."""

import dataclasses
import re

from fedspallm_appfl.settings.page import written
from fedspallm_appfl.settings.schema import Client, Config
from fedspallm_appfl.tensors.target import Target
from helpers.paths import ROOT


def keys(value, prefix=""):
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        if dataclasses.is_dataclass(inner) and not isinstance(inner, Target):
            yield from keys(inner, f"{prefix}{field.name}.")
        elif field.name != "clients":
            yield f"{prefix}{field.name}", inner


def test_the_page_lists_every_key_with_its_default():
    page = (ROOT / "docs" / "configuration.md").read_text()
    listed = dict(re.findall(r"^\| `([\w.]+)` \| [^|]* \| (.*?) ?\|", page, re.MULTILINE))
    expected = dict(keys(Config())) | {
        f"clients.N.{key}": getattr(Client(), key) for key in ("client_id", "endpoint_id")
    }
    assert listed.keys() == expected.keys()
    for key, default in expected.items():
        blank = default in (None, "", [], {})
        assert listed[key] == ("" if blank else str(default).lower() if isinstance(default, bool) else str(default)), (
            key
        )


def test_the_page_is_the_one_that_the_keys_make():
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert written(page) == page, "make docs writes it anew"
    assert written(page.replace("| `seed` |", "| `sed` |")) == page
