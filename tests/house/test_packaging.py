"""What an installation holds: all that the source tree holds."""

import subprocess
import sys

import pytest

from helpers.paths import ROOT

NOT_COPIED = {"tensors/native/kernels.c"}  # compiled into a module; the source distribution has it


def test_a_build_holds_every_file_of_the_package(tmp_path):
    pytest.importorskip("setuptools")
    source = ROOT / "src" / "fedspallm_appfl"
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120, capture_output=True)
    built = {str(file.relative_to(tmp_path / "fedspallm_appfl")) for file in tmp_path.rglob("*") if file.is_file()}
    here = {
        str(file.relative_to(source))
        for file in source.rglob("*")
        if file.suffix in (".py", ".c", ".typed", ".txt", ".css")
    }
    assert built == here - NOT_COPIED
    assert here >= NOT_COPIED
