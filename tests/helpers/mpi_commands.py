"""Several commands, one after the other, in the ranks of one MPI job: each rank imports APPFL once for all of them.

mpiexec -n 3 python -m helpers.mpi_commands COMMANDS.json
"""

import json
import sys
from pathlib import Path

from fedspallm_appfl.cli import main

if __name__ == "__main__":
    for words in json.loads(Path(sys.argv[1]).read_text()):
        if code := main(words):
            sys.exit(code)
