"""What is hidden from packages that would fail at it."""

import importlib.util
import sys

import pytest

from fedspallm_appfl.settings.imports import guard_torchvision


@pytest.mark.parametrize(
    ("code", "hidden"),
    [
        ("raise RuntimeError('operator torchvision::nms does not exist')", True),
        ("from torch import nothing_of_this_name", True),
        ("import nothing_of_this_name", True),
        ("", False),
    ],
)
def test_a_torchvision_that_cannot_be_imported_is_as_if_it_were_not_installed(tmp_path, monkeypatch, code, hidden):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "torchvision", None)  # what comes in its place goes afterwards
    del sys.modules["torchvision"]
    guard_torchvision()
    assert (importlib.util.find_spec("torchvision") is None) == hidden
