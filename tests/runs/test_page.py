"""report.html, and both reports made anew from a run directory."""

import errno
import json
import math
import os
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from fedspallm_appfl.cli import main
from fedspallm_appfl.events import EventLog
from fedspallm_appfl.models.storage.export import MatrixSparsity
from fedspallm_appfl.reports import finished
from fedspallm_appfl.reports.own_text import own_texts
from fedspallm_appfl.reports.pages import pictures
from fedspallm_appfl.reports.pages.page import by_kind
from fedspallm_appfl.reports.result import mean
from helpers.experiments import first_pages
from helpers.tiny import run, save_tiny, tiny_config

VOID = {"meta", "br", "hr", "img", "input", "link"}
HOSTILE = "<script>alert(1)</script>\"'&|`x`"


class Page(HTMLParser):
    """What a page consists of; a tag that is not closed where it should be is an error."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID and not self.get_starttag_text().endswith("/>"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def words(self):
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three runs: with texts, of models that are apart, and of statistics."""
    folder = tmp_path_factory.mktemp("pages")
    model = save_tiny(folder / "model", torch.float32)
    texts = {
        "length": 24,
        "windows": 2,
        "texts": {"one & <two>": str(first_pages("austen"))},
        "compare": ["standalone"],
    }
    changes = {"fedspallm": {"evaluation": texts}, "standalone": {}, "gram": {}}
    return {name: run(tiny_config(folder / name, model, name, 2, **more)) for name, more in changes.items()}


ALL = pytest.mark.parametrize("algorithm", ["fedspallm", "standalone", "gram"])


@ALL
def test_a_page_is_whole_and_refers_to_nothing_outside(folders, algorithm):
    text = (folders[algorithm] / "report.html").read_text("utf-8")
    page = Page(text)
    assert not re.search(r"https?://|\bsrc=|\bhref=|@import|url\(|<script|<link", text)
    assert len(page.of("title")) >= 1 and {"lang": "en"} in page.of("html")
    assert any(meta.get("name") == "viewport" for meta in page.of("meta"))
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    assert page.of("svg") and all(svg["role"] == "img" and svg["aria-label"] for svg in page.of("svg"))


@ALL
def test_a_page_says_all_that_report_md_says(folders, algorithm):
    shown = Page((folders[algorithm] / "report.html").read_text("utf-8")).words
    said = (folders[algorithm] / "report.md").read_text("utf-8")
    cells = [cell.strip() for line in said.splitlines() if line.startswith("|") for cell in line.strip("|").split("|")]
    words = [line.strip("#* ") for line in said.splitlines() if line and line[0] not in "|-"]
    wanted = {" ".join(one.replace("`", "").split()) for one in cells + words if not re.fullmatch("-*:?", one)}
    # what is marked is an element of its own, and pieces of a line are joined with spaces here
    squeezed = shown.replace(" ", "")
    assert [one for one in wanted if one.replace(" ", "") not in squeezed] == []


@ALL
def test_both_reports_are_made_anew_from_the_run_directory(folders, algorithm, capsys):
    files = [folders[algorithm] / name for name in ("report.html", "report.md")]
    before = [file.read_bytes() for file in files]
    for file in files:
        file.unlink()
    assert main(["report", str(folders[algorithm])]) == 0
    assert [file.read_bytes() for file in files] == before
    shown = "".join(capsys.readouterr().out.split())
    assert all(str(file) in shown for file in files)


def test_the_command_in_the_report_measures_the_last_row_again(tmp_path, capsys):
    """A model in float16, with which `evaluate` by itself computes in float32."""
    texts = {"length": 24, "windows": 2, "texts": {"one": str(first_pages("austen"))}}
    done = run(tiny_config(tmp_path / "of", save_tiny(tmp_path / "model"), "fedspallm", 2, evaluation=texts))
    [command] = re.findall(r"^    fedspallm (evaluate .*)$", (done / "report.md").read_text("utf-8"), re.MULTILINE)
    capsys.readouterr()
    assert main([*shlex.split(command), "--json"]) == 0
    [again] = json.loads(capsys.readouterr().out)[0]["perplexity"].values()
    assert again == list(finished.opened(done)[1].perplexity.values())[-1]["one"]


