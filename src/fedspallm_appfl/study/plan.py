"""A study: several algorithms and targets on the same clients, with several seeds, in one table (docs/study.md).

Every cell is a separate experiment in one process, except the cells of `gram` with statistics of the dense model:
its uploads depend on neither target nor pruner, so one run per seed gathers them. The others are made from the sums.
"""

import copy
import dataclasses
import difflib
import gc
import json
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from fedspallm_appfl import __version__
from fedspallm_appfl.algorithms.registry import ALGORITHMS
from fedspallm_appfl.errors import ConfigError, FedSpaLLMError
from fedspallm_appfl.events import Event, EventLog, ignore
from fedspallm_appfl.heap import give_back
from fedspallm_appfl.models.lazy_model import Skeleton
from fedspallm_appfl.pruning.pruner import PRUNERS
from fedspallm_appfl.rounds.folds import STATISTICS
from fedspallm_appfl.runs import experiment, further_models, run_dir, serial
from fedspallm_appfl.runs.progress import StudyProgress
from fedspallm_appfl.runs.report import traffic
from fedspallm_appfl.settings.schema import Config, Gram, load_config
from fedspallm_appfl.study import plots as study_plots
from fedspallm_appfl.study import report as study_report
from fedspallm_appfl.study.cells import DENSE, FILE, Cell, CellFile, opened
from fedspallm_appfl.tensors.sparsity import parse_target
from fedspallm_appfl.validation.globus_rules import check_on_this_machine
from fedspallm_appfl.validation.rules import check, check_with_files, indivisible
from fedspallm_appfl.wire.gram_store import GramStore

DEFAULT = (
    "standalone",
    "fedprllm+wanda",
    "fedavg",
    "fedspallm",
    "consensus",
    "gram",
    "consensus+admm",
    "gram+admm",
    "centralized",
)
RUNS = "runs"  # a run directory for each cell
OWN = (FILE, "study.md", "study.json", RUNS, *study_plots.FILES)


@dataclass(frozen=True)
class Method:
    """One item of `--algorithms`.

    Attributes:
        name: as spelled by the user.
        algorithm: the algorithm.
        pruner: the pruner of all clients; None uses that of the configuration.
        propagate: of `gram`.
        target: of `gram`.
    """

    name: str
    algorithm: str
    pruner: str | None = None
    propagate: str = "dense"
    target: str = "own"

    @property
    def shares_uploads(self) -> bool:
        """Whether one upload serves all targets and pruners."""
        return self.algorithm == "gram" and self.propagate == "dense"


SHORTCUTS = {
    "gram-sweep": {"algorithm": "gram", "propagate": "pruned"},
    "gram-dense": {"algorithm": "gram", "propagate": "pruned", "target": "dense"},
    "magnitude": {"algorithm": "fedprllm", "pruner": "magnitude"},
}
NAMES = (*ALGORITHMS, *SHORTCUTS)


@dataclass(frozen=True)
class Plan:
    """The plan of a study.

    Attributes:
        config: the settings that all cells share; seed, sparsity and algorithm are replaced.
        source: the configuration file.
        overrides: key=value arguments.
        methods: the rows.
        targets: ratios or n:m, one table each.
        seeds: seeds for mean and spread.
        out: the study's folder.
        keep_models: leave the pruned models on disk.
    """

    config: Config
    source: Path
    overrides: tuple[str, ...]
    methods: tuple[Method, ...]
    targets: tuple[str, ...]
    seeds: tuple[int, ...]
    out: Path
    keep_models: bool = False

    def experiment(self, method: Method, target: str, seed: int) -> Config:
        """The configuration of one cell."""
        made = copy.deepcopy(self.config)
        made.algorithm, made.seed, made.evaluation.compare = method.algorithm, seed, []
        asked = dataclasses.replace(made.gram, propagate=method.propagate, target=method.target)
        made.gram = asked if method.algorithm == "gram" else Gram()
        for owner in (made.client_configs, *made.clients):
            owner.train_configs.sparsity = target
            owner.train_configs.pruner = method.pruner or owner.train_configs.pruner
        made.run_dir = str(self.out / RUNS / f"{method.name}-{further_models.folder_name(target)}-seed{seed}")
        return made

    def settings(self) -> dict[str, Any]:
        """The settings that all cells share, in plain types."""
        shared = copy.deepcopy(self.config)
        shared.run_dir, shared.seed, shared.algorithm, shared.evaluation.compare = "", 0, "", []
        shared.gram = dataclasses.replace(shared.gram, propagate="", target="")
        for owner in (shared.client_configs, *shared.clients):
            owner.train_configs.sparsity = ""
        return {"fedspallm_appfl": __version__, **dataclasses.asdict(shared)}

    def command(self) -> str:
        """The command that measures the same."""
        words = ["fedspallm", "study", str(self.source)]
        words += ["--algorithms", *(method.name for method in self.methods), "--sparsity", *self.targets]
        words += ["--seeds", *map(str, self.seeds), "--out", str(self.out)]
        words += ["--keep-models"] * self.keep_models
        return shlex.join([*words, *self.overrides])


