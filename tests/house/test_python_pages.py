"""The notebook and the page about Python are run as a reader would run them, with results elsewhere."""

import re
import subprocess
import sys

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
