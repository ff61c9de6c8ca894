"""The command line: help that can be typed off, messages instead of tracebacks, nothing heavy before it is needed."""

import argparse
import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fedspallm_appfl import __version__, cli
from fedspallm_appfl.errors import ConfigError
from fedspallm_appfl.runs.run_dir import claimed
from fedspallm_appfl.settings.reading import load_config
from helpers.command_line import parse
from helpers.families import save_family
from helpers.paths import DEMO, ROOT

CONFIG = str(ROOT / "configs" / "demo.yaml")
TEXT = str(DEMO / "text" / "austen" / "test.txt")


def verbs():
    """Verb -> its parser."""
    [action] = [a for a in cli.parser_of_all()._actions if isinstance(a, argparse._SubParsersAction)]
    return action.choices


@pytest.fixture
def fedspallm(capsys):
    """Run a command; gives exit code, output and error output. No traceback is ever shown."""

    def fedspallm(*words):
        try:
            code = cli.main(words)
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return fedspallm


def examples(parser):
    return re.findall(r"^ +(?:mpiexec -n \d+ )?(fedspallm .*)$", parser.epilog, re.MULTILINE)


@pytest.mark.parametrize("verb", [None, *verbs()])
def test_the_help_of_every_verb_shows_examples_that_parse(verb, fedspallm, monkeypatch):
    code, out, _ = fedspallm(*filter(None, [verb, "--help"]))
    shown = examples(verbs()[verb] if verb else cli.parser_of_all())
    assert code == 0
    assert shown
    for example in shown:
        assert example in out
        args = parse(example, monkeypatch)
        assert args.command == (verb or "run")
        if "config" in args and (ROOT / args.config).exists():
            assert load_config(ROOT / args.config, args.overrides)[1] == []


def test_the_examples_of_help_name_files_that_exist():
    shown = [example for parser in (cli.parser_of_all(), *verbs().values()) for example in examples(parser)]
    named = {word for example in shown for word in example.split() if word.startswith(("configs/", "examples/"))}
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


def test_the_version_is_that_of_the_package(fedspallm):
    assert fedspallm("--version") == (0, f"fedspallm-appfl {__version__}\n", "")
    assert "version = attr: fedspallm_appfl.__version__\n" in (ROOT / "setup.cfg").read_text()


@pytest.mark.parametrize(
    "words", ["x.yaml a=1 b=2 --overwrite", "x.yaml --overwrite a=1 b=2", "--overwrite x.yaml a=1 b=2"]
)
def test_overrides_may_stand_before_and_after_options(words, monkeypatch):
    args = parse(f"fedspallm run {words}", monkeypatch)
    assert (args.config, args.overrides, args.overwrite) == ("x.yaml", ["a=1", "b=2"], True)


def test_overrides_on_both_sides_of_an_option_keep_their_order(monkeypatch):
    assert parse("fedspallm run x.yaml a=1 --launcher mpi a=2", monkeypatch).overrides == ["a=1", "a=2"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "example:\n"),
        (["run", CONFIG, "--overwrite", "--resume"], "--resume: not allowed with argument --overwrite"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        (["run"], "required: CONFIG.yaml"),
        (["run", CONFIG, "--overwite"], "unrecognized arguments: --overwite"),
        (["run", CONFIG, "--dry=yes"], "unrecognized arguments: --dry=yes"),
        (["run", CONFIG, "--overwrite", "stray"], "unrecognized arguments: stray"),
        (["run", CONFIG, "--launcher", "slurm"], "invalid choice: 'slurm'"),
        (["evaluate", "m", "--text", TEXT, "--length", "8", "a=b"], "unrecognized arguments: a=b"),
        (["evaluate", "m"], "evaluate takes --text, --tasks or both; got neither"),
        (["evaluate", "m", "--text", TEXT, "--length", "0"], "--length: at least 1, got 0"),
        (["evaluate", "m", "--text", TEXT, "--dtype", "int8"], "invalid choice: 'int8'"),
        (["check"], "required: model"),
        (["check", "m", "--json", "--matrices"], "--matrices: not allowed with argument --json"),
    ],
)
def test_a_wrong_command_line_exits_with_2_and_says_why(fedspallm, words, message):
    code, out, err = fedspallm(*words)
    assert (code, out) == (2, "")
    assert message in err


