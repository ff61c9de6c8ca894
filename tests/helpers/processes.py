"""Real processes: each has a limit on its time, and none outlives the test that started it."""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.paths import ROOT

LIMIT = 240  # seconds; what a process takes on a busy machine, several times over
MPIEXEC = Path(sys.executable).with_name("mpiexec")
ENVIRONMENT = {
    **os.environ,
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMP_NUM_THREADS": "1",
    "OMPI_MCA_mpi_yield_when_idle": "1",  # APPFL's own clients spin while they wait for ranks that need the core
}
without_mpiexec = pytest.mark.skipif(not MPIEXEC.exists() and not shutil.which("mpiexec"), reason="no mpiexec")
_started = []


def start(*command, cwd=ROOT, env=ENVIRONMENT):
    """Start a command; what it says is kept for `finish`. `tests/conftest.py` ends it with the test."""
    pipe, line = subprocess.PIPE, [*map(str, command)]
    _started.append(subprocess.Popen(line, env=env, cwd=cwd, stdout=pipe, stderr=pipe, text=True))
    return _started[-1]


def mpiexec(ranks, *command, **options):
    """Start a command on so many ranks."""
    return start(MPIEXEC if MPIEXEC.exists() else "mpiexec", "-n", ranks, *command, **options)


def fedspallm(ranks, config, *overrides, **options):
    """Start a run on so many ranks."""
    program = (sys.executable, "-m", "fedspallm_appfl")
    return mpiexec(ranks, *program, "run", config, "--launcher", "mpi", *overrides, **options)


def run(*command, seconds=LIMIT, **options):
    """Exit code, output and errors of a command."""
    return finish(start(*command, **options), seconds)


def finish(process, seconds=LIMIT):
    """Exit code, output and errors of a process; one that does not end in time is ended and fails the test."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        out, err = end(process)
        pytest.fail(f"not ended after {seconds} s: {process.args}\n{out}\n{err}")
    return process.returncode, out, err


def end(process):
    """End a process, by force if it does not listen; returns what it had said.

    mpiexec ends its ranks when it is asked to end. What others leave behind may hold their pipes, so that these are not
    read to the end.
    """
    for ask in (process.terminate, process.kill):
        ask()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=15)
    return "", "(somebody holds its pipes)"


def end_all():
    """End whatever has been started and still runs."""
    while _started:
        process = _started.pop()
        if process.poll() is None:
            end(process)
        for pipe in (process.stdout, process.stderr):
            pipe.close()
