"""Where payloads lie that are too large for a Globus Compute task: a folder that all sites mount, or a Redis server.

ProxyStore's connectors move the bytes. Of ProxyStore's stores and proxies nothing is used: they pickle, share one name for
every experiment of a process, and clear a whole Redis server. Names are given by the server's side alone, so that nothing
that a client says decides what is read or removed.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedspallm_appfl.errors import DataStoreError, first_line

CONNECTORS = ("none", "file", "redis")
REDIS_LIMIT = 2**29 - 2**20  # bytes of a value, a little below where Redis ends


class DataStore:
    """The objects of one run.

    Attributes:
        settings: as in the configuration.
        run: the run's name, part of every object's.
    """

    def __init__(self, settings: Mapping[str, Any], run: str, create: bool = False) -> None:
        """Connect.

        Args:
            settings: `connector`, and `folder` or `host` and `port`.
            run: a name that no other run has.
            create: begin a run; clients only join one, so that a late one leaves nothing behind after its end.

        Raises:
            DataStoreError: it cannot be reached.
        """
        self.settings = dict(settings)
        self.run = _checked(run)
        with self._trouble("reached"):
            self._connector = self._connect(create)

    def _connect(self, create: bool) -> Any:
        if self.settings["connector"] == "file":
            from proxystore.connectors.file import FileConnector

            folder = Path(str(self.settings["folder"])).expanduser() / self.run
            if create:
                folder.mkdir()
            if not folder.is_dir():
                raise FileNotFoundError(f"{folder} is no folder on this machine")
            return FileConnector(str(folder), clear=False)
        from proxystore.connectors.redis import RedisConnector

        connector = RedisConnector(str(self.settings["host"]), int(self.settings["port"]), clear=False)
        connector.exists(self._key("nothing"))  # it connects when it is first used
        return connector

    def put(self, name: str, data: bytes) -> None:
        """Place an object, in place of an earlier one of that name."""
        with self._trouble("written"):
            self._connector.set(self._key(name), data)

    def get(self, name: str) -> bytes:
        """Read an object.

        Raises:
            DataStoreError: there is none of that name, or the store cannot be reached.
        """
        with self._trouble("read"):
            data = self._connector.get(self._key(name))
        if data is None:
            raise DataStoreError(f"{self}: holds no object {name}; it was never placed, or was removed")
        return data

    def evict(self, name: str) -> None:
        """Remove an object if it is there."""
        with self._trouble("cleared"):
            self._connector.evict(self._key(name))

    def close(self, clear: bool = False) -> None:
        """Let go of the store; `clear` removes what is left of this run, never anything of another."""
        with self._trouble("closed"):
            if clear and self.settings["connector"] == "redis":
                client = self._connector._redis_client
                for key in client.scan_iter(match=f"fedspallm/{self.run}/*"):
                    client.delete(key)
            self._connector.close(clear=clear and self.settings["connector"] == "file")

    def __str__(self) -> str:
        if self.settings["connector"] == "file":
            return f"data store in the folder {self.settings['folder']}"
        return f"data store in Redis at {self.settings['host']}:{self.settings['port']}"

    def _key(self, name: str) -> Any:
        if self.settings["connector"] == "file":
            from proxystore.connectors.file import FileKey

            return FileKey(filename=_checked(name))
        from proxystore.connectors.redis import RedisKey

        return RedisKey(redis_key=f"fedspallm/{self.run}/{_checked(name)}")

    @contextmanager
    def _trouble(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a Redis client has its own family of errors
            raise DataStoreError(
                f"{self}: cannot be {what} ({type(error).__name__}: {first_line(error)}); check "
                "client_configs.comm_configs.store, or `store` in the site file where a site reaches it in another way"
            ) from error


def open_store(settings: Mapping[str, Any], run: str, create: bool = False) -> DataStore | None:
    """The data store of a run; None where everything travels with the tasks."""
    return None if settings["connector"] == "none" else DataStore(settings, run, create)


def _checked(name: str) -> str:
    """A name that is one file name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name, re.ASCII):
        raise ValueError(f"a name of the data store has letters, digits, '-', '_' and '.', got {name!r}")
    return name
