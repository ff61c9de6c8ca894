"""A study: names of methods, what a cell says beside a run of its own, going on after an interruption, tables and plots."""

import dataclasses
import io
import json
import math
import re
import statistics
from pathlib import Path

import pytest
from rich.console import Console

from fedspallm_appfl import cli
from fedspallm_appfl.algorithms import registry
from fedspallm_appfl.errors import ConfigError
from fedspallm_appfl.events import EventLog
from fedspallm_appfl.reports.pages.curves import Curve, Point, curves, round_numbers
from fedspallm_appfl.reports.report import traffic
from fedspallm_appfl.runs import evaluation, experiment
from fedspallm_appfl.settings.schema import Client, Config
from fedspallm_appfl.study import measure as measuring
from fedspallm_appfl.study import page as study_page
from fedspallm_appfl.study import plots as study_plots
from fedspallm_appfl.study import report as study_report
from fedspallm_appfl.study.cells import Cell, opened
from fedspallm_appfl.study.plan import DEFAULT, Method, Plan, parse_method, planned
from fedspallm_appfl.study.report import Study, page, spread, way_closed
from fedspallm_appfl.tensors.target import parse_target
from helpers.command_line import parse
from helpers.paths import DEMO, ROOT
from helpers.tiny import run, save_tiny, tiny_config

