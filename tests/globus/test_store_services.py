"""Data stores with services of their own: Redis with a password and TLS, and an endpoint of ProxyStore."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import redis

from fedspallm_appfl.errors import DataStoreError
from fedspallm_appfl.globus.store.data_store import DataStore
from helpers import processes
from helpers.globus_double.world import free_port, listens, missing, wait_until

pytestmark = [
    pytest.mark.globus,
    pytest.mark.skipif(bool(missing()), reason=f"not installed: {', '.join(missing())}"),
]
PASSWORD = "of-this-test"


@pytest.fixture
def service(tmp_path):
    """Start a server; it is ended after the test."""
    started = []

    def start(port, *command, **environment):
        with (tmp_path / "service.log").open("ab") as log:
            process = subprocess.Popen(
                [str(word) for word in command], env=os.environ | environment, stdout=log, stderr=log
            )
        started.append(process)
        wait_until(lambda: listens(port), command[0], process=process)

    yield start
    for process in started:
        processes.end(process)


def goes_through(settings):
    """An object each way, and nothing is left."""
    server = DataStore(settings, "this-run", create=True)
    server.put("down.0", b"x" * 10**6)
    site = DataStore(server.lend(["down.0"], ["a.0"]), "this-run")
    site.put("a.0", site.get("down.0"))
    assert server.get("a.0", most=10**6) == b"x" * 10**6
    server.evict("a.0")
    with pytest.raises(DataStoreError, match=r"holds no object a\.0"):
        server.get("a.0", most=10**6)
    site.put("a.0", b"left")
    server.close(clear=True)
    with pytest.raises(DataStoreError, match="the run this-run is over"):
        site.put("a.0", b"late")


def test_redis_with_a_password_and_tls(service, tmp_path, monkeypatch):
    port, key, certificate = free_port(), tmp_path / "key.pem", tmp_path / "certificate.pem"
    for_us = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, *for_us]
    assert processes.run(*make)[0] == 0
    tls = ["--port", 0, "--tls-port", port, "--tls-cert-file", certificate, "--tls-key-file", key]
    tls += ["--tls-ca-cert-file", certificate, "--tls-auth-clients", "no"]
    service(
        port, "redis-server", *tls, "--bind", "127.0.0.1", "--requirepass", PASSWORD, "--save", "", "--dir", tmp_path
    )
    settings = {"connector": "redis", "host": "127.0.0.1", "port": port, "tls": True}
    with pytest.raises(DataStoreError, match="cannot be reached .*CERTIFICATE_VERIFY_FAILED"):
        DataStore(settings, "this-run", create=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with pytest.raises(DataStoreError, match="set FEDSPALLM_REDIS_PASSWORD"):
        DataStore(settings, "this-run", create=True)
    monkeypatch.setenv("FEDSPALLM_REDIS_PASSWORD", PASSWORD)
    others = redis.Redis("127.0.0.1", port, ssl=True, password=PASSWORD)
    others.set("fedspallm/another-run/a.0", "1")
    goes_through(settings)
    assert others.keys() == [b"fedspallm/another-run/a.0"]


def test_an_endpoint_of_proxystore(service, tmp_path, monkeypatch):
    """One for all; between two of them data would go through a relay and WebRTC."""
    port, command = free_port(), Path(sys.executable).parent / "proxystore-endpoint"
    monkeypatch.setenv("PROXYSTORE_HOME", str(tmp_path))
    options = ["--port", port, "--host", "127.0.0.1", "--no-relay-server"]
    assert processes.run(command, "configure", "only", *options, env=dict(os.environ))[0] == 0
    lines = (tmp_path / "only" / "config.toml").read_text().splitlines()
    [uuid] = [line.split('"')[1] for line in lines if line.startswith("uuid")]
    service(port, command, "start", "--no-detach", "only", PROXYSTORE_HOME=str(tmp_path))
    goes_through({"connector": "endpoint", "endpoints": [uuid]})
