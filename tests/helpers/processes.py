"""Processes that tests start: each has a limit, and none outlives its test."""

import contextlib
import subprocess
from contextlib import contextmanager

import pytest

LIMIT = 240  # seconds; what a process takes on a busy machine, several times over


def run(command, seconds=LIMIT, **options):
    """`subprocess.run` with a limit and its output as text; a process that exceeds it is killed and fails the test."""
    try:
        return subprocess.run(
            [str(word) for word in command], timeout=seconds, capture_output=True, text=True, **options
        )
    except subprocess.TimeoutExpired as late:
        pytest.fail(f"not ended after {seconds} s:\n{late}\n{late.stdout}\n{late.stderr}")


def start(command, **options):
    """A process whose output `finish` gives."""
    pipe = subprocess.PIPE
    return subprocess.Popen([str(word) for word in command], stdout=pipe, stderr=pipe, text=True, **options)


def finish(process, seconds=240):
    """Exit code, output and error output; a process that does not end in time is ended and fails the test."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        out, err = end(process)
        pytest.fail(f"not ended after {seconds} s:\n{out}\n{err}")
    return process.returncode, out, err


def end(process):
    """End a process, by force if it does not listen; what it had said so far.

    A process that starts others, such as mpiexec, ends them when it is asked to end; those that it leaves may hold its
    pipes, so that these are not read to their end.
    """
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.communicate(timeout=15)
    process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.communicate(timeout=15)
    return "", "(its output cannot be read: somebody holds its pipes)"


@contextmanager
def starting():
    """`start`, whose processes are ended with the `with`."""
    started = []

    def one(command, **options):
        started.append(start(command, **options))
        return started[-1]

    try:
        yield one
    finally:
        for process in started:
            if process.poll() is None:
                end(process)