DEMO_CONFIG = ROOT / "configs" / "demo.yaml"
METHODS = ["standalone", "fedprllm+wanda", "gram", "gram+admm"]
TARGETS = ["0.5", "2:4"]
TEXTS = ("austen", "jargon")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fedspallm", {"algorithm": "fedspallm"}),
        ("fedspallm+admm", {"algorithm": "fedspallm", "pruner": "admm"}),
        ("gram", {"algorithm": "gram"}),
        ("gram+wanda", {"algorithm": "gram", "pruner": "wanda"}),
        ("gram-sweep+admm", {"algorithm": "gram", "pruner": "admm", "propagate": "pruned"}),
        ("gram-dense", {"algorithm": "gram", "propagate": "pruned", "target": "dense"}),
        ("gram-blocks", {"algorithm": "gram", "propagate": "pruned", "stride": 1}),
        ("magnitude", {"algorithm": "fedprllm", "pruner": "magnitude"}),
        ("standalone+admm", {"algorithm": "standalone", "pruner": "admm"}),
        ("gram+fisher", {"algorithm": "gram", "allocation": "fisher"}),
        ("gram+recovery+wanda", {"algorithm": "gram", "pruner": "wanda", "recovers": True}),
        ("fast+recovery", {"algorithm": "fedprllm", "preset": "fast", "recovers": True}),
        ("best", {"algorithm": "gram", "preset": "best"}),
    ],
)
def test_a_name_says_algorithm_pruner_stages_and_how_gram_sweeps(text, expected):
    assert parse_method(text) == Method(text, **expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fedspalm", "got 'fedspalm'; did you mean fedspallm?"),
        (
            "gram_sweep",
            "one of fedspallm, fedprllm, fedavg, .*gram-dense, magnitude, paper, fast, best; got 'gram_sweep'",
        ),
        ("gram+adm", r"gram\+adm: a pruner or a stage is one of .*; got 'adm'; did you mean admm\?"),
        ("gram+", r"a pruner or a stage is one of .*, fisher, recovery; got ''$"),
        ("magnitude+wanda", r"there is one already; leave out \+wanda"),
        ("best+wanda", r"there is one already; leave out \+wanda"),
    ],
)
def test_an_unknown_name_is_explained_with_the_valid_ones(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_method(text)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Two clients and two texts to measure on, all of a few pages."""
    folder = tmp_path_factory.mktemp("study")
    for file in [*(DEMO / "text").glob("*/calib.txt"), *(DEMO / "text").glob("*/test.txt")]:
        (folder / f"{file.parent.name}-{file.name}").write_text(file.read_text("utf-8")[:5000], "utf-8")
    texts = {name: str(folder / f"{name}-test.txt") for name in TEXTS}
    clients = [{"client_id": name, "data": {"text": str(folder / f"{name}-calib.txt")}} for name in ("austen", "bible")]
    evaluation = {"texts": texts, "length": 24, "windows": 4, "batch": 4, "compare": ["standalone"]}
    model = save_tiny(folder / "m")
    return tiny_config(folder / "c", model, "fedspallm", clients=clients, evaluation=evaluation)


def test_the_defaults_are_methods_that_the_demo_can_run(tmp_path):
    plan, problems = planned(DEMO_CONFIG, ["evaluation.compare=[standalone]"], DEFAULT, out=tmp_path)
    assert problems == []
    assert (plan.targets, plan.seeds, len(plan.methods)) == ((parse_target(0.5),), (0,), 11)


def test_all_problems_of_all_combinations_are_reported_together(tmp_path, config):
    wrong = ["fedspalm", "consensus+wanda", "fedavg", "fedavg+sparsegpt"]
    _, problems = planned(config, ["seed=0"], wrong, ["0.5", "3:2", "64:129"], ["0", "x"], tmp_path)
    for words in ("'fedspalm'", "got 'x'", "3:2", "consensus+wanda: ", "the same as fedavg", "129"):
        assert len([problem for problem in problems if words in problem]) >= 1, words
    assert not any("fedavg: client_configs.train_configs.sparsity" in problem for problem in problems)
    assert not (tmp_path / "cells.jsonl").exists()


def test_what_every_method_has_wrong_is_said_once(tmp_path, config):
    _, problems = planned(config, ["server_configs.num_clients=5"], ["fedavg", "fedspallm"], out=tmp_path)
    assert len(problems) == 1
    assert problems[0].startswith("server_configs.num_clients is 5")


def test_a_study_needs_text_to_measure_on(tmp_path):
    file = tiny_config(tmp_path / "c", save_tiny(tmp_path / "m"), "fedspallm")
    assert "evaluation.texts" in planned(file, [], ["fedavg"], out=tmp_path / "out")[1][0]


def test_the_command_of_a_plan_gives_the_same_plan(tmp_path, config, monkeypatch):
    overrides = ["client_configs.data.windows=4", "evaluation.texts={a: 'b c'}"]
    plan, _ = planned(
        config, overrides, ["fedavg", "gram+admm"], ["0.5", "2:4"], ["1", "0"], tmp_path / "out", ["fedavg"]
    )
    args = parse(plan.command(), monkeypatch)
    words = args.overrides, args.algorithms, args.sparsity, args.seeds, args.out, args.keep_models
    got = planned(Path(args.config), *words)[0]
    assert got == plan


def test_overrides_may_stand_after_a_list_of_names(monkeypatch, tmp_path, config):
    seen = []
    monkeypatch.setattr(measuring, "study", lambda plan, *_: seen.append(plan))
    words = ["study", str(config), "--out", str(tmp_path), "--sparsity", "0.6", "client_configs.data.windows=4"]
    assert cli.main(words) == 0
    assert (seen[0].targets, seen[0].overrides) == ((parse_target(0.6),), ("client_configs.data.windows=4",))
    assert seen[0].config.client_configs.data.windows == 4


@pytest.fixture(scope="module")
def done(config):
    """A finished study with two seeds, its folder and cells."""
    out = config.parent / "out"
    assert measure(config, out) == 0
    found = json.loads((out / "study.json").read_text())
    return out, {(cell["method"], cell["target"], cell["seed"]): cell for cell in found["cells"]}


def measure(config, out, *words, methods=METHODS):
    chosen = ["--algorithms", *methods, "--sparsity", *TARGETS, "--seeds", "0", "1", "--out", str(out)]
    return cli.main(["study", str(config), *chosen, *words])


def test_every_cell_is_there_with_exactly_its_sparsity(done):
    _, cells = done
    assert len(cells) == len(METHODS) * len(TARGETS) * 2
    assert {cell["sparsity"] for cell in cells.values()} == {0.5}
    assert all(cell["server_seconds"] > 0 and cell["client_seconds"] > 0 for cell in cells.values())


@pytest.mark.parametrize(
    ("method", "target", "overrides"),
    [
        ("fedprllm+wanda", "2:4", ["algorithm=fedprllm", "client_configs.train_configs.pruner=wanda"]),
        ("gram+admm", "2:4", ["algorithm=gram", "client_configs.train_configs.pruner=admm"]),
        ("standalone", "0.5", ["algorithm=standalone"]),
    ],
)
def test_a_cell_says_what_a_run_of_its_own_says(config, done, method, target, overrides):
    """That of `gram+admm` is made from the sums that another cell has gathered."""
    cell = done[1][method, target, 1]
    more = ["seed=1", f"client_configs.train_configs.sparsity='{target}'", "evaluation.compare=[]"]
    folder = run(config, *overrides, *more, "--overwrite")
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    up, down = traffic(EventLog(folder / "metrics.jsonl"))
    assert (cell["up"], cell["down"]) == (up, down)
    rows = {event["method"]: event["perplexity"] for event in events if event["event"] == "evaluation"}
    rows.pop("dense")
    for text in TEXTS:
        assert cell["perplexity"][text] == pytest.approx(
            statistics.geometric_mean(row[text] for row in rows.values()), rel=1e-12
        )


def test_sums_are_gathered_once_a_seed(done):
    out, cells = done
    grams = {key: cell["stored"] for key, cell in cells.items() if key[0].startswith("gram")}
    assert sorted(key[2] for key, stored in grams.items() if not stored) == [0, 1]
    assert len({json.dumps(cells[key]["up"]) for key in grams}) == 1
    assert len([path for path in (out / "runs").iterdir() if (path / "report.md").exists()]) == len(cells) - 6


def test_shared_uploads_give_what_runs_of_their_own_give(config, tmp_path):
    words = [
        "study",
        str(config),
        "--algorithms",
        "standalone",
        "fedavg",
        "fedspallm",
        "fedavg+wanda",
        "--sparsity",
        "0.5",
    ]
    assert cli.main([*words, "--out", str(tmp_path / "apart")]) == 0
    assert cli.main([*words, "--out", str(tmp_path / "shared"), "--share-uploads"]) == 0
    apart, shared = (
        {cell["method"]: cell for cell in json.loads((tmp_path / name / "study.json").read_text())["cells"]}
        for name in ("apart", "shared")
    )
    for what in ("perplexity", "up", "down"):
        assert {name: cell[what] for name, cell in shared.items()} == {name: cell[what] for name, cell in apart.items()}
    runs = {name: cell["run_of"] for name, cell in shared.items()}
    assert runs == {"standalone": "fedspallm", "fedavg": "fedspallm", "fedspallm": "", "fedavg+wanda": ""}
    assert len(list((tmp_path / "shared" / "runs").iterdir())) == 2
    assert "| fedavg ‡ |" in (tmp_path / "shared" / "study.md").read_text()


def test_models_and_sums_are_not_left_on_disk(done):
    out, _ = done
    assert [path for path in out.rglob("*") if path.suffix == ".safetensors"] == []


def test_plots_and_tables_are_written(done):
    out, _ = done
    for name in study_plots.FILES:
        assert (out / name).stat().st_size > 10_000
    text = (out / "study.md").read_text()
    for words in ("## Sparsity 0.5", "## Sparsity 2:4", "| gram+admm † |", "gap closed", "50.0000 %", "--seeds 0 1"):
        assert words in text
    shown = (out / "study.html").read_text()
    assert all(f"<title>{method}, sparsity {target}: " in shown for method in METHODS for target in TARGETS)


def test_a_finished_study_is_shown_again_without_a_run(config, done, monkeypatch):
    monkeypatch.setattr(experiment, "conduct", None)
    monkeypatch.setattr(evaluation, "evaluate", None)
    out, cells = done
    before = (out / "cells.jsonl").read_text()
    assert measure(config, out) == 0
    assert (out / "cells.jsonl").read_text() == before


def test_a_study_that_was_killed_goes_on_with_what_is_missing(config, tmp_path, monkeypatch, done):
    lines = (done[0] / "cells.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cells.jsonl").write_text("".join(lines[:-3]) + lines[-3][:40])
    ran, conduct = [], experiment.conduct
    monkeypatch.setattr(experiment, "conduct", lambda c, *a, **k: ran.append(c.run_dir) or conduct(c, *a, **k))
    assert measure(config, tmp_path, "--keep-models", "gram+admm") == 0
    assert [path.rsplit("/")[-1] for path in ran] == ["gram-2-4-seed1"]  # the sums are gathered anew
    kept = [path.parent.parent.name for path in tmp_path.rglob("model.safetensors")]
    assert sorted(kept) == ["gram+admm-0.5-seed1", "gram+admm-2-4-seed1"]
    timed = ("client_seconds", "server_seconds", "cpu_seconds", "memory_bytes", "stored")
    now = json.loads((tmp_path / "study.json").read_text())["cells"]
    for cell in now:
        earlier = done[1][cell["method"], cell["target"], cell["seed"]]
        assert {k: v for k, v in cell.items() if k not in timed} == {k: v for k, v in earlier.items() if k not in timed}


def test_other_settings_are_refused_with_what_differs(config, done, capsys):
    assert measure(config, done[0], "client_configs.data.windows=5") == 2
    said = capsys.readouterr().err
    assert "client_configs.data.windows was 6 and is 5" in said
    assert "--overwrite" in said


def test_more_methods_and_targets_go_on_in_the_same_folder(config, done):
    with opened(done[0], planned(config, ["seed=7", "algorithm=gram"], ["fedavg"], ["0.7"])[0].settings()) as file:
        assert len(file.cells) == len(METHODS) * len(TARGETS) * 2 + 1


def test_two_studies_do_not_work_in_one_folder(tmp_path):
    with (
        opened(tmp_path / "a", {}),
        pytest.raises(ConfigError, match="another study is using"),
        opened(tmp_path / "a", {}),
    ):
        pass


def test_a_folder_of_something_else_is_left_alone(config, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert measure(config, tmp_path, "--overwrite") == 2
    assert "holds no earlier study" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_overwrite_begins_anew(config, tmp_path, monkeypatch):
    with opened(tmp_path, {"other": 1}) as file:
        file.add(Cell("x", "0.5", 0, {}))
    monkeypatch.setattr(measuring, "_measure", lambda plan, file, console: made.append(dict(file.cells)))
    monkeypatch.setattr(measuring, "_write", lambda *_: None)
    monkeypatch.setattr(measuring, "cells_of", lambda plan: [])
    made = []
    with pytest.raises(KeyError):  # nothing was measured
        measuring.study(planned(config, [], ["fedavg"], out=tmp_path)[0], None, overwrite=True)
    assert made == [{}]


def test_several_workers_begin_with_what_trains_seed_by_seed():
    def entry(seed, rounds):
        config = Config(seed=seed)
        config.recovery.rounds = rounds
        return measuring._Entry(None, config, ("any", "0.5", seed), ())

    todo = [entry(7, 0), entry(7, 1), entry(7, 0), entry(3, 0), entry(3, 2)]
    expected = [todo[place] for place in (1, 0, 2, 4, 3)]
    measuring._trained_first(todo)
    assert todo == expected


def test_without_matplotlib_nothing_begins(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert measure(config, tmp_path / "out") == 2
    assert "pip install --constraint constraints.txt '.[study]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def made_by_hand(perplexity, seeds=(0, 1), target="0.5"):
    """A study of one target from the geometric means of each method, a number a seed; texts a and b are x/2 and 2x."""
    same = {"zeros": 5, "entries": 10, "up": {"k": 30, "l": 50}, "down": {"k": 0, "l": 2}, "weights": 10}
    same |= {"client_seconds": 1.5, "memory_bytes": 10**6, "cpu_seconds": 3.0}
    cells = [
        Cell(method, target, seed, {"a": x / 2, "b": 2 * x}, server_seconds=seed, **same)
        for method, row in perplexity.items()
        for seed, x in zip(seeds, row, strict=True)
    ]
    algorithms = {method: registry.find(parse_method(method).algorithm) for method in perplexity}
    config = Config(clients=[Client(client_id=name) for name in "kl"])
    dense = Cell("dense", "", 0, {"a": 5.0, "b": 20.0})
    return Study(dense, cells, tuple(perplexity), (target,), seeds, config, "fedspallm study x.yaml", algorithms)


def test_mean_and_spread_by_hand():
    assert spread([2.0, 4.0]).mean == 3
    assert spread([2.0, 4.0]).deviation == pytest.approx(math.sqrt(2))
    assert spread([2.0, 4.0]).text(2) == "3.00 ± 1.41"
    assert spread([2.0]).text(1) == "2.0"
    assert spread([2.0, math.inf]).text(1) == "inf"


def test_way_closed_by_hand():
    study_ = made_by_hand({"standalone": (20, 30), "centralized": (10, 20), "fedspallm": (15, 22), "gram": (8, 20)})
    assert way_closed(study_, "fedspallm", "0.5").mean == pytest.approx((0.5 + 0.8) / 2)
    assert way_closed(study_, "fedspallm", "0.5").deviation == pytest.approx(0.3 / math.sqrt(2))
    assert way_closed(study_, "gram", "0.5").mean == pytest.approx((1.2 + 1.0) / 2)
    assert [way_closed(study_, end, "0.5").mean for end in ("standalone", "centralized")] == [0, 1]


def test_the_ends_of_the_way_are_shown_without_a_spread():
    study_ = made_by_hand({"standalone": (20, 30), "centralized": (10, 20), "fedspallm": (15, 22)})
    ways = [study_report._way(study_, method, "0.5") for method in ("standalone", "centralized", "fedspallm")]
    assert ways == ["0 %", "100 %", "65 ± 21 %"]


def test_the_table_says_what_its_numbers_are():
    study_ = made_by_hand({"standalone": (20, 30), "centralized": (10, 20)})
    console = Console(file=io.StringIO(), width=120)
    console.print(study_report.table(study_))
    shown = console.file.getvalue()
    assert "Perplexity by sparsity, geometric mean of 2 texts, ± over 2 seeds" in shown
    assert "gap closed ┃" in shown
    two = dataclasses.replace(study_, targets=("0.7", "0.5"), methods=())
    console.print(study_report.table(two))
    assert "gap closed at 0.5 ┃ up per client at 0.5" in console.file.getvalue()


def test_equal_targets_are_measured_once():
    plan, problems = planned(DEMO_CONFIG, [], ["gram"], ["0.5", "0.50", "1/2", "02:4", "no"])
    assert plan.targets == (parse_target("0.5"), parse_target("2:4"))
    assert [problem for problem in problems if "--sparsity" in problem and "got 'no'" in problem]


@pytest.mark.parametrize(
    "rows",
    [
        {"standalone": (20, 30), "fedspallm": (15, 22)},
        {"standalone": (20, 20), "centralized": (10, 20), "fedspallm": (15, 22)},
    ],
)
def test_there_is_no_way_to_close_where_an_end_is_missing_or_no_better(rows):
    assert way_closed(made_by_hand(rows), "fedspallm", "0.5") is None


def test_the_way_goes_between_the_ends_without_a_pruner_of_their_own():
    rows = {"standalone+admm": (9, 9), "standalone": (20, 30), "centralized": (10, 20), "gram": (15, 25)}
    assert way_closed(made_by_hand(rows), "gram", "0.5").mean == pytest.approx(0.5)


def test_the_page_by_hand(tmp_path):
    study_ = made_by_hand({"standalone": (20, 30), "centralized": (10, 20), "fedspallm": (15, 22)})
    text = page(study_)
    assert "| dense | 5.00 | 20.00 | 10.00 | - | 0.0000 % |" in text
    assert "| fedspallm | 9.25 ± 2.47 | 37.00 ± 9.90 | 18.50 ± 4.95 | 65 ± 21 % | 50.0000 % |" in text
    assert "| fedspallm | 40 B | 1 B | 32.00 | 1.5 ± 0.0 | 0.5 ± 0.7 | 3.0 ± 0.0 | 1.0 MB |" in text
    assert "| standalone | - | - | - | 1.5 ± 0.0 | 0.5 ± 0.7 | 3.0 ± 0.0 | 1.0 MB |" in text
    assert "†" not in text
    study_page.write(study_, tmp_path)
    shown = (tmp_path / "study.html").read_text("utf-8")
    for row in re.findall(r"^\| (.*) \|$", text, re.MULTILINE):
        cells = row.split(" | ")
        inner = "".join(f"<td>{cell}</td>" for cell in cells[1:])
        assert cells[1] == "---:" or inner in shown or f'<th scope="col">{cells[1]}</th>' in shown
    assert "<title>fedspallm, sparsity 0.5: 18.50 ± 4.95, 40 B</title>" in shown
    assert "<title>standalone: 25.00</title>" in shown  # sends nothing that a federation would send: a line across
    assert not re.search(r"https?://|\bsrc=|\bhref=|<script|<link", shown)


def test_equal_ratios_of_perplexity_are_equally_far_apart():
    points = [Point(x, y, f"{y}", reach=1.0) for x, y in ((0.1, 10.0), (0.2, 20.0), (0.3, 40.0))]
    drawn = curves([Curve("a", "c0", points=points)], {"10 %": 0.1, "30 %": 0.3}, "three")
    (x0, y0), (x1, y1), (x2, y2) = [
        tuple(map(float, place)) for place in re.findall(r'<svg x="([\d.]+)%" y="([\d.]+)"><path', drawn)
    ]
    assert (y0 - y1, x1 - x0) == (pytest.approx(y1 - y2, abs=0.11), pytest.approx(x2 - x1, abs=0.011))
    assert y0 > y1 > y2 and x0 < x1
    assert drawn.count("bar") == 3


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ((9.0, 21.0), [10, 12, 14, 16, 18, 20]),
        ((3.0, 1200.0), [5, 10, 20, 50, 100, 200, 500, 1000]),
        ((0.55, 3.4), [0.7, 1, 1.5, 2, 3]),
        ((17.5, 18.9), [17.6, 17.8, 18, 18.2, 18.4, 18.6, 18.8]),
    ],
)
def test_numbers_of_an_axis_are_round(ends, expected):
    assert round_numbers(*ends) == expected


def test_plots_stand_what_is_infinite_or_alone(tmp_path):
    pruners = ("", "+admm", "+wanda")
    many = {f"{name}{pruner}": (9.0, 11.0) for name in ("fedspallm", "fedavg", "gram") for pruner in pruners}
    study_plots.write(made_by_hand(many | {"fedspallm": (math.inf, 3.0)}), tmp_path)
    study_plots.write(made_by_hand({"standalone": (4.0,)}, seeds=(0,), target="2:4"), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(study_plots.FILES)


def test_a_plan_leaves_the_configuration_as_it_was(config, tmp_path):
    plan = planned(config, [], METHODS, TARGETS, ["0"], tmp_path)[0]
    before = dataclasses.asdict(plan.config)
    for method in plan.methods:
        made = plan.experiment(method, parse_target("2:4"), 3)
        assert (made.seed, made.algorithm, made.evaluation.compare) == (3, method.algorithm, [])
        assert {client.train_configs.sparsity for client in made.clients} == {parse_target("2:4")}
    assert dataclasses.asdict(plan.config) == before
    assert isinstance(plan, Plan)
