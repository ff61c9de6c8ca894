"""The benchmark of the GPU path runs where there is no card, so that it runs the first time that there is one."""

import re
import sys

import pytest

from helpers.paths import ROOT
from helpers.processes import run


@pytest.mark.slow
def test_a_rehearsal_runs_every_step(tmp_path):
    code, out, err = run(sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--out", tmp_path, cwd=ROOT)
    assert code == 0, out + err
    said = (tmp_path / "gpu.md").read_text()
    assert said.startswith("# A rehearsal on the CPU") and "failed" not in said
    assert len(re.findall(r"^## ", said, re.MULTILINE)) == 8
