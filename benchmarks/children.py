"""Run a module in a process of its own and take its results, one line of JSON."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / ".venv-peers" / "bin" / "python"


def run(module: str, *arguments: Any, python: str = sys.executable, launcher: Sequence[str] = ()) -> dict[str, Any]:
    """What a module of this package prints in its last line.

    Args:
        module: its name.
        *arguments: of its command line.
        python: the interpreter.
        launcher: what starts the interpreter, e.g. mpiexec.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    line = [*launcher, python, "-m", f"benchmarks.{module}", *map(str, arguments)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"benchmarks.{module} {arguments} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def peers_python() -> str | None:
    """The interpreter that has the peers installed, or None."""
    named = os.environ.get("FEDSPALLM_PEERS_PYTHON")
    return named or (str(PEERS) if PEERS.exists() else None)
