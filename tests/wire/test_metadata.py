"""What a client says beside a message is checked the same way however it came."""

import pytest

from fedspallm_appfl.errors import UpdateError
from fedspallm_appfl.wire.metadata import checked_metadata

RIGHT = {"_chunk_idx": 0, "_total_chunks": 2, "samples": 8, "seconds": 0.5, "notes": "", "host": "node-1"}
DEEP = "[" * 100_000


def test_what_is_right_is_read():
    notes = '{"0.up": {"damping": 0.02, "tries": 2}}'
    read = checked_metadata({**RIGHT, "notes": notes, "host": "a b|c", "else": 1}, "client a")
    assert read == {**RIGHT, "notes": {"0.up": {"damping": 0.02, "tries": 2}}, "host": "abc"}


WRONG = [
    ("samples", value) for value in (0, -1, True, "8", 8.0, None, 2**31, 10**5000, float("nan"), [8], {"a": 8})
] + [
    ("_chunk_idx", -1),
    ("_chunk_idx", 2),
    ("_chunk_idx", "0"),
    ("_total_chunks", 0),
    ("_total_chunks", 10**400),
    ("seconds", float("inf")),
    ("seconds", float("nan")),
    ("seconds", -1),
    ("seconds", "1"),
    ("seconds", 10**400),
    ("notes", DEEP),
    ("notes", "{"),
    ("notes", "[1]"),
    ("notes", 7),
    ("notes", '{"a": {"b": "c"}}'),
    ("notes", '{"a": {"b": NaN}}'),
    ("notes", '{"a\\u001b": {"b": 1}}'),
    ("notes", '{"a": {"b": true}}'),
    ("notes", "1" * 5000),
]


@pytest.mark.parametrize(("key", "value"), WRONG, ids=lambda value: str(type(value).__name__))
def test_what_is_not_is_refused_by_name_and_briefly(key, value):
    with pytest.raises(UpdateError, match="refused an update from client a: its (metadata has|notes)") as caught:
        checked_metadata({**RIGHT, key: value}, "client a")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("metadata", [None, [], "x" * 10**6, {}])
def test_metadata_of_another_kind_is_refused(metadata):
    with pytest.raises(UpdateError, match="client a") as caught:
        checked_metadata(metadata, "client a")
    assert len(str(caught.value)) < 500