def parse_method(text: str) -> Method:
    """Read NAME or NAME+PRUNER.

    Raises:
        ConfigError: a name is not valid; lists the valid ones.
    """
    name, plus, pruner = text.partition("+")
    _require("an algorithm", name, NAMES)
    if plus:
        _require(f"{text}: a pruner", pruner, PRUNERS)
    if plus and name == "magnitude":
        raise ConfigError(f"--algorithms: magnitude takes no pruner, got {text}; write magnitude")
    made: dict[str, Any] = {"algorithm": name, **({"pruner": pruner} if plus else {}), **SHORTCUTS.get(name, {})}
    return Method(text, **made)


def _require(what: str, name: str, valid: Sequence[str]) -> None:
    if name not in valid:
        near = difflib.get_close_matches(name, valid, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"--algorithms: {what} must be one of {', '.join(valid)}; got {name!r}{hint}")


def planned(
    source: Path,
    overrides: Sequence[str],
    algorithms: Sequence[str],
    sparsity: Sequence[str] = (),
    seeds: Sequence[str] = (),
    out: Path | None = None,
    keep_models: bool = False,
) -> tuple[Plan, list[str]]:
    """Read the plan of a study.

    Args:
        source: the configuration.
        overrides: `key=value`.
        algorithms: the methods as spelled by the user.
        sparsity: targets; empty for the target of the configuration.
        seeds: whole numbers; empty for the seed of the configuration.
        out: the study's folder; None for the configuration's run_dir with `-study` after it.
        keep_models: leave the pruned models on disk.

    Returns:
        The plan, and all problems that would prevent a cell from running.

    Raises:
        ConfigError: the file cannot be read as YAML, or an override has no `=`.
    """
    config, malformed = load_config(source, overrides)
    found, methods = list(malformed), []
    for text in dict.fromkeys(algorithms):
        try:
            methods.append(parse_method(text))
        except ConfigError as error:
            found.append(str(error))
    found += [f"--seeds: must be whole numbers from 0, got {seed!r}" for seed in seeds if not seed.isdecimal()]
    if out is None and not config.run_dir:
        found.append("--out: name a folder for the results, e.g. --out runs/study")
    plan = Plan(
        config,
        source,
        tuple(overrides),
        tuple(methods),
        tuple(dict.fromkeys(map(_spelt, sparsity))) or (config.client_configs.train_configs.sparsity,),
        tuple(dict.fromkeys(int(seed) for seed in seeds if seed.isdecimal())) or (config.seed,),
        out or Path(f"{config.run_dir}-study"),
        keep_models,
    )
    return plan, found if malformed or not methods else [*found, *_problems(plan)]


def _spelt(target: str) -> str:
    """Normal form of a target, so each cell has one name; `check` reports invalid targets."""
    with suppress(ValueError):
        return further_models.spelt(parse_target(target))
    return target


