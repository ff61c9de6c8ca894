"""The closing table and report.md, from a run made by hand."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from fedspallm_appfl.aggregation.layer_sampling import from_text
from fedspallm_appfl.events import EventLog, ignore
from fedspallm_appfl.models.storage.export import MatrixSparsity
from fedspallm_appfl.reports.parts import bytes_text
from fedspallm_appfl.reports.report import closing, traffic, write_report
from fedspallm_appfl.reports.result import Result, sparsity_line
from fedspallm_appfl.settings.schema import Client, Config, Evaluation, TrainConfigs

NOTES = {"4.mlp.up_proj": {"damping": 0.1}}


def upload(client, blocks, size, round_index=0, message=0, notes=None):
    return {
        "event": "upload",
        "round": round_index,
        "exchange": 0,
        "exchanges": 1,
        "counted": [0, 1],
        "client": client,
        "host": f"node-{client}",
        "message": message,
        "messages": 3,
        "blocks": blocks,
        "bytes": size,
        "block_bytes": {str(block): size // len(from_text(blocks)) for block in from_text(blocks)},
        "seconds": 1.25,
        "notes": notes or {},
    }


def block(index, before, over=0):
    facts = {"zeros": 10, "zeros_before_expansion": before, "over_target": over}
    return {"event": "block", "round": 0, "block": index, "clients": ["a"], **facts}


# Two rounds of two clients on ten blocks. Client b's block 4 is so large that it is split over two messages.
EVENTS = [
    upload("a", "0-3,9", 1000),
    upload("a", "", 0, message=1),
    upload("b", "4", 300, notes=NOTES),
    upload("b", "4-5", 200, message=1),
    *(block(index, before=5, over=2 * (index == 3)) for index in (0, 1, 2, 3, 4, 5, 9)),
    {"event": "round", "round": 0, "blocks": "0-5,9", "bytes_down": 700},
    upload("a", "0-3,9", 1000, round_index=1),
    upload("b", "5", 100, round_index=1),
    {"event": "round", "round": 1, "blocks": "0-3,5,9", "bytes_down": 0},
]


def matrix(index, zeros=10, on_disk=None):
    return MatrixSparsity(f"{index}.w", index, (4, 5), 20, zeros, zeros if on_disk is None else on_disk, zeros / 20)


DRAWN_BY_NOBODY = (6, 7, 8)
MATRICES = [matrix(0, on_disk=13), *(matrix(i, zeros=0 if i in DRAWN_BY_NOBODY else 10) for i in range(1, 10))]
PERPLEXITY = {
    "dense": {"law": 2.0, "news": 8.0},
    "standalone": {"law": 5.0, "news": 20.0},
    "fedspallm": {"law": 3.0, "news": 12.0},
}


@pytest.fixture
def log(tmp_path):
    log = EventLog(tmp_path / "metrics.jsonl")
    for event in EVENTS:
        log(event)
    return log


def config_and_results(perplexity=PERPLEXITY, layer_sampling="balanced", matrices=MATRICES):
    config = Config(
        clients=[Client(client_id=name, train_configs=TrainConfigs(resource_share=0.5)) for name in "ab"],
        evaluation=Evaluation(texts=dict.fromkeys(next(iter(perplexity.values()), {}), "x.txt")),
    )
    config.server_configs.num_global_epochs = 2
    config.client_configs.train_configs.layer_sampling = layer_sampling
    return config, Result(perplexity, matrices, block_weights=250, dense_bytes=400, model=Path("run/model"))


@pytest.fixture
def report(log, tmp_path):
    def report(**changes):
        write_report(tmp_path / "report.md", *config_and_results(**changes), log)
        return (tmp_path / "report.md").read_text("utf-8")

    return report


def section(report, title):
    """The rows of the first table of a section, as lists of cells, and its text."""
    text = report.split(f"## {title}\n\n")[1].split("\n\n## ")[0]
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in tables[0][2:]], text


def table(log, **changes):
    """The closing table as it is shown, and its words in one line."""
    console = Console(file=io.StringIO(), width=200)
    console.print(closing(*config_and_results(**changes), log))
    shown = console.file.getvalue()
    return shown, " ".join(shown.split())


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1234567, "1.2 MB"), (2.5e9, "2.5 GB"), (7.1e13, "71.0 TB")],
)
def test_bytes_are_written_for_people(count, text):
    assert bytes_text(count) == text


def test_traffic_is_summed_up_and_down_for_each_client(log):
    assert traffic(log) == ({"a": 2000, "b": 600}, {"a": 700, "b": 700})


@pytest.mark.parametrize(
    ("matrices", "line"),
    [
        (
            MATRICES,
            "70 of 250 {} (28.00 %): 50.0000 % of 140 in 7 pruned matrices; 3 matrices left dense",
        ),
        (MATRICES[:2], "20 of 250 {} (8.00 %): 50.0000 % of 40 in 2 pruned matrices"),
        ([matrix(0, zeros=0)], "no matrix was pruned"),
    ],
)
def test_sparsity_is_said_in_exact_counts(matrices, line):
    assert sparsity_line(matrices, 250) == line.format("weights in the blocks are pruned")


def test_the_closing_shows_each_method_on_each_text_and_the_bytes(log):
    shown, words = table(log)
    rows = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in shown.splitlines() if "│" in line]
    assert rows == [
        ["dense", "2.00", "8.00", "4.00"],
        ["standalone (mean)", "5.00", "20.00", "10.00"],
        ["FedSpaLLM", "3.00", "12.00", "6.00"],
    ]
    assert "2 clients, FedSpaLLM with sparsegpt, sparsity 0.5" in words
    assert (
        "up 2.6 kB, down 1.4 kB in total, 1.3 kB up per client on average; the dense prunable weights take 400 B"
        in words
    )
    assert "70 of 250 weights in the blocks are pruned (28.00 %)" in words


def test_without_evaluation_the_closing_still_shows_sparsity_and_bytes(log):
    _, words = table(log, perplexity={})
    assert "70 of 250 weights in the blocks are pruned (28.00 %)" in words
    assert "up 2.6 kB, down 1.4 kB in total" in words


def test_without_evaluation_the_report_has_no_perplexity(report):
    assert "## Perplexity" not in report(perplexity={})


def test_the_report_shows_perplexity_with_its_geometric_mean(report):
    rows, _ = section(report(), "Perplexity")
    assert rows == [
        ["dense", "2.000", "8.000", "4.000"],
        ["standalone (mean)", "5.000", "20.000", "10.000"],
        ["FedSpaLLM", "3.000", "12.000", "6.000"],
    ]


def test_the_report_shows_the_sparsity_of_each_block(report):
    rows, text = section(report(), "Sparsity")
    assert rows[0] == ["0", "20", "10", "0.500000", "0.2500", "3"]
    assert rows[6] == ["6", "20", "0", "0.000000", "0.0000", "0"]
    assert "2 entries beyond the target are zero, because every client pruned them." in text


def test_the_report_shows_bytes_by_client_and_by_round(report):
    rows, text = section(report(), "Bytes")
    assert rows == [["a", "2,000", "700"], ["b", "600", "700"], ["all", "2,600", "1,400"]]
    assert "| 1 | 1,500 | 1,400 |" in text
    assert "| 2 | 1,100 | 0 |" in text
    assert "once per round and client, would take 1,600." in text
    assert "| 4 | 1 | 400 | 40 | 0.10 |" in text  # one upload in two messages; 20 weights are 40 bytes as stored
    assert "| 5 | 2 | 200 | 80 | 0.40 |" in text  # in two rounds


def test_bytes_of_keys_are_told_where_sums_are_secure(log, report):
    assert "keys" not in report()
    log({**upload("a", "", 96), "counted": None, "block_bytes": {}})
    assert "96 bytes of keys and shares of secrets belong to no block" in report()


def test_the_report_counts_the_blocks_that_each_client_sent(report):
    """A run of blocks counts as its length, a block split over messages once, a block sent in two rounds twice."""
    rows, _ = section(report(), "Who took part")
    assert rows == [["a", "0.5", "10", "3.8", "node-a"], ["b", "0.5", "3", "3.8", "node-b"]]


def placed(rank, clients, device="cpu"):
    facts = {"host": "n", "device": device, "threads": 2, "bound": ""}
    return {"event": "place", "rank": rank, "clients": clients, **facts}


def test_the_report_says_where_clients_ran(tmp_path, log, report):
    """Over Globus Compute nobody tells; in one process there are no ranks."""
    log(placed(0, ["a", "b"]))
    text = report()
    assert "| client | resource share | blocks sent | seconds at work | host | device | threads |" in text
    assert [row[5:] for row in section(text, "Who took part")[0]] == [["cpu", "2"]] * 2
    log(placed(1, ["a"]))
    log(placed(2, ["b"], "cuda:1"))
    assert [row[5:] for row in section(report(), "Who took part")[0]] == [["1", "cpu", "2"], ["2", "cuda:1", "2"]]


def test_the_report_says_what_was_run_and_how_it_was_measured(report):
    text = report()
    assert text.startswith("# 2 clients, 2 rounds, FedSpaLLM with sparsegpt, sparsity 0.5\n")
    assert "All windows of 2048 tokens of each text" in text
    assert "128 windows of 2048 tokens per client for pruning, seed 0" in text


def test_the_report_names_blocks_that_nobody_drew(report):
    text = report(layer_sampling="uniform")
    assert "No client sent these blocks, and they stay dense: 6-8." in text
    assert "Uniform sampling leaves 2.50 of 10 blocks uncovered a round in expectation." in text
    assert "Uniform sampling" not in report()


def test_the_report_names_matrices_that_needed_more_damping(report):
    rows, _ = section(report(), "Unusual events")
    assert rows == [["b", "1", "4.mlp.up_proj", "damping 0.1"]]


def test_a_run_without_incident_has_no_section_for_incidents(tmp_path, log):
    quiet = EventLog(tmp_path / "quiet.jsonl")
    for event in log.events:
        quiet(event | {"notes": {}})
    write_report(tmp_path / "report.md", *config_and_results(), quiet)
    assert "Unusual events" not in (tmp_path / "report.md").read_text()


def test_the_report_says_that_the_model_is_stored_dense(report):
    assert "The model in `model/` is stored dense, with zeros" in report()


def test_events_are_kept_written_and_passed_on(tmp_path):
    seen = []
    log = EventLog(tmp_path / "metrics.jsonl", seen.append, ignore)
    for name in ("ä", "b"):
        log({"event": "upload", "client": name})
    log({"event": "end"})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert lines == list(log.events) == seen
    assert [event["client"] for event in log.uploads] == ["ä", "b"]
    assert all(event["time"] >= 0 for event in seen)


def test_a_line_that_was_cut_off_is_not_read_and_goes_when_another_is_written(tmp_path):
    file = tmp_path / "metrics.jsonl"
    EventLog(file)({"event": "start"})
    with file.open("a") as opened:
        opened.write('{"event": "blo')
    before = file.read_bytes()
    log = EventLog(file)
    assert [event["event"] for event in log.events] == ["start"]
    assert file.read_bytes() == before  # whoever only reads changes nothing
    log({"event": "end"})
    assert [event["event"] for event in EventLog(file).events] == ["start", "end"]
