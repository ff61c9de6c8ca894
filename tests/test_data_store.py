"""The data store: objects of one run, and nothing of another's; Redis is in the tests with real services."""

import pytest

from fedspallm_appfl.data_store import DataStore, open_store
from fedspallm_appfl.errors import DataStoreError


@pytest.fixture
def settings(tmp_path):
    return {"connector": "file", "folder": str(tmp_path), "host": "127.0.0.1", "port": 6379}


def test_an_object_is_there_until_it_is_removed(settings):
    server, client = DataStore(settings, "run", create=True), DataStore(settings, "run")
    client.put("a.0", b"hello")
    assert server.get("a.0") == b"hello"
    server.evict("a.0")
    server.evict("a.0")
    with pytest.raises(DataStoreError, match="holds no object a.0"):
        server.get("a.0")


def test_the_end_of_a_run_removes_its_objects_alone(settings, tmp_path):
    one, other = (DataStore(settings, run, create=True) for run in ("one", "other"))
    one.put("a.0", b"1")
    other.put("a.0", b"2")
    (tmp_path / "somebody-elses").touch()
    one.close(clear=True)
    assert other.get("a.0") == b"2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "somebody-elses"]


def test_a_client_that_comes_late_finds_no_run_and_leaves_nothing(settings, tmp_path):
    server, client = DataStore(settings, "run", create=True), DataStore(settings, "run")
    server.close(clear=True)
    with pytest.raises(DataStoreError, match="cannot be written"):
        client.put("a.0", b"late")
    with pytest.raises(DataStoreError, match="is no folder on this machine"):
        DataStore(settings, "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "a b", "/etc/passwd"])
def test_a_name_is_one_file_name(settings, name):
    store = DataStore(settings, "run", create=True)
    with pytest.raises(DataStoreError, match="a name of the data store has letters"):
        store.get(name)


def test_a_store_that_is_not_there_is_named(settings, tmp_path):
    with pytest.raises(DataStoreError, match="cannot be reached .FileNotFoundError.*comm_configs.store"):
        DataStore({**settings, "folder": str(tmp_path / "gone")}, "run", create=True)
    with pytest.raises(DataStoreError, match="data store in Redis at 127.0.0.1:1: cannot be reached"):
        DataStore({**settings, "connector": "redis", "port": 1}, "run")
    assert open_store({"connector": "none"}, "run") is None
