"""The notebook, what pages say about Python, and the example of secure sums are run as a reader would run them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from helpers.paths import ROOT

NOTEBOOK = ROOT / "examples" / "notebook.ipynb"
PAGES = ["docs/python.md", "README.md"]


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


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_says_about_python_runs(page, tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text("utf-8"), re.MULTILINE | re.DOTALL)
    code = "\n".join(blocks).replace('"runs/', f'"{tmp_path}/')
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert blocks and done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_example_of_secure_sums_runs_and_gives_one_model_twice(tmp_path):
    """With fewer windows, and results elsewhere."""
    blocks = re.findall(
        r"^```bash\n(.*?)^```", (ROOT / "docs/secure_sums.md").read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    code = "\n".join(blocks).replace("runs/", f"{tmp_path}/")
    code = code.replace("run_dir=", "client_configs.data.windows=4 evaluation.windows=1 run_dir=")
    paths = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-ec", code], cwd=ROOT, env=paths, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    first, second = [
        (tmp_path / name / "model/model.safetensors").read_bytes() for name in ("demo-sums", "demo-signed")
    ]
    assert first == second and (tmp_path / "demo-sums/further/sparsegpt-0.7").is_dir()
