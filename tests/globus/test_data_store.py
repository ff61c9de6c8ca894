"""The data store: objects of one run, and nothing of another's."""

import os
import traceback
from urllib.parse import parse_qs, urlsplit

import pytest

from fedspallm_appfl.errors import DataStoreError
from fedspallm_appfl.globus.store.data_store import DataStore, open_store
from helpers.s3_double import BUCKET, REGION, client, keys, s3_service

RUN = "this-run"


@pytest.fixture(scope="module")
def s3():
    with s3_service() as url:
        yield url


@pytest.fixture
def bucket(s3, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "server")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    return {"connector": "s3", "bucket": BUCKET, "url": s3}


@pytest.fixture(params=["file", "s3"])
def settings(request, tmp_path, bucket):
    return bucket if request.param == "s3" else {"connector": "file", "folder": str(tmp_path)}


def site_of(server, reads=(), writes=()):
    return DataStore(server.lend(reads, writes, 60), server.run)


def test_an_object_is_there_until_it_is_removed(settings):
    server = DataStore(settings, RUN, create=True)
    server.put("down.0", b"hello")
    site = site_of(server, ["down.0"], ["a.0"])
    site.put("a.0", site.get("down.0") * 2)
    assert server.get("a.0", most=10) == b"hellohello"
    with pytest.raises(DataStoreError, match="the object a.0 has more than the allowed 9 bytes"):
        server.get("a.0", most=9)
    server.evict("a.0")
    server.evict("a.0")
    with pytest.raises(DataStoreError, match=r"holds no object a\.0"):
        server.get("a.0")
    with pytest.raises(DataStoreError, match=r"holds no object a\.0"):
        server.get("a.0", most=10)
    server.close(clear=True)


def test_the_end_of_a_run_removes_its_objects_alone(settings):
    one, other = (DataStore(settings, run, create=True) for run in ("one", "one-more"))
    one.put("a.0", b"1")
    other.put("a.0", b"2")
    one.close(clear=True)
    assert other.get("a.0") == b"2"
    other.close(clear=True)


def test_what_others_keep_in_the_same_place_stays(settings, tmp_path, s3):
    (tmp_path / "somebody-elses").touch()
    client(s3).put_object(Bucket=BUCKET, Key="fedspallm/somebody-elses")
    server = DataStore(settings, RUN, create=True)
    server.put("a.0", b"1")
    server.close(clear=True)
    assert [path.name for path in tmp_path.iterdir()] == ["somebody-elses"]
    assert keys(s3) == ["fedspallm/somebody-elses"]
    client(s3).delete_object(Bucket=BUCKET, Key="fedspallm/somebody-elses")


def test_a_client_that_comes_late_finds_no_run_and_leaves_nothing(settings, tmp_path, s3):
    server = DataStore(settings, RUN, create=True)
    lent = server.lend([], ["a.0"])
    site = DataStore(lent, RUN)
    server.close(clear=True)
    with pytest.raises(DataStoreError, match="is over|is not a folder on this machine"):
        site.put("a.0", b"late")
    with pytest.raises(DataStoreError, match="is over|is not a folder on this machine"):
        DataStore(lent, RUN)
    assert list(tmp_path.iterdir()) == keys(s3) == []


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "a b", "/etc/passwd"])
def test_a_name_is_one_file_name(settings, name):
    store = DataStore(settings, RUN, create=True)
    for use in (store.get, store.evict, lambda name: store.put(name, b""), lambda name: store.lend([], [name])):
        with pytest.raises(DataStoreError, match="a name in the data store may have only letters"):
            use(name)
    store.close(clear=True)


def test_a_site_gets_links_for_its_own_objects_and_no_credentials(bucket, monkeypatch):
    server = DataStore(bucket, RUN, create=True)
    server.put("b.0", b"another client's")
    lent = server.lend([], ["a.0"], seconds=60)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    site = DataStore(lent, RUN)
    site.put("a.0", b"mine")
    for name, use in (("b.0", site.get), ("a.0", site.get), ("b.0", lambda name: site.put(name, b""))):
        with pytest.raises(DataStoreError, match=f"the server gave no link to (get|put) {name}"):
            use(name)
    with pytest.raises(DataStoreError, match="a site removes nothing"):
        site.evict("a.0")
    assert set(lent) == {"connector", "links"}
    [link] = lent["links"]["put"].values()
    query = parse_qs(urlsplit(link).query)
    assert query["X-Amz-Expires"] == ["61"]
    assert query["X-Amz-Credential"][0].split("/")[2] == REGION  # of the bucket
    assert "secret" not in str(lent)
    server.close(clear=True)


def test_what_is_no_file_is_not_read(tmp_path):
    """A pipe would block for ever, a link lead to anything."""
    server = DataStore({"connector": "file", "folder": str(tmp_path)}, RUN, create=True)
    for name, make in (("a.0", os.mkfifo), ("a.1", lambda path: path.symlink_to("/dev/zero")), ("a.2", os.mkdir)):
        make(tmp_path / RUN / name)
        (tmp_path / RUN / f"{name}.ready").touch()
        with pytest.raises(DataStoreError, match="cannot be read"):
            server.get(name, most=10)


def test_links_last_at_most_a_week(bucket):
    server = DataStore(bucket, RUN, create=True)
    [link] = server.lend([], ["a.0"])["links"]["put"].values()
    assert parse_qs(urlsplit(link).query)["X-Amz-Expires"] == [str(7 * 24 * 3600)]
    server.close(clear=True)


def test_an_error_at_a_site_does_not_tell_the_link(bucket, monkeypatch, caplog):
    server = DataStore(bucket, RUN, create=True)
    links = server.lend([], ["a.0"])["links"]
    server.close(clear=True)
    away = {
        verb: {name: link.replace(bucket["url"], "http://127.0.0.1:1") for name, link in of.items()}
        for verb, of in links.items()
    }
    monkeypatch.setattr("fedspallm_appfl.globus.store.s3.TRIES", 1)
    with pytest.raises(DataStoreError, match="ConnectionError: no answer from 127.0.0.1:1") as caught:
        DataStore({"connector": "s3", "links": away}, RUN)
    words = "".join(traceback.format_exception(caught.value))
    assert "127.0.0.1:1" in words and "Signature" not in words + caplog.text


def test_a_store_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataStoreError, match=r"cannot be reached .FileNotFoundError.*comm_configs\.store"):
        DataStore({"connector": "file", "folder": str(tmp_path / "gone")}, RUN, create=True)
    with pytest.raises(DataStoreError, match=r"data store in Redis at 127\.0\.0\.1:1: cannot be reached"):
        DataStore({"connector": "redis", "host": "127.0.0.1", "port": 1}, RUN)
    nobody = "00000000-0000-4000-8000-000000000000"
    with pytest.raises(DataStoreError, match=f"in the ProxyStore endpoint {nobody}: cannot be reached"):
        DataStore({"connector": "endpoint", "endpoints": [nobody]}, RUN)
    assert open_store({"connector": "none"}, RUN) is None


def test_a_bucket_that_is_not_there_is_named(bucket):
    with pytest.raises(DataStoreError, match="in the S3 bucket nobodys: cannot be reached .*there is no such bucket"):
        DataStore({**bucket, "bucket": "nobodys"}, RUN, create=True)