def test_a_number_that_is_none_is_explained_without_names_of_functions(fedspallm):
    code, _, err = fedspallm("evaluate", "m", "--text", TEXT, "--windows", "few")
    assert code == 2
    assert "few" in err
    assert "_positive" not in err


@pytest.mark.parametrize("verb", ["run", "validate"])
@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (["stray"], ["error: an override is key=value, got 'stray'"]),
        (["seed=-1"], ["demo.yaml: 1 problem\n", "  - seed: at least 0, got -1"]),
        (["sed=1", "model.pth=x"], ["demo.yaml: 2 problems\n", "  - sed: unknown key", "  - model.pth: unknown key"]),
        (["clients.0.data.text=none.txt"], ["  - client austen: the text none.txt cannot be read"]),
    ],
)
def test_problems_of_a_configuration_go_to_stderr_with_exit_code_2(fedspallm, tmp_path, verb, overrides, lines):
    code, out, err = fedspallm(verb, CONFIG, f"run_dir={tmp_path / 'run'}", *overrides)
    opens = verb == "run" and "none.txt" in str(overrides)  # whose values are well formed
    begin = f"fedspallm-appfl {__version__}: opening model and text of "
    assert (code, out.replace("\n", " ").startswith(begin), bool(out)) == (2, opens, opens)
    assert err.startswith("error: ")
    for line in lines:
        assert line in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", ["run", "validate", "estimate"])
def test_a_missing_configuration_is_named(fedspallm, verb):
    code, out, err = fedspallm(verb, "none.yaml")
    assert (code, out) == (2, "")
    assert err == "error: the configuration none.yaml cannot be read: No such file or directory; name a YAML file\n"


def test_a_valid_configuration_is_said_to_be_one(fedspallm):
    code, out, err = fedspallm("validate", CONFIG)
    assert (code, err) == (0, "")
    assert "demo.yaml: no problem found\n4 clients, 1 round, FedSpaLLM with sparsegpt, sparsity 0.5\n" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_validate_notes_a_device_that_is_not_here(fedspallm):
    asked = ("client_configs.train_configs.device=cuda", "server_configs.device=cuda:7")
    code, out, _ = fedspallm("validate", CONFIG, *asked)
    said = " ".join(out.split())
    assert code == 0 and "no problem found" in said
    assert "note: client austen, client bible, client csource, client sqldocs: device cuda was asked for on" in said
    assert "note: the server: device cuda:7 was asked for on" in said and "a run on this machine would fail" in said


def test_validate_without_files_opens_neither_model_nor_text(fedspallm):
    code, _, err = fedspallm("validate", CONFIG, "--no-files", "model.path=none", "clients.0.data.text=none.txt")
    assert (code, err) == (0, "")


