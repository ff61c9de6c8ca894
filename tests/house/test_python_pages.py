"""The notebook, what pages say about Python, and the example of secure sums are run as a reader would run them."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from fedspallm_appfl.cli import main
from fedspallm_appfl.reports.sparsity import check
from helpers.paths import ROOT

NOTEBOOK = ROOT / "examples" / "notebook.ipynb"
PAGES = ["docs/python.md", "README.md"]
NEEDED = {"import Trainer": "accelerate", "from peft": "peft", "--tasks": "lm_eval"}  # words of a block -> package


@pytest.mark.slow
def test_the_notebook_runs_and_shows_tables_and_a_mask(tmp_path):
    notebook = nbformat.read(NOTEBOOK, 4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("../runs", str(tmp_path))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    shown = [
        output.data
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "data" in output
    ]
    tables = [data["text/plain"] for data in shown if "text/html" in data]
    assert len(tables) == 3 and all("50.0000 % of 1,449,984" in table for table in tables)
    assert "FedSpaLLM" in tables[0] and "plain" in tables[2]
    assert sum("image/png" in data for data in shown) == 1


def test_the_notebook_prunes_in_ten_lines():
    first = next(cell.source for cell in nbformat.read(NOTEBOOK, 4).cells if cell.cell_type == "code")
    assert "fs.prune(" in first and len([line for line in first.splitlines() if line]) <= 10


def blocks(page, language):
    """What a page says in a language, without what needs a package that is not here."""
    found = re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text("utf-8"), re.MULTILINE | re.DOTALL)
    missing = [word for word, package in NEEDED.items() if importlib.util.find_spec(package) is None]
    return [block for block in found if not any(word in block for word in missing)]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_says_about_python_runs(page, tmp_path):
    code = "\n".join(blocks(page, "python")).replace('"runs/', f'"{tmp_path}/')
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert code and done.returncode == 0, done.stderr


@pytest.mark.slow
def test_what_is_fine_tuned_as_the_page_says_keeps_its_pattern(tmp_path, monkeypatch, capsys):
    """In this process, as it has imported everything."""
    monkeypatch.chdir(ROOT)
    exec("\n".join(blocks("docs/using.md", "python")).replace('"runs/', f'"{tmp_path}/'), {})
    counts = re.findall(r"^ZeroCount.*", capsys.readouterr().out, re.MULTILINE)
    assert counts and set(counts) == {"ZeroCount(entries=1449984, remembered=724992, lost=0, zeros=724992)"}
    for name in ("model", "tuned", "trained", "merged", "smaller"):
        if (folder := tmp_path / "using" / name).exists():
            assert check(folder).to_dict()["patterns"] == ["2:4", "4:8"], name
    for line in "".join(blocks("docs/using.md", "bash")).replace("runs/", f"{tmp_path}/").splitlines():
        assert main(shlex.split(line)[1:]) == 0
    assert capsys.readouterr().out.count("724,992 of 1,449,984 prunable weights are zero (50.0000 %)") == 4


@pytest.mark.slow
def test_the_example_of_secure_sums_runs_and_gives_one_model_twice(tmp_path):
    """With fewer windows and blocks, and results elsewhere."""
    code = "\n".join(blocks("docs/secure_sums.md", "bash")).replace("runs/", f"{tmp_path}/")
    code = code.replace(
        "run_dir=", "client_configs.data.windows=4 evaluation.windows=1 prune.include=[blocks.0-1] run_dir="
    )
    paths = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-ec", code], cwd=ROOT, env=paths, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    first, second = [
        (tmp_path / name / "model/model.safetensors").read_bytes() for name in ("demo-sums", "demo-signed")
    ]
    assert first == second and (tmp_path / "demo-sums/further/sparsegpt-0.7").is_dir()
