"""The data store for payloads that are too large for a Globus Compute task: the objects of one run, in a shared place.

Only the server chooses names. A client can therefore not decide what is read or removed.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fedspallm_appfl.errors import DataStoreError, first_line
from fedspallm_appfl.globus.store.objects import EndpointObjects, FolderObjects, Objects, RedisObjects
from fedspallm_appfl.globus.store.s3 import Bucket, Links

MARK = "run"  # name of the object that is there as long as its run is
GREETING = "greeting"  # of the one that clients read to see that they reach the store


class DataStore:
    """The objects of one run.

    Attributes:
        settings: as in the configuration; for a site as returned by `lend`.
        run: the run's name, part of every object's.
    """

    def __init__(self, settings: Mapping[str, Any], run: str, create: bool = False) -> None:
        """Connect.

        Args:
            settings: `connector`, and what it needs.
            run: a name that no other run has.
            create: begin a run; clients only join one, so a late client leaves nothing behind.

        Raises:
            DataStoreError: it cannot be reached, or the run is over.
        """
        self.settings = dict(settings)
        self.run = _checked(run)
        self._joined = not create
        self.names: set[str] = set()  # of objects that may be there
        with self._trouble("reached"):
            self._objects = self._open(create)
        if create:
            self.put(MARK, b"1")
        else:
            self._require_run()

    def _open(self, create: bool) -> Objects | Bucket | Links:
        connector = self.settings["connector"]
        if connector == "s3":
            return Bucket(self.settings, self.run) if create else Links(self.settings["links"])
        if connector == "file":
            return FolderObjects(self.settings, self.run, create)
        return {"redis": RedisObjects, "endpoint": EndpointObjects}[connector](self.settings, self.run)

    def _require_run(self) -> None:
        with self._trouble("reached"):
            mark = self._objects.get(MARK)
        if mark is None:
            raise DataStoreError(f"{self}: the run {self.run} is over, or its server uses another store")

    def put(self, name: str, data: bytes) -> None:
        """Write an object, and replace an earlier one of that name.

        Raises:
            DataStoreError: the store cannot be reached, or the run is over.
        """
        if self._joined:
            self._require_run()
        self.names.add(_checked(name))
        with self._trouble("written"):
            self._objects.put(name, data)

    def get(self, name: str, most: int | None = None) -> bytes:
        """Read an object.

        Args:
            name: its name.
            most: maximum size in bytes; None for no limit.

        Raises:
            DataStoreError: it does not exist, it is too large, or the store cannot be reached.
        """
        _checked(name)
        with self._trouble("read"):
            data = self._objects.get(name, most)
        if data is None:
            raise DataStoreError(f"{self}: holds no object {name}; it was never written, or was removed")
        if most is not None and len(data) > most:
            raise DataStoreError(f"{self}: the object {name} has more than the allowed {most} bytes")
        return data

    def evict(self, name: str) -> None:
        """Remove an object if it exists; only the server does this."""
        _checked(name)
        with self._trouble("cleared"):
            self._of_the_server.evict(name)
        self.names.discard(name)

    @property
    def _of_the_server(self) -> Objects | Bucket:
        if isinstance(self._objects, Links):
            raise PermissionError("a site removes nothing from the bucket")
        return self._objects

    def lend(self, reads: Iterable[str], writes: Iterable[str], seconds: float | None = None) -> dict[str, Any]:
        """Settings with which a site opens this store.

        Args:
            reads: names of objects that it will read.
            writes: names of objects that it may write.
            seconds: how long it may need them; None for the maximum.
        """
        writes = [_checked(name) for name in writes]
        self.names.update(writes)
        if not isinstance(self._objects, Bucket):
            return self.settings
        with self._trouble("used"):
            links = self._objects.links([MARK, *map(_checked, reads)], writes, seconds)
        return {"connector": "s3", "links": links}

    def close(self, clear: bool = False) -> None:
        """Close the store; `clear` removes what is left of this run, never anything of another."""
        with self._trouble("closed"):
            try:
                if clear:
                    self._of_the_server.clear(set(self.names))
            finally:
                self._objects.close()

    def __str__(self) -> str:
        return f"data store in {place(self.settings)}"

    def __enter__(self) -> "DataStore":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    @contextmanager
    def _trouble(self, what: str) -> Iterator[None]:
        try:
            yield
        except DataStoreError:
            raise
        except Exception as error:  # each connector has its own errors
            raise DataStoreError(
                f"{self}: cannot be {what} ({type(error).__name__}: {first_line(error)}); check {self._to_check()}"
            ) from error

    def _to_check(self) -> str:
        where = "client_configs.comm_configs.store"
        if self._joined and "links" in self.settings:
            return "whether this site can reach it; the link may have expired"
        if self.settings["connector"] == "s3":
            return f"{where}, and on the server the credentials that boto3 finds (AWS_PROFILE, AWS_ACCESS_KEY_ID, ...)"
        if not self._joined:
            return where
        return f"{where}, or `store` in the site file if a site reaches it another way"


def place(settings: Mapping[str, Any]) -> str:
    """The place of the objects, as readable text."""
    connector = settings["connector"]
    if connector == "file":
        return f"the folder {settings['folder']}"
    if connector == "redis":
        return f"Redis at {settings['host']}:{settings['port']}"
    if connector == "endpoint":
        return f"the ProxyStore endpoint {settings['endpoints'][0]}"
    return f"the S3 bucket {settings['bucket']}" if "bucket" in settings else "S3"  # a site has only links


def open_store(settings: Mapping[str, Any], run: str, create: bool = False) -> DataStore | None:
    """The data store of a run; None if everything is sent with the tasks."""
    return None if settings["connector"] == "none" else DataStore(settings, run, create)


def _checked(name: str) -> str:
    """Check that a name is a single file name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name, re.ASCII):
        raise DataStoreError(f"a name in the data store may have only letters, digits, '-', '_' and '.', got {name!r}")
    return name
