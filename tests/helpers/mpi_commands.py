"""Several commands, one after the other, in the ranks of one MPI job: each rank imports APPFL once for all of them.

mpiexec -n 3 python -m helpers.mpi_commands COMMANDS.json
"""

import json
import sys
from pathlib import Path

from fedspallm_appfl.cli import main
from fedspallm_appfl.recovery import training

if __name__ == "__main__":
    training.NEWS = 0  # each step is told
    for words in json.loads(Path(sys.argv[1]).read_text()):
        if code := main(words):
            sys.exit(code)
