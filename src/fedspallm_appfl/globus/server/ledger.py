"""What a run over Globus Compute writes down beside the server's state, so that a server that comes back finds its tasks.

Sites go on while the server is away: their tasks are found by their ids, what they had returned lies here, and the
uploads in the data store stay until the blocks in them are finished. Requests are not kept: they may hold links to a store.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedspallm_appfl.errors import ModelError, first_line, shortened
from fedspallm_appfl.wire.durable import write_text

FOLDER = "globus"  # in the server's state


class Ledger:
    """The tasks of the exchange that is on.

    Attributes:
        run: the run's name in the data store.
        starts: how often the run was started.
        objects: names of objects that may be in the data store.
        tasks: client -> id of its task.
    """

    def __init__(self, folder: Path, run: str) -> None:
        """Go on where an earlier start stood, or begin.

        Args:
            folder: of the server's state.
            run: the run's name in the data store.

        Raises:
            ModelError: what an earlier start wrote cannot be read.
        """
        self._folder = folder / FOLDER
        self.run, self.starts, self._turn = run, 0, ""
        self.objects: set[str] = set()
        self.tasks: dict[str, str] = {}
        found = read(folder)
        if found is not None:
            self.starts, self._turn = found["starts"], found["turn"]
            self.objects, self.tasks = set(found["objects"]), found["tasks"]
        self.starts += 1
        self._write()

    def begin(self, turn: str) -> None:
        """Note which exchange is on; what is known of the tasks of another one is of no use any more."""
        if turn != self._turn:
            self._turn, self.tasks = turn, {}
            shutil.rmtree(self._answers, ignore_errors=True)
            self._write()

    def note(self, tasks: Mapping[str, str], objects: Iterable[str]) -> None:
        """Note the ids of tasks and the names of objects, as far as they are news."""
        if not (tasks.items() <= self.tasks.items() and self.objects.issuperset(objects)):
            self.tasks |= tasks
            self.objects |= set(objects)
            self._write()

    def keep(self, client: str, result: Mapping[str, Any]) -> None:
        """Keep what a task has returned."""
        write_text(self._answers / f"{client}.json", json.dumps(result))

    def answer(self, client: str) -> Any:
        """What the task of a client had returned before this start; None if nothing."""
        file = self._answers / f"{client}.json"
        return _read(file) if file.is_file() else None

    @property
    def _answers(self) -> Path:
        return self._folder / "answers"

    def _write(self) -> None:
        facts = {"run": self.run, "starts": self.starts, "turn": self._turn, "tasks": self.tasks}
        write_text(self._folder / "ledger.json", json.dumps(facts | {"objects": sorted(self.objects)}))


def read(state: Path) -> dict[str, Any] | None:
    """What an earlier start wrote; None if there was none.

    Raises:
        ModelError: it cannot be read.
    """
    file = state / FOLDER / "ledger.json"
    if not file.is_file():
        return None
    try:
        found: dict[str, Any] = _read(file)
        {name: found[name] for name in ("run", "starts", "turn", "tasks", "objects")}
    except (KeyError, TypeError) as error:
        raise _damaged(file, error) from error
    return found


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> ModelError:
    return ModelError(f"{file} is damaged: {shortened(first_line(error))}; begin the run anew with --overwrite")