def test_an_interrupt_is_no_traceback(fedspallm, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("fedspallm_appfl.settings.reading.load_config", interrupt)
    assert fedspallm("validate", CONFIG) == (130, "", "interrupted\n")


def evaluate(*options):
    return ("evaluate", str(DEMO / "model"), "--text", TEXT, "--device", "cpu", "--windows", "1", *options)


def perplexity(out):
    return [float(number) for number in re.findall(r"│ +(\d+\.\d{3}) │", out)]


def test_evaluate_prints_a_row_for_each_text(fedspallm, tmp_path):
    other = tmp_path / "same.txt"
    other.write_bytes((DEMO / "text" / "austen" / "test.txt").read_bytes())
    words = ("--text", TEXT, str(other), "--length", "64", "--windows", "2", "--device", "cpu")
    code, out, err = fedspallm("evaluate", str(DEMO / "model"), *words)
    assert (code, err) == (0, "")
    assert TEXT in out
    assert str(other) in out
    first, second = perplexity(out)
    assert first == second
    assert 1 < first < 1024


def test_evaluate_takes_the_length_that_the_model_takes_unless_told(fedspallm):
    code, out, _ = fedspallm(*evaluate())
    assert code == 0
    assert perplexity(out) == perplexity(fedspallm(*evaluate("--length", "512"))[1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["evaluate", "./none", "--text", TEXT, "--length", "64"],
            "model path './none' is no folder here and no hub name",
        ),
        (evaluate("--text", "none.txt", "--length", "64"), "the text none.txt cannot be read"),
        (evaluate("--text", str(ROOT / ".gitignore")), "has no window of 512 tokens; give more text"),
        (evaluate("--length", "513"), "length is at most 512 for this model (max_position_embeddings), got 513"),
        (evaluate("--length", "64", "--device", "gpu"), "gpu"),
        (evaluate("--blocks", "model.norm"), "`model.blocks` is 'model.norm', which is not a non-empty nn.ModuleList"),
        (evaluate("--length", "64", "--device", "cuda:x"), "cuda:x"),
        (evaluate("--length", "64", "--device", "cuda:99"), "device cuda:99 was asked for"),
    ],
)
def test_what_cannot_be_evaluated_is_explained(fedspallm, words, message):
    code, out, err = fedspallm(*words)
    assert (code, out) == (2, "")
    assert message in err


def half_pruned(folder, family="llama"):
    """A folder whose first block is 2:4, whose second has 10 zeros in each first row, and whose third is dense."""
    model = AutoModelForCausalLM.from_pretrained(save_family(family, folder))
    with torch.no_grad():
        for name, weight in model.model.layers.named_parameters():
            if name.startswith("0.") and "_proj" in name:
                weight.view(-1, 4)[:, 1:3] = 0
            elif name.startswith("1.") and "_proj" in name:
                weight.view(-1, weight.shape[-1])[0, :10] = 0
    model.save_pretrained(folder)
    return str(folder)


def test_check_counts_zeros_by_matrix_and_pattern(fedspallm, tmp_path):
    folder = half_pruned(tmp_path / "model")
    code, out, _ = fedspallm("check", str(tmp_path), "--json")  # the run_dir
    found = json.loads(out)
    on_disk = load_file(tmp_path / "model" / "model.safetensors")
    weights = {name: tensor for name, tensor in on_disk.items() if "_proj" in name}
    assert code == 0
    assert {one["stored"]: one["zeros"] for one in found["matrices"]} == {
        name: int((tensor == 0).sum()) for name, tensor in weights.items()
    }
    assert [one["patterns"] for one in found["matrices"]] == [["2:4", "4:8"]] * 7 + [[]] * 14
    assert found["entries"] == sum(tensor.numel() for tensor in weights.values())
    assert found["zeros"] == sum(one["zeros"] for one in found["matrices"])
    assert found["sparsity"] == found["zeros"] / found["entries"]
    up = found["kinds"]["mlp.up_proj"]
    assert (up["matrices"], up["entries"], up["zeros"]) == (3, 3 * 48 * 32, 48 * 32 // 2 + 10)
    code, out, _ = fedspallm("check", folder)
    [row] = [line for line in out.splitlines() if "mlp.up_proj" in line]
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        *("mlp.up_proj", "3", "4,608", "16.8837", "0.0000", "50.0000", "2:4 in 1, 4:8 in 1")
    ]
    assert f"{found['zeros']:,} of {found['entries']:,} prunable weights are zero" in out
    code, out, _ = fedspallm("check", folder, "--matrices")
    assert code == 0 and len(re.findall(r"│ +[012] │ \w+", out)) == 21
    assert re.search(r"│ +1 │ mlp.up_proj +│ 48 x 32 │ +10 │ +0.6510 % │", out)


