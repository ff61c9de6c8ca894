"""Run directories that were left half cleared, and file systems without locks."""

import errno
import fcntl
from pathlib import Path

import pytest

from fedspallm_appfl.errors import ConfigError
from fedspallm_appfl.runs import run_dir
from fedspallm_appfl.settings.reading import load_config
from fedspallm_appfl.settings.schema import Client, Config


@pytest.fixture
def folder(tmp_path):
    """A run directory with all that runs write, and something beside it."""
    (tmp_path / "mine.txt").touch()
    for name in run_dir.OWN:
        (tmp_path / name).write_text("old")
    return tmp_path


@pytest.mark.parametrize("last", run_dir.OWN)
def test_clearing_that_was_interrupted_can_be_repeated(folder, last, monkeypatch):
    config, remove = Config(run_dir=str(folder)), run_dir._remove

    def interrupted(path):
        if path.name == last:
            raise KeyboardInterrupt
        remove(path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_dir, "_remove", interrupted)
        with run_dir.claimed(config, True):
            pass
    with run_dir.claimed(config, True):
        assert {path.name for path in folder.iterdir()} == {"mine.txt", ".lock", "config.yaml", run_dir.MARK}
        assert (folder / run_dir.MARK).read_text() == ""


def test_earlier_results_that_cannot_be_removed_are_named(folder, monkeypatch):
    def denied(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(run_dir, "_remove", denied)
    refused = pytest.raises(ConfigError, match=r"earlier results in .* cannot be removed: .*Permission denied")
    with refused, run_dir.claimed(Config(run_dir=str(folder)), True):
        pass


def test_a_configuration_is_written_for_any_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Config(run_dir="run", clients=[Client(client_id="a", identity="a.key"), Client(client_id="b")])
    config.server_configs.roster = "roster.yaml"
    with run_dir.claimed(config, False) as folder:
        written, problems = load_config(folder / "config.yaml")
    assert problems == []
    assert written.server_configs.roster == str(tmp_path / "roster.yaml")
    assert [client.identity for client in written.clients] == [str(tmp_path / "a.key"), None]


def test_a_lock_that_a_killed_run_left_makes_no_folder_a_foreign_one(tmp_path):
    (tmp_path / ".lock").touch()
    with run_dir.claimed(Config(run_dir=str(tmp_path)), False):
        assert (tmp_path / run_dir.MARK).is_file()
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_and_leaves_nothing_in_the_way(tmp_path, code, monkeypatch):
    def fails(*_):
        raise OSError(code, "no locks here")

    config = Config(run_dir=str(tmp_path / "run"))
    with (
        monkeypatch.context() as patch,
        pytest.raises(ConfigError, match="run_dir: .*/run cannot be locked: .*no locks here; name a folder on"),
    ):
        patch.setattr(fcntl, "flock", fails)
        with run_dir.claimed(config, False):
            pass
    assert run_dir.problem(config, False) is None


def test_scratch_goes_whatever_happens(tmp_path):
    left = Path(tmp_path / "scratch" / "left")
    left.mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt), run_dir.scratch(tmp_path) as state:
        assert state == tmp_path / "scratch"
        assert not left.exists()
        (state / "block").touch()
        raise KeyboardInterrupt
    assert not state.exists()
