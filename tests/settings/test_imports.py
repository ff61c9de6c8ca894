"""What is hidden from packages that would fail at it, and what is imported late."""

import gc
import importlib.util
import inspect
import pickle
import subprocess
import sys
import types
import weakref

import pytest

from fedspallm_appfl.settings import imports
from fedspallm_appfl.settings.imports import guard_torchvision, importing


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
    (tmp_path / "heavy").mkdir()
    (tmp_path / "heavy" / "__init__.py").write_text("")
    (tmp_path / "heavy" / "user.py").write_text("import dear\nimport dear as short\n")
    (tmp_path / "heavy" / "asking.py").write_text("try:\n    import not_installed\nexcept ImportError:\n    x = 1\n")
    (tmp_path / "dear").mkdir()
    (tmp_path / "dear" / "__init__.py").write_text("what = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(imports, "WHOLE", ("dear", "not_installed"))
    monkeypatch.setattr(imports, "BY", ("heavy.",))
    for name in ("heavy", "heavy.user", "heavy.asking", "dear"):
        monkeypatch.setitem(sys.modules, name, None)  # what comes in its place goes afterwards
        del sys.modules[name]
    with importing("heavy"):
        from heavy import asking, user
    assert asking.x == 1 and "dear" not in sys.modules
    assert user.dear.what == user.short.what == 3 and "dear" in sys.modules
    with pytest.raises(AttributeError, match="nothing"):
        _ = user.dear.nothing
    import dear

    assert inspect.ismodule(dear) and dear is not user.dear and dear.what == 3


def test_a_name_is_imported_when_it_is_called(tmp_path, monkeypatch):
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "__init__.py").write_text("class Engine:\n    pass\n")
    (tmp_path / "large" / "part.py").write_text("def curve(x, *, by):\n    return x * by\nother = 5\n")
    (tmp_path / "heavy").mkdir()
    for name, code in {
        "__init__": "from heavy import user",
        "user": "from large import Engine\nfrom large.part import curve",
        "asking": "from large.part import curve, other",
        "gone": "try:\n    from absent import x\nexcept ImportError:\n    x = None",
        "late": "import absent_as_well",
        "early": "try:\n    from .late import x\nexcept ImportError as error:\n    x = error.name",
    }.items():
        (tmp_path / "heavy" / f"{name}.py").write_text(f"{code}\n")
    (tmp_path / "mine.py").write_text("import large\nfrom large.part import curve\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(imports, "UNUSED", {"large": ("Engine",), "large.part": ("curve",), "absent": ("x",)})
    monkeypatch.setattr(imports, "BY", ("heavy.", "heavy"))
    monkeypatch.setattr(imports, "IN_VAIN", {"late": "absent_as_well"})
    for name in (
        "large",
        "large.part",
        "mine",
        "heavy",
        *(f"heavy.{one}" for one in ("user", "asking", "gone", "early")),
    ):
        monkeypatch.setitem(sys.modules, name, None)  # what comes in its place goes afterwards
        del sys.modules[name]
    with importing("heavy"):
        import heavy
        import heavy.early
        import heavy.gone

        assert "large" not in sys.modules
        assert heavy.user.curve(3, by=2) == 6
        assert pickle.loads(pickle.dumps(heavy.user.curve))(3, by=2) == 6
    assert type(heavy.user.Engine()).__module__ == "large"
    assert heavy.gone.x is None
    assert heavy.early.x == "absent_as_well" and "heavy.late" not in sys.modules

    for name in ("large", "large.part", "heavy"):
        del sys.modules[name]
    with importing("heavy"):
        import heavy.asking  # a name that was not foreseen: the module itself is imported
        import mine  # and for anybody else, too

    assert inspect.isfunction(heavy.asking.curve) and heavy.asking.other == 5
    assert inspect.isfunction(mine.curve) and mine.large.part is sys.modules["large.part"]


def test_what_is_garbage_before_an_import_is_collected(monkeypatch):
    monkeypatch.setattr(imports, "UNUSED", {})
    often = gc.get_threshold()
    gc.set_threshold(10**9)  # nothing is collected by chance
    try:
        garbage = types.ModuleType("garbage")
        garbage.itself = garbage
        gone = weakref.ref(garbage)
        del garbage
        with importing("heavy"):
            pass
    finally:
        gc.set_threshold(*often)
    assert gone() is None  # it would stay for good


def test_a_run_imports_no_package_of_which_it_uses_nothing():
    code = """
import sys
import fedspallm_appfl as fs
assert not {"torch", "transformers"} & sys.modules.keys()
assert fs.prune
from fedspallm_appfl.adaptors import registration
registration.register()
for name in ("sklearn", "opacus", "scipy.stats", "pandas", "datasets", "piq", "seaborn", "wandb"):
    assert name not in sys.modules, name
from appfl.algorithm.trainer.vanilla_trainer import PrivacyEngine
from sklearn.metrics import roc_curve
assert type(PrivacyEngine()).__module__ == "opacus.privacy_engine"
assert roc_curve.__module__.startswith("sklearn.metrics")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
