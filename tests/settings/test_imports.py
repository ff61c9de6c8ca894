"""What is hidden from packages that would fail at it, and what is imported late."""

import importlib.util
import inspect
import sys

import pytest

from fedspallm_appfl.settings.imports import guard_torchvision, put_off


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


def test_a_package_is_imported_when_something_of_it_is_used_and_not_before(tmp_path, monkeypatch):
    (tmp_path / "dear").mkdir()
    (tmp_path / "dear" / "__init__.py").write_text("import sys\nsys.modules['dear'].used = True\nwhat = 3\n")
    (tmp_path / "dear" / "part.py").write_text("from dear import what\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("dear", "dear.part"):
        monkeypatch.setitem(sys.modules, name, None)  # what comes in its place goes afterwards
        del sys.modules[name]
    put_off("dear", "not_installed_at_all")
    import dear

    inspect.getmodule(sys._getframe())  # looks at every module
    assert importlib.util.find_spec("dear").origin == str(tmp_path / "dear" / "__init__.py")
    assert "what" not in vars(sys.modules["dear"])
    assert dear.what == 3 and dear.used
    assert "what" in vars(sys.modules["dear"])  # the package itself, for whoever imports it from now on
    import dear.part

    assert dear.part.what == 3
    assert "not_installed_at_all" not in sys.modules
    with pytest.raises(AttributeError, match="nothing"):
        _ = dear.nothing