def _problems(plan: Plan) -> list[str]:
    found: dict[str, list[str]] = {}
    for method, target, seed in _cells(plan):
        config = plan.experiment(method, target, seed)
        for problem in [*check(config), *check_on_this_machine(config)]:
            found.setdefault(problem, []).append(method.name)
    everywhere = len(plan.methods)
    named = ((problem, list(dict.fromkeys(names))) for problem, names in found.items())
    listed = [p if len(names) == everywhere else f"{', '.join(names)}: {p}" for p, names in named]
    return [*listed, *_twice(plan), *_files(plan)]


def _twice(plan: Plan) -> Iterator[str]:
    """Methods that are the same under two names."""
    configured = plan.config.pruners()
    seen: dict[Method, str] = {}
    for method in plan.methods:
        same = dataclasses.replace(method, name="", pruner=method.pruner or configured)
        if same in seen:
            yield f"--algorithms: {method.name} is the same as {seen[same]}; name it once"
        seen[same] = method.name


def _files(plan: Plan) -> Iterator[str]:
    """Problems that show once model and text are opened."""
    if not plan.config.evaluation.texts:
        yield "evaluation.texts: a study compares perplexities; name at least one held-out text"
    yield from check_with_files(plan.experiment(plan.methods[0], plan.targets[0], plan.seeds[0]))
    with suppress(FedSpaLLMError):  # reported above
        blocks = Skeleton(plan.config.model.path, plan.config.model.blocks).layout.blocks
        for target in plan.targets[1:]:
            with suppress(ValueError):  # the same
                yield from indivisible(blocks, parse_target(target))


def _cells(plan: Plan) -> Iterator[tuple[Method, str, int]]:
    """The cells seed by seed, which gives early means over few seeds; cells that share uploads are adjacent."""
    for seed in plan.seeds:
        for method in sorted(plan.methods, key=lambda method: method.shares_uploads):
            for target in plan.targets:
                yield method, target, seed


def study(plan: Plan, console: Console, overwrite: bool = False) -> None:
    """Measure every missing cell, then write tables and plots.

    Args:
        plan: what to measure; without problems.
        console: for progress and the final table.
        overwrite: discard the results of an earlier study in the folder.

    Raises:
        ConfigError: the folder holds something else or a study with other settings, or matplotlib is missing.
        FedSpaLLMError: an experiment fails; finished cells are kept.
    """
    study_plots.require()
    with opened(plan.out, plan.settings(), overwrite) as file:
        if not file.cells:
            _clear(plan.out)
        _measure(plan, file, console)
        asked = [file.cells[method.name, target, seed] for method, target, seed in _cells(plan)]
        _write(plan, file.cells[DENSE, "", 0], asked, console)


def _clear(out: Path) -> None:
    """Remove the files of an earlier study, except the file of cells, which is locked."""
    for name in set(OWN) - {FILE}:
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _measure(plan: Plan, file: CellFile, console: Console) -> None:
    todo = [cell for cell in _cells(plan) if (cell[0].name, *cell[1:]) not in file.cells]
    texts = experiment.held_out(plan.config)
    with StudyProgress(console, len(todo)) as progress:
        if (DENSE, "", 0) not in file.cells:
            file.add(Cell(DENSE, "", 0, experiment.evaluate(plan.config, texts, experiment.DENSE, ignore)[DENSE]))
        serial.load()  # excluded from the seconds and memory of the first cell
        gathered: dict[int, tuple[Path, Cell]] = {}  # seed -> run with its sums, and the cost of gathering them
        for method, target, seed in todo:
            progress.begins(f"{method.name}  sparsity {target}  seed {seed}")
            config = plan.experiment(method, target, seed)
            if seed in gathered and method.shares_uploads:
                cell = _from_sums(config, method, texts, *gathered[seed])
            else:
                _forget(plan, gathered)
                cell = _run(config, method)
                if method.shares_uploads:
                    gathered[seed] = Path(config.run_dir) / STATISTICS, cell
            file.add(cell)
            progress.ends(f"perplexity {cell.mean:.2f}")
            if not plan.keep_models:
                _drop(config, "model", "models")
        _forget(plan, gathered)