def test_check_counts_all_experts_as_one_kind(fedspallm, tmp_path):
    code, out, _ = fedspallm("check", half_pruned(tmp_path, "mixtral"), "--json")
    found = json.loads(out)
    assert code == 0
    assert {kind: one["matrices"] for kind, one in found["kinds"].items() if "mlp" in kind} == {
        f"mlp.experts.*.{name}": 12 for name in ("gate_proj", "up_proj", "down_proj")
    }
    assert [one["patterns"] for one in found["matrices"] if one["block"] == 0] == [["2:4", "4:8"]] * 16


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["./none"], "model path './none' is no folder here and no hub name"),
        ([str(DEMO / "text")], "holds no model: there is no config.json in it"),
        ([str(DEMO / "model"), "--blocks", "model.norm"], "`model.blocks` is 'model.norm'"),
    ],
)
def test_what_cannot_be_checked_is_explained(fedspallm, words, message):
    code, out, err = fedspallm("check", *words)
    assert (code, out) == (2, "")
    assert message in err


def test_a_run_directory_is_not_overwritten_unless_asked(fedspallm, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr("fedspallm_appfl.runs.experiment.run", lambda config, *_: ran.append(config))
    (tmp_path / "report.md").write_text("precious")
    (tmp_path / "metrics.jsonl").touch()
    code, _, err = fedspallm("run", CONFIG, f"run_dir={tmp_path}")
    assert code == 2
    assert (
        f"run_dir: {tmp_path} exists and is not empty; give another run_dir, or --overwrite (overwrite=True in Python)"
        in err
    )
    assert ran == []
    assert (
        f"note: run_dir: {tmp_path} exists and is not empty" in fedspallm("validate", CONFIG, f"run_dir={tmp_path}")[1]
    )
    assert fedspallm("run", CONFIG, "--overwrite", f"run_dir={tmp_path}")[0] == 0
    assert len(ran) == 1
    assert (tmp_path / "report.md").read_text() == "precious"


def run_folder(tmp_path, **values):
    config, _ = load_config(CONFIG, [f"run_dir={tmp_path / 'run'}", *(f"{k}={v}" for k, v in values.items())])
    (tmp_path / "run" / "model").mkdir(parents=True)
    for name in ("report.md", "metrics.jsonl", "manifest.json", "model/model.safetensors", "mine.txt"):
        (tmp_path / "run" / name).write_text("old")
    return config, tmp_path / "run"


def test_overwriting_clears_what_runs_write_and_nothing_else(tmp_path):
    config, folder = run_folder(tmp_path)
    with pytest.raises(ConfigError, match="exists and is not empty"), claimed(config, overwrite=False):
        pass
    with claimed(config, overwrite=True) as claimed_folder:
        assert claimed_folder == folder
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "metrics.jsonl", "mine.txt"]
    assert (folder / "metrics.jsonl").read_text() == ""
    assert load_config(folder / "config.yaml") == (config, [])


def test_the_stored_configuration_is_good_from_any_directory(tmp_path, monkeypatch):
    (tmp_path / "law.txt").write_text("law")
    monkeypatch.chdir(tmp_path)
    config, _ = load_config(CONFIG, ["run_dir=run", "evaluation.texts.law=law.txt", "clients.0.data.text=[law.txt]"])
    with claimed(config, overwrite=False) as folder:
        stored, _ = load_config(folder / "config.yaml")
    assert stored.evaluation.texts["law"] == str(tmp_path / "law.txt")
    assert stored.clients[0].data.text == [str(tmp_path / "law.txt")]


def test_two_runs_do_not_share_a_directory(tmp_path):
    config, _ = run_folder(tmp_path)
    with (
        claimed(config, overwrite=True),
        pytest.raises(ConfigError, match="another run or fedspallm prune is using"),
        claimed(config, overwrite=True),
    ):
        pass


