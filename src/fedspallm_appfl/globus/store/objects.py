"""Places for the objects of a data store: a shared folder, a Redis server, or ProxyStore endpoints.

ProxyStore's connectors transfer the bytes. Its stores and proxies are not used: they pickle, share one name for
every experiment of a process, and clear a whole Redis server.
"""

import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

REDIS_PASSWORD = "FEDSPALLM_REDIS_PASSWORD"  # environment variable
CONNECT, ANSWER = 30, 300  # timeouts of a Redis server, in seconds
PREFIX = "fedspallm"  # of every object's name if other applications use the same place


class Objects(ABC):
    """A place for bytes with the methods that a data store needs, based on a ProxyStore connector.

    Attributes:
        connector: the connector.
    """

    connector: Any

    @abstractmethod
    def key(self, name: str) -> Any:
        """What the connector calls an object."""

    def put(self, name: str, data: bytes) -> None:
        """Place an object, in place of an earlier one of that name."""
        self.connector.set(self.key(name), data)

    def get(self, name: str, most: int | None = None) -> bytes | None:
        """Read an object; of a larger one, read at most `most + 1` bytes if the place supports that."""
        return self.connector.get(self.key(name))

    def evict(self, name: str) -> None:
        """Remove an object if it exists."""
        self.connector.evict(self.key(name))

    def clear(self, names: Iterable[str]) -> None:
        """Remove what is left of the run, which may include objects of these names."""
        for name in names:
            self.evict(name)

    def close(self) -> None:
        """Close the place."""
        self.connector.close()


class FolderObjects(Objects):
    """Files in a separate folder for the run."""

    def __init__(self, settings: Mapping[str, Any], run: str, create: bool) -> None:
        from proxystore.connectors.file import FileConnector

        self._folder = Path(str(settings["folder"])).expanduser() / run
        if not self._folder.parent.is_dir():
            raise FileNotFoundError(f"{self._folder.parent} is not a folder on this machine")
        if create:
            self._folder.mkdir(exist_ok=True)  # there already where the run goes on
        if not self._folder.is_dir():
            raise FileNotFoundError(f"{self._folder} is not a folder on this machine")
        self.connector = FileConnector(str(self._folder), clear=False)

    def key(self, name: str) -> Any:
        """What the connector calls an object."""
        from proxystore.connectors.file import FileKey

        return FileKey(filename=name)

    def get(self, name: str, most: int | None = None) -> bytes | None:
        """Read a regular file, and refuse anything else: a pipe would block, a device never ends."""
        if not self.connector.exists(self.key(name)):
            return None
        with os.fdopen(os.open(self._folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(f"{name} is not a regular file")
            return file.read(-1 if most is None else most + 1)

    def clear(self, names: Iterable[str]) -> None:
        """Remove the folder."""
        self.connector.close(clear=True)


class RedisObjects(Objects):
    """Values on a Redis server, under keys that begin with the run's name."""

    def __init__(self, settings: Mapping[str, Any], run: str) -> None:
        import redis
        from proxystore.connectors.redis import RedisConnector

        host, port, tls = str(settings["host"]), int(settings["port"]), bool(settings.get("tls"))
        self._run = run
        password = os.environ.get(REDIS_PASSWORD)
        self._client = redis.Redis(
            host=host, port=port, ssl=tls, password=password, socket_connect_timeout=CONNECT, socket_timeout=ANSWER
        )
        try:
            self._client.ping()  # it connects on first use
        except redis.AuthenticationError as error:
            raise PermissionError(
                f"{error}; set {REDIS_PASSWORD} in the environment, at a site in worker_init"
            ) from error
        self.connector = RedisConnector(host, port, clear=False)
        self.connector._redis_client = self._client  # its own client supports neither password nor TLS

    def key(self, name: str) -> Any:
        """What the connector calls an object."""
        from proxystore.connectors.redis import RedisKey

        return RedisKey(redis_key=f"{PREFIX}/{self._run}/{name}")

    def get(self, name: str, most: int | None = None) -> bytes | None:
        """Read a value; of one that is too long, only the beginning."""
        key = self.key(name).redis_key
        if most is None:
            return self.connector.get(self.key(name))
        found: Any = self._client.getrange(key, 0, most)
        return found or (b"" if self._client.exists(key) else None)

    def clear(self, names: Iterable[str]) -> None:
        """Remove all keys that begin with the run's name, and no others."""
        for key in self._client.scan_iter(match=f"{PREFIX}/{self._run}/*"):
            self._client.delete(key)


class EndpointObjects(Objects):
    """Objects at the first of several ProxyStore endpoints; each machine uses its local endpoint, which asks that one."""

    def __init__(self, settings: Mapping[str, Any], run: str) -> None:
        from proxystore.connectors.endpoint import EndpointConnector

        endpoints = [str(endpoint) for endpoint in settings["endpoints"]]
        self._run, self._home = run, endpoints[0]
        self.connector = EndpointConnector(endpoints)

    def key(self, name: str) -> Any:
        """What the connector calls an object."""
        from proxystore.connectors.endpoint import EndpointKey

        return EndpointKey(object_id=f"{PREFIX}.{self._run}.{name}", endpoint_id=self._home)
