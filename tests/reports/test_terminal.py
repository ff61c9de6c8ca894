"""Tables on the console lose nothing where the terminal is narrow."""

import io

import pytest
from rich.console import Console
from rich.table import Column

from fedspallm_appfl.reports.terminal import ConsoleTable

ROW = ("model.layers.0.self_attn.q_proj", "16,777,216", "21.03 ± 0.04", "client_configs.train_configs.damping")


@pytest.mark.parametrize("width", [24, 40, 80])
def test_words_are_folded_and_not_cut_off(width):
    table = ConsoleTable("matrix", Column("weights", justify="right"), "perplexity", "setting")
    table.add_row(*ROW)
    file = io.StringIO()
    Console(file=file, width=width).print(table)
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= width and "…" not in file.getvalue()
    cells = zip(*(line.strip("│").split("│") for line in lines if line.startswith("│")), strict=True)
    assert ["".join("".join(of).split()) for of in cells] == ["".join(cell.split()) for cell in ROW]