def _forget(plan: Plan, gathered: dict[int, tuple[Path, Cell]]) -> None:
    """Remove sums that no cell needs any more, also those of an interrupted study; they are its largest files."""
    for folder in (plan.out / RUNS).glob(f"*/{STATISTICS}"):
        shutil.rmtree(folder)
    gathered.clear()


def _drop(config: Config, *names: str) -> None:
    for name in names:
        shutil.rmtree(Path(config.run_dir) / name, ignore_errors=True)


def _run(config: Config, method: Method) -> Cell:
    """Run one experiment."""
    memory = Memory()
    results, log = experiment.conduct(config, serial.run, True, memory, dense=False)
    up, down = traffic(log)
    client_seconds = sum(event["seconds"] for event in log.of("upload"))
    zeros, entries = _from_manifests(Path(config.run_dir))
    return Cell(
        method.name,
        config.client_configs.train_configs.sparsity,
        config.seed,
        results.perplexity[config.algorithm],
        zeros,
        entries,
        up,
        down,
        sum(matrix.entries for matrix in results.matrices),
        client_seconds,
        round(_seconds(log) - client_seconds, 4),
        memory.bytes,
    )


def _seconds(log: EventLog) -> float:
    """Wall seconds from when the clients were ready until the model was written and read back."""
    return log.of("written")[0]["time"] - log.of("ready")[0]["time"]


def _from_manifests(run: Path) -> tuple[int, int]:
    """(zeros, entries) of the model of a run, or of all models of its clients."""
    files = [run / "manifest.json"] if (run / "manifest.json").is_file() else sorted(run.glob("models/*/manifest.json"))
    found = [json.loads(file.read_text("utf-8")) for file in files]
    return sum(one["zeros"] for one in found), sum(one["prunable"] for one in found)


def _from_sums(config: Config, method: Method, texts: Mapping[str, Tensor], sums: Path, gathering: Cell) -> Cell:
    """Make a model from stored sums, then check and measure it like a run."""
    skeleton, sparsity = Skeleton(config.model.path, config.model.blocks), config.client_configs.train_configs.sparsity
    with run_dir.claimed(config, overwrite=True) as run:
        memory, started = Memory(), time.monotonic()
        packed = further_models.pruned(config, parse_target(sparsity), skeleton, GramStore(sums), run / "state")
        experiment.write_pruned(config, skeleton, packed, run)
        seconds = time.monotonic() - started
        memory.read()
        zeros, entries = _from_manifests(run)
        perplexity = experiment.evaluate(config, texts, {method.algorithm: packed.load}, ignore)[method.algorithm]
        _drop(config, "state")
    return dataclasses.replace(
        gathering,
        method=method.name,
        target=sparsity,
        perplexity=perplexity,
        zeros=zeros,
        entries=entries,
        server_seconds=round(seconds, 4),
        memory_bytes=memory.bytes,
        stored=True,
    )


class Memory:
    """The peak memory of the process above what it held when this object was created.

    It listens to events and reads the peak when the pruned models are written.

    Attributes:
        bytes: resident; None if the system does not report it.
    """

    def __init__(self) -> None:
        self.bytes: int | None = None
        self._start: int | None = None
        gc.collect()
        give_back()
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # reset the peak
            self._start = _resident("VmRSS")

    def __call__(self, event: Event) -> None:
        """Take one event."""
        if event["event"] == "written":
            self.read()

    def read(self) -> None:
        """Record the peak so far."""
        self.bytes = None if self._start is None else _resident("VmHWM") - self._start


def _resident(name: str) -> int:
    """Resident memory of this process in bytes: `VmRSS` now, `VmHWM` at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _write(plan: Plan, dense: Cell, cells: list[Cell], console: Console) -> None:
    measured = study_report.Study(
        dense,
        cells,
        tuple(method.name for method in plan.methods),
        plan.targets,
        plan.seeds,
        plan.config,
        plan.command(),
        {method.name: method.algorithm for method in plan.methods},
    )
    study_plots.write(measured, plan.out)
    study_report.write(measured, plan.out)
    console.print(study_report.table(measured))
    console.print(f"study   {plan.out / 'study.md'}", highlight=False, markup=False)
