"""`fedspallm watch`: it ends with the run, reads only, and imports nothing heavy."""

import io
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from fedspallm_appfl import cli
from fedspallm_appfl.cli import watch
from fedspallm_appfl.errors import PruningError, Terminated
from fedspallm_appfl.runs.experiment import conduct
from fedspallm_appfl.runs.run_dir import locked
from fedspallm_appfl.settings.schema import Client, Config

START = {"event": "start", "clients": ["ann"], "rounds": 1, "version": "1", "time": 0.0}
UPLOAD = {
    "event": "upload",
    "round": 0,
    "exchange": 0,
    "exchanges": 1,
    "counted": [0, 1],
    "client": "ann",
    "message": 0,
    "messages": 1,
}
UPLOAD |= {"blocks": "0", "block_bytes": {"0": 7}, "bytes": 7, "time": 1.0}
END = {"event": "end", "versions": "", "time": 2.0}
FAILED = {"event": "failed", "why": "client ann, block 0: no room", "time": 2.0}


def write(folder, *events, mode="a"):
    folder.mkdir(exist_ok=True)
    with (folder / "metrics.jsonl").open(mode) as file:
        file.writelines(json.dumps(event) + "\n" for event in events)


@pytest.fixture
def watched(tmp_path, capsys, monkeypatch):
    """Watch a run, doing something between two looks; gives exit code, output and error output."""

    def watched(*steps, words=(), terminal=False):
        left = iter(steps)

        def sleep(seconds):
            step = next(left)
            step() if callable(step) else write(tmp_path / "run", *step)

        monkeypatch.setattr(watch, "time", SimpleNamespace(time=lambda: 0.0, sleep=sleep))
        shown = io.StringIO()
        if terminal:
            console = Console(file=shown, width=80, height=24, force_terminal=True, color_system=None)
            monkeypatch.setattr(watch, "console", lambda: console)
        code = cli.main(["watch", str(tmp_path / "run"), *words])
        out, err = capsys.readouterr()
        return code, shown.getvalue() + out, err

    return watched


@pytest.mark.parametrize("terminal", [False, True])
def test_it_waits_for_a_run_and_ends_with_it(watched, terminal):
    code, out, err = watched([], [START], [UPLOAD, END], terminal=terminal)
    assert (code, err) == (0, "")
    assert "waiting for a run" in out
    assert ("\x1b[" in out) == terminal
    assert ("round 1/1  client ann  block 0  1/1" in out.splitlines()) != terminal
    assert "finished" in out


@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_that_fails_ends_it_with_its_message(watched, terminal):
    code, _, err = watched([START], [UPLOAD, FAILED], terminal=terminal)
    assert code == 2
    assert err.startswith("error: the run in ") and err.endswith(
        " ended before its time: client ann, block 0: no room\n"
    )


def test_a_run_that_is_begun_anew_is_followed(watched, tmp_path):
    def begin_anew():
        (tmp_path / "run" / "metrics.jsonl").unlink()
        write(tmp_path / "run", START | {"rounds": 3})

    code, out, _ = watched([START, UPLOAD], begin_anew, [UPLOAD, END])
    assert code == 0
    lines = [line for line in out.splitlines() if line.startswith(("another", "round"))]
    assert lines == [
        "round 1/1  client ann  block 0  1/1",
        "another run begins",
        "round 1/3  client ann  block 0  1/3",
    ]


@pytest.mark.parametrize(("event", "code"), [(UPLOAD, 0), (END, 0), (FAILED, 2)])
def test_one_picture_is_shown_and_nothing_written(watched, tmp_path, event, code):
    write(tmp_path / "run", START, event)
    before = (tmp_path / "run" / "metrics.jsonl").stat()
    found, out, _ = watched(words=["--once"])
    assert found == code
    assert "ann" in out
    [file] = (tmp_path / "run").iterdir()
    assert (file.name, file.stat().st_mtime_ns) == ("metrics.jsonl", before.st_mtime_ns)


def test_the_title_names_model_algorithm_and_target_where_the_configuration_is_there(watched, tmp_path):
    write(tmp_path / "run", START)
    train = {"pruner": "wanda", "sparsity": "2:4"}
    config = {"model": {"path": "a/tiny"}, "algorithm": "gram", "client_configs": {"train_configs": train}}
    (tmp_path / "run" / "config.yaml").write_text(json.dumps(config))
    assert "tiny, gram with wanda, sparsity 2:4" in watched(words=["--once"])[1].replace("\n", " ")


def test_there_is_no_picture_of_nothing(watched):
    code, out, err = watched(words=["--once"])
    assert (code, out) == (2, "") and "holds no run that has begun" in err


def test_a_run_that_was_killed_is_noticed_by_its_lock(watched, tmp_path, monkeypatch):
    write(tmp_path / "run", START, UPLOAD)
    os.utime(tmp_path / "run" / "metrics.jsonl", (-60, -60))
    with locked(tmp_path / "run", ""):
        assert watched(words=["--once"])[0] == 0
    code, _, err = watched([])
    assert watched(words=["--once"])[1].splitlines()[1] == "cut off"
    assert code == 2 and "was cut off" in err and "fedspallm resume" in err


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (PruningError("client ann, block 0: no inverse"), "client ann, block 0: no inverse"),
        (ValueError("no number\nand advice"), "ValueError: no number"),
        (KeyboardInterrupt(), "interrupted"),
        (Terminated("SIGTERM"), "ended by SIGTERM"),
    ],
)
def test_a_run_says_why_it_ends_before_its_time(watched, tmp_path, error, why):
    def launch(*told):
        raise error

    config = Config(run_dir=str(tmp_path / "run"), clients=[Client(client_id="ann")])
    with pytest.raises(type(error)):
        conduct(config, launch, overwrite=False)
    code, out, err = watched(words=["--once"])
    assert code == 2 and why in out and f" ended before its time: {why}; fedspallm resume " in err


def test_ctrl_c_ends_it(watched):
    def press():
        raise KeyboardInterrupt

    assert watched([START], press)[::2] == (130, "interrupted\n")


def test_it_needs_nothing_heavy(tmp_path):
    write(tmp_path, START, END)
    code = f"""
import sys
from fedspallm_appfl.cli import main
assert main(["watch", {str(tmp_path)!r}]) == main(["watch", {str(tmp_path)!r}, "--once"]) == 0
print(sorted({{"torch", "transformers", "appfl", "numpy"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
