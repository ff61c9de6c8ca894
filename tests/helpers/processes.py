"""Real processes with a limit on their time."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.paths import ROOT

MPIEXEC = Path(sys.executable).with_name("mpiexec")
ENVIRONMENT = {
    **os.environ,
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMP_NUM_THREADS": "1",
}
without_mpiexec = pytest.mark.skipif(not MPIEXEC.exists() and not shutil.which("mpiexec"), reason="no mpiexec")


def start(*command, cwd=ROOT):
    """Start a command; what it says is kept."""
    line = [*map(str, command)]
    return subprocess.Popen(line, env=ENVIRONMENT, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def mpiexec(ranks, *command, cwd=ROOT):
    """Start a command on so many ranks."""
    return start(MPIEXEC if MPIEXEC.exists() else "mpiexec", "-n", ranks, *command, cwd=cwd)


def fedspallm(ranks, config, *overrides, cwd=ROOT):
    """Start a run on so many ranks."""
    program = (sys.executable, "-m", "fedspallm_appfl")
    return mpiexec(ranks, *program, "run", config, "--launcher", "mpi", *overrides, cwd=cwd)


def finish(process, seconds=240):
    """Exit code, output and errors of a process, which is ended if it takes longer."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        raise
    return process.returncode, out, err