@pytest.mark.parametrize("key", ["model.path", "clients.0.data.text", "evaluation.texts.law"])
def test_overwriting_never_deletes_what_the_run_reads(tmp_path, key):
    config, folder = run_folder(tmp_path, **{key: tmp_path / "run" / "model"})
    with pytest.raises(ConfigError, match="which a run there would replace"), claimed(config, overwrite=True):
        pass
    assert (folder / "model" / "model.safetensors").read_text() == "old"


def test_a_directory_that_cannot_be_written_is_explained(tmp_path):
    (tmp_path / "file").touch()
    config, _ = load_config(CONFIG, [f"run_dir={tmp_path / 'file' / 'run'}"])
    with pytest.raises(ConfigError, match="run_dir: .* cannot be"), claimed(config, overwrite=False):
        pass


def test_mpi_without_mpi4py_says_what_to_install(fedspallm, monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    code, out, err = fedspallm("run", CONFIG, "--launcher", "mpi")
    assert (code, out) == (2, "")
    assert "--launcher mpi needs mpi4py and an MPI library" in err
    assert "pip install --constraint constraints.txt '.[mpi]'" in err


def python(*words):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=240)


def test_a_shell_completes_verbs_options_and_files(fedspallm, tmp_path):
    script = tmp_path / "completion.sh"
    script.write_text(fedspallm("completion", "bash")[1])
    ask = f"source {script}; cd {ROOT}; COMP_WORDS=(fedspallm $1); COMP_CWORD=$2; _shtab_fedspallm; echo ${{COMPREPLY[@]}}"

    def completed(words, place):
        done = subprocess.run(
            ["bash", "-ec", ask, "bash", words, place], capture_output=True, text=True, timeout=30, check=True
        )
        return done.stdout.split()

    assert completed("rep", "1") == ["report"]
    assert completed("run configs/demo.yaml --over", "3") == ["--overwrite"]
    assert "configs" in completed("run con", "2")


@pytest.mark.mpi
def test_mpi_without_mpiexec_says_how_to_start_it():
    pytest.importorskip("mpi4py")
    done = python("-m", "fedspallm_appfl", "run", CONFIG, "--launcher", "mpi")
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        "--launcher mpi needs at least 2 ranks, a server and a client, got 1; start it as mpiexec -n 5" in done.stderr
    )
    assert "Traceback" not in done.stderr


LIGHT = """
import contextlib, io, json, sys
from fedspallm_appfl.cli import main

for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            code = main(words)
        except SystemExit as stop:
            code = stop.code
    print(code, *words[:1], *sorted({"torch", "transformers", "appfl", "numpy", "omegaconf", "rich"} & set(sys.modules)))
"""


def test_nothing_heavy_is_imported_for_help_mistyped_commands_and_the_form_of_a_configuration(tmp_path):
    (tmp_path / "no.yaml").write_text("a: [")
    commands = [["--help"], ["--version"], ["frobnicate"], ["run", CONFIG, "--overwite"]]
    verbs_with_config = ("run", "validate", "doctor", "estimate", "study")
    wrong = [[CONFIG, "sed=1"], [CONFIG, "clients=3", "seed=x"], [str(tmp_path / "no.yaml")], ["none.yaml"]]
    malformed = [[verb, *words] for verb in verbs_with_config for words in wrong]
    done = python("-c", LIGHT, json.dumps([*commands, *malformed]))
    expected = ["0 --help", "0 --version", "2 frobnicate", "2 run", *(f"2 {words[0]} omegaconf" for words in malformed)]
    assert done.stdout.splitlines() == expected, done.stderr


def test_the_module_is_the_command():
    assert python("-m", "fedspallm_appfl", "--version").stdout == f"fedspallm-appfl {__version__}\n"