def test_quality_stands_beside_the_dense_model_and_clients_by_themselves(folders):
    config, results, log = finished.opened(folders["fedspallm"])
    shown = Page((folders["fedspallm"] / "report.html").read_text("utf-8")).words
    (own,), (dense,), (alone,) = (results.perplexity[name].values() for name in ("fedspallm", "dense", "standalone"))
    each = [row for event in log.of("evaluation") if "/" in event["method"] for row in event["perplexity"].values()]
    assert alone == pytest.approx(math.prod(each) ** 0.5) and len(each) == 2
    assert f"Perplexity {own:.2f} dense {dense:.2f} ({100 * (own / dense - 1):+.1f} %); standalone" in shown
    assert f"{alone:.2f} ({100 * (own / alone - 1):+.1f} %)" in shown
    assert "<dt>Perplexity</dt>" not in (folders["gram"] / "report.html").read_text("utf-8")
    assert "<dt>Perplexity of own text</dt>" in (folders["gram"] / "report.html").read_text("utf-8")


def test_agreement_is_that_of_the_masks_of_two_clients(folders):
    _, _, log = finished.opened(folders["fedspallm"])
    rows = Page((folders["fedspallm"] / "report.html").read_text("utf-8")).words.split("block agreement ")[1].split()
    expected = [f"{one['zeros_before_expansion'] / one['zeros_of_one']:.4f}" for one in log.of("block")]
    assert rows[1 : 2 * len(expected) : 2] == expected and len(set(expected)) > 1


def test_the_output_error_of_a_block_is_the_mean_over_clients(folders):
    shown = Page((folders["fedspallm"] / "report.html").read_text("utf-8"))
    said = (folders["fedspallm"] / "report.md").read_text("utf-8")
    errors = {}
    for event in finished.opened(folders["fedspallm"])[2].uploads:
        for linear, notes in event["notes"].items():
            errors.setdefault(linear.partition(".")[0], []).append(notes["output_error"])
    assert {len(of) for of in errors.values()} == {2}
    for block, of in errors.items():
        mean = f"{sum(of) / 2:.3g}"
        assert re.search(rf"^\| {block} \|.* {re.escape(mean)} \|$", said, re.MULTILINE) and mean in shown.words
    assert "Unusual events" not in said  # which these notes are not
    assert "output error" not in (folders["gram"] / "report.md").read_text("utf-8")  # the server prunes


def test_names_from_outside_are_words_and_nothing_else(folders, tmp_path):
    config, results, _ = finished.opened(folders["fedspallm"])
    log = EventLog(tmp_path / "metrics.jsonl")
    for line in (folders["fedspallm"] / "metrics.jsonl").read_text().splitlines():
        log(json.loads(line.replace("austen", json.dumps(HOSTILE)[1:-1])))
    log({"event": "absent", "round": 0, "client": HOSTILE, "host": HOSTILE, "blocks": "", "why": HOSTILE})
    log({"event": "notice", "text": HOSTILE})
    config.clients[0].client_id = config.model.path = HOSTILE
    rows = {method: dict.fromkeys([HOSTILE], *row.values()) for method, row in results.perplexity.items()}
    rows = {HOSTILE: rows["dense"]} | rows  # and of a method
    matrices = [replace(matrix, name=f"{HOSTILE}.{matrix.name}") for matrix in results.matrices]
    finished.write(tmp_path, config, replace(results, perplexity=rows, matrices=matrices), log)
    text = (tmp_path / "report.html").read_text("utf-8")
    assert "<script" not in text and Page(text).words.count("<script>alert(1)</script>") > 5
    known = {"role", "aria-label", "width", "height", "class", "x", "y", "dx", "fill-opacity", "scope", "name"}
    assert {name for _, of in Page(text).tags for name in of} - known == {"charset", "content", "lang"}
    rows = [line for line in (tmp_path / "report.md").read_text("utf-8").splitlines() if "resource share" in line]
    assert rows  # and a | of a name ends no cell
    assert all(re.split(r"(?<!\\)\|", row)[0] == "" for row in rows)


def test_experts_of_a_block_are_a_row_of_the_heat_map():
    names = [f"model.layers.0.mlp.experts.{number}.up.weight" for number in range(3)] + [
        "model.layers.0.mlp.gate.weight"
    ]
    matrices = [MatrixSparsity(name, 0, (2, 2), 4, 2, 2, 0.5) for name in names]
    assert {name: len(of[0]) for name, of in by_kind(matrices).items()} == {"up": 3, "gate": 1}


