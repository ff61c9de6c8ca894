"""Classes of a user's file in the place of this package's: what may be named, what it does, and what is wrong with it."""

from collections import OrderedDict

import pytest

from fedspallm_appfl.adaptors.registration import class_of
from fedspallm_appfl.cli import main
from fedspallm_appfl.errors import ConfigError
from fedspallm_appfl.settings.reading import load_config
from fedspallm_appfl.validation.rules import check, check_for_globus
from helpers.processes import fedspallm, finish, without_mpiexec
from helpers.tiny import run, save_tiny, tiny_config

MINE = """
from pathlib import Path

from fedspallm_appfl.adaptors.aggregator import FedSpaLLMAggregator
from fedspallm_appfl.adaptors.scheduler import FedSpaLLMScheduler
from fedspallm_appfl.adaptors.trainer import FedSpaLLMTrainer


def note(words):
    with Path(__file__).with_name("notes.txt").open("a") as notes:
        notes.write(f"{words}\\n")


class Trainer(FedSpaLLMTrainer):
    def train(self, **instructions):
        super().train(**instructions)
        note(f"trainer {self.client_id}")


class Aggregator(FedSpaLLMAggregator):
    def end_exchange(self):
        note(f"aggregator, round {self.round}")
        return super().end_exchange()


class Scheduler(FedSpaLLMScheduler):
    def schedule(self, client_id, local_model, **kwargs):
        assert isinstance(self.aggregator, Aggregator)
        note(f"scheduler {client_id}")
        return super().schedule(client_id, local_model, **kwargs)
"""
NAMED = (
    "server_configs.aggregator=mine.py:Aggregator",
    "server_configs.scheduler=mine.py:Scheduler",
    "client_configs.train_configs.trainer=mine.py:Trainer",
)
SAID = {"trainer austen", "trainer bible", "scheduler austen", "scheduler bible", "aggregator, round 0"}


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """A configuration, with mine.py in the working directory."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    return tiny_config(tmp_path / "experiment", save_tiny(tmp_path / "model"), "fedspallm", 2)


def notes(folder):
    file = folder / "notes.txt"
    return file.read_text().splitlines() if file.exists() else []


def test_subclasses_of_a_file_take_part_in_the_runs_that_name_them(tmp_path, experiment):
    model = (run(experiment, *NAMED) / "model" / "model.safetensors").read_bytes()
    said = notes(tmp_path)
    assert set(said) == SAID
    run(experiment, f"run_dir={tmp_path / 'plain'}")  # in the same process, with the classes of this package
    assert notes(tmp_path) == said
    assert (tmp_path / "plain" / "model" / "model.safetensors").read_bytes() == model


@pytest.mark.mpi
@without_mpiexec
def test_every_rank_finds_its_classes(tmp_path, experiment):
    code, _, err = finish(fedspallm(3, experiment, *NAMED, cwd=tmp_path))
    assert code == 0, err
    assert set(notes(tmp_path)) == SAID


def test_a_class_that_is_not_there_ends_a_run_with_its_key(experiment, capsys):
    assert main(["run", str(experiment), "server_configs.scheduler=mine.py:Shceduler"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "server_configs.scheduler: " in said and "has no class 'Shceduler'" in said


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("Mine", "key: expected OrderedDict, or a subclass as path/to/file.py:ClassName; got 'Mine'"),
        ("own.txt:Mine", "key: expected OrderedDict, or a subclass as path/to/file.py:ClassName; got 'own.txt:Mine'"),
        (
            "nowhere.py:Mine",
            "key: there is no file FOLDER/nowhere.py; a relative path starts from the working directory",
        ),
        ("own.py:Nobody", "key: own.py has no class 'Nobody', only OrderedDict, Mine, Other"),
        ("own.py:function", "key: own.py has no class 'function', only OrderedDict, Mine, Other"),
        ("own.py:Other", "key: Other of own.py is no subclass of collections.OrderedDict; derive it"),
        ("empty.py:Mine", "key: empty.py has no class 'Mine', only none at all"),
        ("raises.py:Mine", "key: FOLDER/raises.py cannot be imported: KeyError: 'x', line 3"),
        (
            "lacks.py:Mine",
            "key: FOLDER/lacks.py cannot be imported: ModuleNotFoundError: No module named 'nobody_has_it'",
        ),
        ("wrong.py:Mine", "key: FOLDER/wrong.py cannot be imported: SyntaxError: invalid syntax (wrong.py, line 1)"),
    ],
)
def test_what_is_wrong_with_a_class_is_said(tmp_path, monkeypatch, value, why):
    files = {
        "own.py": "from collections import OrderedDict\nclass Mine(OrderedDict): pass\nclass Other: pass\n"
        "def function(): pass\n",
        "empty.py": "",
        "raises.py": "def broken():\n    values = {}\n    return values['x']\nbroken()\n",
        "lacks.py": "import nobody_has_it\n",
        "wrong.py": "class = 3\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        class_of(value, OrderedDict, "key")
    assert str(error.value).startswith(why.replace("FOLDER", str(tmp_path)))


def test_a_file_is_imported_once_and_again_after_it_failed(tmp_path):
    file = tmp_path / "own.py"
    file.write_text("raise ValueError('not yet')\n")
    named = f"{file}:Mine"
    with pytest.raises(ConfigError, match="not yet"):
        class_of(named, dict, "key")
    file.write_text("class Mine(dict): pass\n# a comment\n")
    assert class_of(named, dict, "key") is class_of(named, dict, "key")
    assert class_of("dict", dict, "key") is dict


def test_a_configuration_may_name_a_class_by_its_file_but_no_site_runs_it(experiment):
    config, problems = load_config(experiment, ["clients.0.endpoint_id=x", "clients.1.endpoint_id=y", *NAMED])
    assert not [problem for problem in problems + check(config) if "endpoint_id" not in problem]
    [problem] = check_for_globus(config)
    assert problem.startswith("client_configs.train_configs.trainer: a site runs no code of the server's, got 'mine.py")
