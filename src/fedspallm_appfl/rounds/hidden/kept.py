"""Where the state of a client outlives its process: a folder that only its user can read.

Two processes may hold the same client, as where a server sends two tasks at a time. The first that writes goes on; the
other would sign or open what does not go with it, and is refused.
"""

import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from fedspallm_appfl.errors import ConfigError, SecureSumError
from fedspallm_appfl.wire.durable import write_text

STATE = "keys.json"
LOCK = "lock"


class Kept:
    """The state of one client.

    Args:
        folder: where it lies.
        client: whom to name.
    """

    def __init__(self, folder: Path, client: str) -> None:
        self._folder, self._client = folder, client
        self._known: str | None = None  # the state as this process has read or written it

    def read(self) -> str | None:
        """The state that was written last; None if there is none.

        Raises:
            ConfigError: somebody else could read it.
        """
        self._known = None
        if self._folder.exists():
            make_private(self._folder)
            self._known = self._there()
        return self._known

    def write(self, state: str) -> None:
        """Write the state that follows the one known here.

        Raises:
            ConfigError: somebody else could read it.
            SecureSumError: another process has written one since.
        """
        with self._alone():
            write_text(self._folder / STATE, state)
            self._known = state

    def forget(self) -> None:
        """Remove the state known here, and its folder; errors as `write`."""
        with self._alone():
            shutil.rmtree(self._folder, ignore_errors=True)
            self._known = None

    def _there(self) -> str | None:
        file = self._folder / STATE
        return file.read_text("utf-8") if file.is_file() else None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with self._locked():
            if self._there() != self._known:
                raise SecureSumError(
                    f"client {self._client}: another task has gone on with its keys of secure sums meanwhile; send a "
                    "client one task at a time"
                )
            yield

    def _locked(self) -> IO[str]:
        """The lock, taken; whoever held it before may have removed it with its folder, and then there is another one.

        Raises:
            ConfigError: the folder cannot be written, or its file system has no locks.
        """
        while True:
            file = make_private(self._folder) / LOCK
            try:
                with ExitStack() as opened:
                    lock = opened.enter_context(file.open("a"))
                    if _is_taken(lock, file):
                        opened.pop_all()
                        return lock
            except FileNotFoundError:
                continue
            except OSError as error:
                raise ConfigError(
                    f"client {self._client}: {file} cannot be written or locked: {error.strerror}; keys of secure sums "
                    "need a file system with room and locks: set TMPDIR, or run_dir where it lies there, to one"
                ) from error


def make_private(folder: Path) -> Path:
    """Make a folder that nobody else can look into; returns it.

    Raises:
        ConfigError: there is one that others made or can look into, or it cannot be made.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError:  # a file, which is refused below
        pass
    except OSError as error:
        raise ConfigError(f"the folder {folder} cannot be made: {error.strerror}") from error
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(
            f"the folder {folder} is for what nobody else may see, and others made it or can look into it; remove it, "
            "or set TMPDIR, or run_dir where it lies there, to a private folder"
        )
    return folder


def _is_taken(lock: IO[str], file: Path) -> bool:
    """Take a lock; whether its file is still there."""
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        return os.path.samestat(os.fstat(lock.fileno()), file.stat())
    except FileNotFoundError:
        return False
