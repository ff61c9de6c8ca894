"""Tasks of lm-eval: how the library is called, with a double of it, and what it finds, where it is installed."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedspallm_appfl as fs
from fedspallm_appfl.cli import main
from helpers.paths import DEMO, ROOT
from helpers.tiny import save_tiny

TASKS = ROOT / "examples" / "tasks"
ROWS = {
    "words": {"name": "words", "alias": "words", "sample_len": 9, "acc,none": 0.5, "acc_stderr,none": 0.25},
    "mmlu": {"alias": "mmlu", "acc,strict": 0.25, "acc_stderr,strict": "N/A"},
}


@pytest.fixture
def calls(monkeypatch):
    """What lm-eval is asked for; a double of version 0.4.13 answers."""
    calls = []

    class TaskManager:
        def __init__(self, include_path=None, include_defaults=True):
            calls.append(("manager", include_path, include_defaults))
            files = Path(include_path).glob("*.yaml") if include_path else []
            own = [yaml.safe_load(file.read_text())["task"] for file in files]
            self.all_tasks = [*own, *(["hellaswag", "broken", "mmlu"] if include_defaults else [])]

        def load(self, name):
            calls.append(("load", name))
            if name == "hellaswag":
                raise ConnectionError("Couldn't reach 'Rowan/hellaswag' on the Hub\nand more")
            if name == "broken":
                raise KeyError("no such column")
            return {"tasks": {"part": "<part>"}, "groups": {name: f"<{name}>"} if name == "mmlu" else {}}

    class HFLM:
        def __init__(self, pretrained, tokenizer, batch_size):
            calls.append(("model", pretrained.dtype, pretrained.training, len(tokenizer), batch_size))

    def simple_evaluate(model, tasks, task_manager, limit, log_samples):
        calls.append(("run", tasks, limit, log_samples))
        return {"results": ROWS, "n-samples": {"words": {"original": 9, "effective": 2}}}

    for name, parts in (
        ("lm_eval", {"simple_evaluate": simple_evaluate}),
        ("lm_eval.tasks", {"TaskManager": TaskManager}),
        ("lm_eval.models", {}),
        ("lm_eval.models.huggingface", {"HFLM": HFLM}),
    ):
        module = ModuleType(name)
        vars(module).update(parts)
        monkeypatch.setitem(sys.modules, name, module)
    return calls


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("tiny") / "model"))


def test_two_models_are_asked_the_same_questions(calls, model, tmp_path, capsys):
    packed = str(tmp_path / "packed")
    fs.pack(model, packed)
    words = ["evaluate", packed, "--against", model, "--tasks", "next_words,mmlu", "--task-folder", str(TASKS)]
    words += ["--limit", "2", "--batch", "3", "--device", "cpu", "--json"]
    assert main(words) == 0
    row = {"metric": "acc", "value": 0.5, "error": 0.25, "questions": 2}
    group = {"metric": "acc,strict", "value": 0.25, "error": None, "questions": None}
    tasks = [{"task": "words", **row}, {"task": "mmlu", **group}]
    assert json.loads(capsys.readouterr().out) == [{"model": one, "tasks": tasks} for one in (model, packed)]
    asked = [("model", torch.float32, False, 1024, 3), ("run", ["<part>", "<mmlu>"], 2, False)]
    managers = [("manager", str(TASKS), False), ("manager", str(TASKS), True)]
    assert calls == [*managers, ("load", "next_words"), ("load", "mmlu"), *asked, *asked]


def test_tasks_of_a_folder_need_no_others_and_stand_beside_texts(calls, model, capsys):
    words = ["--text", str(DEMO / "text/austen/test.txt"), "--length", "16", "--windows", "2", "--dtype", "bfloat16"]
    assert main(["evaluate", model, *words, "--tasks", "next_words", "--task-folder", str(TASKS)]) == 0
    out = capsys.readouterr().out
    assert "perplexity" in out and "words │ acc        │         2 │ 0.5000 ± 0.2500 │" in out
    assert "mmlu  │ acc,strict │           │          0.2500 │" in out
    assert calls[0] == ("manager", str(TASKS), False) and calls[1] == ("load", "next_words")
    assert calls[2][1] is torch.bfloat16


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["hellaswag"],
            "'hellaswag' cannot be had: ConnectionError: Couldn't reach 'Rowan/hellaswag' on the Hub; its data",
        ),
        (["broken"], "the questions of task 'broken' cannot be had: KeyError: 'no such column'\n"),
        (["nosuch"], "task 'nosuch' is none that lm-eval knows; --task-folder names"),
        (["nosuch", "--task-folder", str(TASKS)], f"is none that lm-eval knows, nor in {TASKS}"),
        (["next_words", "--task-folder", "none"], "--task-folder 'none' is no folder"),
    ],
)
def test_what_cannot_be_asked_is_named_before_a_model_is_loaded(calls, model, words, message, capsys):
    assert main(["evaluate", model, "--device", "cpu", "--tasks", *words]) == 2
    assert message in capsys.readouterr().err
    assert not [call for call in calls if call[0] in ("model", "run")]


def test_without_the_library_it_says_what_to_install(model, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["evaluate", model, "--tasks", "hellaswag"]) == 2
    assert "pip install --constraint constraints.txt '.[tasks]'" in capsys.readouterr().err


def likeliest(model, tokenizer, row):
    """The choice whose tokens have the largest sum of log probabilities after the text, as the task says."""
    sums = []
    for choice in row["choices"]:
        context, whole = (tokenizer(words)["input_ids"] for words in (row["text"], f"{row['text']} {choice}"))
        found = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        sums.append(sum(float(found[at - 1, whole[at]]) for at in range(len(context), len(whole))))
    return sums.index(max(sums))


@pytest.mark.slow
@torch.no_grad()
def test_the_library_finds_what_the_model_says(monkeypatch, tmp_path, capsys):
    pytest.importorskip("lm_eval.models.huggingface")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.chdir(ROOT)
    dense, packed = str(DEMO / "model"), str(tmp_path / "packed")
    fs.pack(dense, packed)
    words = ["evaluate", packed, "--against", dense, "--task-folder", str(TASKS), "--device", "cpu", "--json"]
    assert main([*words, "--tasks", "next_words", "--limit", "30"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    rows = [json.loads(line) for line in (TASKS / "next_words.jsonl").read_text("utf-8").splitlines()][:30]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(dense).float(), AutoTokenizer.from_pretrained(dense)
    share = sum(likeliest(model, tokenizer, row) == row["answer"] for row in rows) / 30
    error = (share * (1 - share) / 29) ** 0.5
    expected = {"task": "next_words", "metric": "acc", "value": share, "error": pytest.approx(error), "questions": 30}
    assert first["tasks"] == second["tasks"] == [expected]
    assert main([*words, "--tasks", "hellaswag"]) == 2  # tests have no hub
    assert "the questions of task 'hellaswag' cannot be had" in capsys.readouterr().err
