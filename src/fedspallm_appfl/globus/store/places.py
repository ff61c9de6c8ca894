"""The place of a payload: the data store if it is large, otherwise the message itself."""

import base64
from collections.abc import Callable, Mapping
from typing import Any

from fedspallm_appfl.errors import UpdateError
from fedspallm_appfl.globus.store.data_store import DataStore
from fedspallm_appfl.wire.as_bytes import from_bytes, to_bytes

SMALL = 2**14  # payloads of at most this many bytes are not stored as objects


def placed(
    payload: Any, store: DataStore | None, name: str, leaves: Callable[[bytes], None] = lambda data: None
) -> dict[str, Any]:
    """Put a payload into the store or into the returned dict, which says where it is; `leaves` is told its bytes."""
    data = to_bytes(payload)
    leaves(data)
    if store is None or len(data) <= SMALL:
        return {"inline": base64.b64encode(data).decode()}
    store.put(name, data)
    return {"stored": name, "bytes": len(data)}


def fetched(place: Mapping[str, Any], store: DataStore | None, sender: str, most: int | None = None) -> Any:
    """The payload at a place that `placed` returned.

    Args:
        place: where it is.
        store: the data store, if there is one.
        sender: whom to name in errors.
        most: maximum size in the store in bytes; None for no limit.

    Raises:
        UpdateError: it cannot be read.
        DataStoreError: it is not in the store, or larger.
    """
    if store is not None and isinstance(place.get("stored"), str):
        return from_bytes(store.get(place["stored"], most), sender)
    try:
        data = base64.b64decode(place["inline"], validate=True)
    except (KeyError, TypeError, ValueError) as error:
        raise UpdateError(
            f"refused an update from {sender}: it is neither in the data store nor in the result"
        ) from error
    return from_bytes(data, sender)