def test_bars_are_as_long_as_their_values_and_equal_ones_of_nothing_have_no_length():
    drawn = pictures.bars({"": [pictures.Bar("a", 1, "1"), pictures.Bar("b", 4, "4")]}, "two")
    assert re.findall(r'<rect[^>]* width="([\d.]+)%', drawn) == ["11.25", "45.00"]
    drawn = pictures.bars({"": [pictures.Bar("a", math.inf, "inf"), pictures.Bar("b", 4, "4")]}, "too much")
    assert re.findall(r'<rect[^>]* width="([\d.]+)%', drawn) == ["45.00", "45.00"]
    drawn = pictures.bars({"": [pictures.Bar("a", 0, "0")]}, "none")
    assert re.findall(r'<rect[^>]* width="([\d.]+)%', drawn) == ["0.00"]


@pytest.mark.parametrize("what", ["absent", "unfinished", "damaged"])
def test_what_is_no_finished_run_is_refused(folders, tmp_path, capsys, what):
    for name in () if what == "absent" else ("config.yaml", "metrics.jsonl"):
        (tmp_path / name).write_text((folders["gram"] / name).read_text())
    if what == "unfinished":
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "metrics.jsonl").write_text("".join(lines[:-1]))
    words = {"absent": "holds no run", "unfinished": "has not ended", "damaged": "is no manifest"}
    assert main(["report", str(tmp_path)]) == 2
    assert words[what] in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("verb", ["report", "compare"])
def test_a_full_disk_is_said_without_advice_that_is_of_no_use(folders, tmp_path, monkeypatch, capsys, verb):
    def full(self, *args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    assert main([verb, str(folders["gram"])] + (["--out", str(tmp_path / "x.html")] if verb == "compare" else [])) == 2
    said = capsys.readouterr().err
    assert "No space left on device; make room" in said and "resume" not in said


@pytest.fixture
def longer(folders, tmp_path):
    """The first run as if it had been measured on longer windows, where the dense model has another perplexity."""
    for name in ("config.yaml", "manifest.json", "metrics.jsonl"):
        text = (folders["fedspallm"] / name).read_text()
        text = text.replace("  length: 24\n  windows: 2\n", "  length: 48\n  windows: 2\n")
        (tmp_path / name).write_text(re.sub(r'("method": "dense".*"one & <two>": )[0-9.]+', r"\g<1>7.125", text))
    return tmp_path


def test_runs_stand_side_by_side(folders, longer, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["compare", str(folders["fedspallm"]), str(folders["fedspallm"]), str(longer), "--out", str(page)]) == 0
    text = page.read_text("utf-8")
    shown, results = Page(text).words, finished.opened(longer)[1]
    assert shown.startswith("2 runs side by side")
    assert shown.count(f"{results.perplexity['fedspallm']['one & <two>']:.3f}") == 2 * 2  # of one text also the mean
    assert "These runs measured differently (evaluation.length), so" in shown and "evaluation.length 24 48" in shown
    assert shown.count("7.12 dense, ") == 1 and shown.count(" dense, ") == 2 * 2  # with its title
    assert not re.search(r"https?://|<script|<link", text)
    said = " ".join(capsys.readouterr().out.split())
    assert str(page) in said.replace(" ", "") and "These runs measured differently (evaluation.length), so" in said
    [first, second] = (
        mean(list(finished.opened(folder)[1].perplexity.values())[-1]) for folder in (folders["fedspallm"], longer)
    )
    assert f"geometric mean │ {first:.3f} │ {second:.3f} │" in said


def test_runs_without_a_text_in_common_are_compared_by_what_they_have(folders, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["compare", *map(str, folders.values()), "--out", str(page)]) == 0
    shown = Page(page.read_text("utf-8")).words
    assert "algorithm fedspallm standalone gram" in shown and "Perplexity by text" not in shown
    assert "fedspallm/run FedSpaLLM with sparsegpt 0.5000" in shown
    assert "No text was measured by all of these runs" in shown
    assert main(["compare", str(folders["standalone"]), str(folders["gram"]), "--out", str(page)]) == 0
    shown = Page(page.read_text("utf-8")).words
    found = [own_texts(finished.opened(folders[name])[2]) for name in ("standalone", "gram")]
    assert len(found[0]) == 3
    for client, one in found[0].items():
        both = (value for other in (one, found[1][client]) for value in (other.dense, other.pruned))
        assert " ".join([client, *(f"{value:.3f}" for value in both)]) in shown
    assert "No text was measured" not in shown and "measured differently" not in shown
    said = " ".join(capsys.readouterr().out.split())
    both = " │ ".join(f"{one['(all)'].pruned:.3f}" for one in found)
    assert f"clients' own text │ {both} │" in said and "No text was measured by all of these runs" in said
