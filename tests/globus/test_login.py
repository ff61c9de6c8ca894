"""What somebody sees who is not logged in, or whose machine does not reach the service."""

import socket
import sys

import pytest
import yaml

from fedspallm_appfl.cli import main
from fedspallm_appfl.globus.server import login as globus_login
from helpers.experiments import small_config


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A configuration with endpoints, on a machine that knows no login."""
    for key in ("GLOBUS_COMPUTE_CLIENT_ID", "GLOBUS_COMPUTE_CLIENT_SECRET", "GLOBUS_SDK_ENVIRONMENT"):
        monkeypatch.delenv(key, raising=False)
    for key in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(key, "127.0.0.1")
    monkeypatch.setenv("GLOBUS_COMPUTE_USER_DIR", str(tmp_path / "home"))
    file = small_config(tmp_path, 1)
    raw = yaml.safe_load(file.read_text())
    raw["clients"][0]["endpoint_id"] = "00000000-0000-4000-8000-000000000001"
    file.write_text(yaml.safe_dump(raw))
    return file


class Terminal:
    """A standard input that fails the test if anybody reads it."""

    def isatty(self):
        return True

    def readline(self, *_):
        raise AssertionError("there was a prompt")

    read = fileno = readline


@pytest.mark.parametrize("command", [("doctor",), ("run", "--launcher", "globus")], ids=lambda words: words[0])
def test_who_is_not_logged_in_is_told_how_to_and_asked_nothing(config, tmp_path, monkeypatch, capsys, command):
    monkeypatch.setattr(globus_login, "_reach", lambda url: None)
    monkeypatch.setattr(sys, "stdin", Terminal())
    assert main([command[0], str(config), *command[1:]]) == 2
    out, err = capsys.readouterr()
    assert err == f"error: you are not logged in to Globus Compute; {globus_login.HOW}\n"
    assert "authenticate" not in out and "Code" not in out
    assert not (tmp_path / "run").exists()


def test_half_of_the_credentials_are_named(config, monkeypatch, capsys):
    monkeypatch.setattr(globus_login, "_reach", lambda url: None)
    monkeypatch.setenv("GLOBUS_COMPUTE_CLIENT_SECRET", "x")
    assert main(["doctor", str(config)]) == 2
    assert "Both GLOBUS_COMPUTE_CLIENT_ID and GLOBUS_COMPUTE_CLIENT_SECRET must" in capsys.readouterr().err


def test_a_service_that_cannot_be_reached_is_named_at_once(config, monkeypatch, capsys):
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setattr(globus_login, "get_web_service_url", lambda: url)
        assert main(["doctor", str(config)]) == 2
    err = capsys.readouterr().err
    assert f"the Globus Compute service at {url} cannot be reached: " in err and "refused" in err
    assert err.count("\n") == 1


def test_a_service_that_is_silent_is_not_waited_for(config, monkeypatch, capsys):
    monkeypatch.setattr(globus_login, "PATIENCE", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(globus_login, "get_web_service_url", lambda: url)
        assert main(["doctor", str(config)]) == 2
    assert f"{url} cannot be reached: timed out" in capsys.readouterr().err
