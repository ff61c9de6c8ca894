"""The two ways of the loops, for tests that run both: compiled where they were built, numpy and torch everywhere."""

import pytest

from fedspallm_appfl.tensors import native

LOOPS = ["compiled", "torch"]


def use(loops, monkeypatch):
    """Run what follows with one of the two; skips what needs compiled loops where there are none."""
    if loops == "torch":
        monkeypatch.setattr(native, "LIBRARY", None)
    elif native.LIBRARY is None:
        pytest.skip("the compiled loops were not built, or FEDSPALLM_NATIVE=0 is set")
