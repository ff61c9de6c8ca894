"""`fedspallm init`: what it writes is ready to run, and answers come from options or from whoever sits there."""

import json
import sys

import torch
import yaml

from fedspallm_appfl import cli, devices
from fedspallm_appfl.cli.before.init import QUESTIONS
from fedspallm_appfl.settings.reading import load_config
from helpers.paths import DEMO

TEXTS = {name: str(DEMO / "text" / name / "calib.txt") for name in ("austen", "bible")}
PAIRS = [f"{name}={path}" for name, path in TEXTS.items()]
MODEL = str(DEMO / "model")


def begun(file, *words):
    assert cli.main(["init", str(file), *words]) == 0
    config, problems = load_config(file)
    assert problems == []
    return config


def odd(folder):
    """A text whose path looks like a reference."""
    file = folder / "${x}.txt"
    file.write_text("words " * 20_000)
    return file


def refused(capsys, *words):
    assert cli.main(["init", *map(str, words)]) == 2
    return capsys.readouterr().err


def test_what_is_written_prunes_the_texts_and_shows_quality(tmp_path):
    file = tmp_path / "mine.yaml"
    config = begun(file, "--model", MODEL, "--clients", *PAIRS, "--sparsity", "2:4")
    assert [(one.client_id, one.data.text) for one in config.clients] == list(TEXTS.items())
    run, data = tmp_path / "run", config.client_configs.data
    assert data.windows > 8
    few = ["client_configs.data.windows=4", "client_configs.data.length=32", "evaluation.length=32"]
    assert cli.main(["run", str(file), f"run_dir={run}", *few]) == 0
    assert json.loads((run / "manifest.json").read_text())["target"] == "2:4"
    assert "own" in (run / "report.md").read_text()


def test_paths_are_relative_to_the_file_and_names_stay(tmp_path):
    (tmp_path / "texts").mkdir()
    for name in ("a b.txt", "c.txt", "-dä.txt"):
        (tmp_path / "texts" / name).write_text((DEMO / "text" / "austen" / "calib.txt").read_text())
    begun(
        tmp_path / "mine.yaml",
        "--model",
        MODEL,
        "--clients",
        str(tmp_path / "texts"),
        "--evaluate",
        f"x={PAIRS[0][7:]}",
    )
    written = yaml.safe_load((tmp_path / "mine.yaml").read_text())
    assert {one["client_id"]: one["data"]["text"] for one in written["clients"]} == {
        "a-b": str(tmp_path / "texts" / "a b.txt"),  # not everything may stand within an interpolation
        "c": "${here:texts/c.txt}",
        "d": str(tmp_path / "texts" / "-dä.txt"),
    }
    assert list(written["evaluation"]["texts"]) == ["x"]


def test_of_a_folder_what_is_no_text_is_left_out_and_everybody_sees_who_the_clients_are(tmp_path, capsys):
    folder = tmp_path / "notes"
    for name, letters in (("cardio/a.txt", 60_000), ("onco.txt", 30_000), ("README.pdf", 9), ("__pycache__/a.pyc", 9)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text((DEMO / "text" / "bible" / "calib.txt").read_text()[:letters])
    held_out = f"held={folder / 'onco.txt'}"
    begun(tmp_path / "mine.yaml", "--model", MODEL, "--clients", str(folder), "--evaluate", held_out)
    said = capsys.readouterr().out.replace("\n", " ")
    assert f"client cardio: {folder / 'cardio'} client onco: {folder / 'onco.txt'} " in said
    assert "not text, left out: README.pdf, __pycache__ client onco has the shortest text, " in said
    assert "evaluation.texts.held is a text of client onco too, and so not held out" in said
    command = ("validate", str(tmp_path / "mine.yaml"), f"clients.0.data.text={folder / 'onco.txt'}")
    assert cli.main(command) == 0
    assert "client onco and client cardio have the same text: " in capsys.readouterr().out


def test_windows_are_fewer_and_shorter_where_texts_are_short(tmp_path):
    short = tmp_path / "short.txt"
    short.write_text((DEMO / "text" / "austen" / "calib.txt").read_text()[:30_000])
    data = begun(tmp_path / "mine.yaml", "--model", MODEL, "--clients", f"a={short}").client_configs.data
    assert data.length == 256
    assert 1 <= data.windows < 128


def test_questions_are_asked_in_order_and_take_a_default(tmp_path, monkeypatch):
    asked, typed = [], iter([MODEL, "", " ".join(PAIRS), "", "fast", ""])

    def ask(self, words, **_):
        asked.append(words)
        return next(typed)

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("rich.console.Console.input", ask)
    config = begun(tmp_path / "mine.yaml")
    words = [one.words for one in QUESTIONS]
    assert [next(word for word in words if shown.startswith(word)) for shown in asked] == [*words[:2], *words[1:]]
    assert str(config.client_configs.train_configs.sparsity) == "0.5"
    assert (config.algorithm, config.client_configs.train_configs.pruner) == ("fedprllm", "wanda")


def test_what_is_missing_or_wrong_is_named_and_nothing_is_written(tmp_path, capsys, monkeypatch):
    file = tmp_path / "mine.yaml"
    assert "--model is missing, and nobody can be asked" in refused(capsys, file)
    model = ["--model", MODEL, "--clients"]
    assert "is not a folder; name each client's text as NAME=PATH" in refused(capsys, file, *model, tmp_path / "no")
    assert "for each client, with different names, got nothing" in refused(capsys, file, *model, tmp_path)
    assert "expected NAME=PATH for each, with different names" in refused(capsys, file, *model, "a=x", "a=y")
    assert "nosuch/model" in refused(capsys, file, "--model", "nosuch/model", "--clients", *PAIRS)
    assert "sparsity" in refused(capsys, file, *model, *PAIRS, "--sparsity", "7")
    assert "sparsity: " in refused(capsys, file, *model, *PAIRS, "--sparsity", "[")
    assert "holds ${" in refused(capsys, file, *model, f"a={odd(tmp_path)}")
    assert not file.exists()
    assert "cannot be written" in refused(capsys, TEXTS["bible"] + "/x.yaml", *model, *PAIRS)
    file.write_text("mine")
    assert "is there already" in refused(capsys, file, *model, *PAIRS)
    assert file.read_text() == "mine"


def test_arithmetic_that_is_slow_here_is_not_chosen(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for times, dtype in ((8.0, "float32"), (1.0, "auto")):
        monkeypatch.setattr(devices, "slowdown", lambda dtype, times=times: times)
        config = begun(tmp_path / f"{dtype}.yaml", "--model", MODEL, "--clients", *PAIRS)
        assert config.model.dtype == dtype
    assert "sparsity: 0.5\n" in (tmp_path / "auto.yaml").read_text()
