"""Measure every cell of a study, then write tables and plots.

Every cell is an experiment of its own, run in one process, except where statistics of the dense model are gathered: such
uploads depend on neither target nor pruner, so one run a seed gathers them, and the other cells are made of the sums.
"""

import dataclasses
import gc
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from torch import Tensor

from fedspallm_appfl.adaptors import registration
from fedspallm_appfl.algorithms import registry
from fedspallm_appfl.allocation.choice import allocated
from fedspallm_appfl.devices import give_back
from fedspallm_appfl.estimates.processes import settled
from fedspallm_appfl.events import Event, EventLog, ignore
from fedspallm_appfl.models.lazy_model import Skeleton
from fedspallm_appfl.reports import card
from fedspallm_appfl.reports.progress import StudyProgress
from fedspallm_appfl.reports.report import traffic
from fedspallm_appfl.rounds.folds.context import STATISTICS
from fedspallm_appfl.runs import evaluation, experiment, further_models, run_dir, serial
from fedspallm_appfl.runs.processes import Workers, result
from fedspallm_appfl.settings import plugins
from fedspallm_appfl.settings.schema import Config
from fedspallm_appfl.study import plots, report
from fedspallm_appfl.study.cells import DENSE, FILE, Cell, CellFile, opened
from fedspallm_appfl.study.plan import RUNS, Method, Plan, cells_of
from fedspallm_appfl.tensors.target import Target
from fedspallm_appfl.tensors.targets import Sparsity
from fedspallm_appfl.wire.store import GramStore

Entry = tuple[Method, Target, int]  # method, target, seed
Choice = tuple[str, int]  # targets, seed
OWN = (FILE, "study.md", "study.json", RUNS, *plots.FILES)


def study(plan: Plan, console: Console, overwrite: bool = False) -> None:
    """Measure every cell that is not measured yet, then write tables and plots.

    Args:
        plan: what to measure; without problems.
        console: where progress and the closing table go.
        overwrite: forget what an earlier study in the folder has measured.

    Raises:
        ConfigError: the folder holds something else or a study with other settings, or matplotlib is missing.
        FedSpaLLMError: an experiment fails; the cells that are done are kept.
    """
    plots.require()
    with opened(plan.out, plan.settings(), overwrite) as file:
        if not file.cells:
            _clear(plan.out)
        _measure(plan, file, console)
        asked = [file.cells[method.name, str(target), seed] for method, target, seed in cells_of(plan)]
        _write(plan, file.cells[DENSE, "", 0], asked, console)


def _clear(out: Path) -> None:
    """Remove what an earlier study has left; not the file of cells, which is locked."""
    for name in set(OWN) - {FILE}:
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _measure(plan: Plan, file: CellFile, console: Console) -> None:
    todo = [one for one in cells_of(plan) if (one[0].name, str(one[1]), one[2]) not in file.cells]
    texts = evaluation.held_out(plan.config)
    count = int(settled(plan.config, len(todo)).workers) if todo else 1
    with StudyProgress(console, len(todo)) as progress, Workers(count) as among:
        if (DENSE, "", 0) not in file.cells:
            file.add(Cell(DENSE, "", 0, evaluation.evaluate(plan.config, texts, evaluation.DENSE, ignore)[DENSE]))
        _Bench(plan, file, texts, progress, among).measure(todo)


class _Bench:
    """Measures cells, several at once where there are several processes.

    What waits for another cell begins when that one is done: for sums that it gathers, for targets that it chooses, or as
    it is measured in the run of another method.
    """

    def __init__(
        self, plan: Plan, file: CellFile, texts: Mapping[str, Tensor], progress: StudyProgress, among: Workers
    ) -> None:
        self._plan, self._file, self._texts, self._progress, self._among = plan, file, texts, progress, among
        self._chosen: dict[Choice, Sparsity] = {}
        self._gathered: dict[int, tuple[Path, Cell]] = {}  # seed -> run with its sums, and what gathering them took
        self._running: dict[Future[tuple[list[Cell], Sparsity]], tuple[Entry, float]] = {}

    def measure(self, todo: list[Entry]) -> None:
        """Measure cells, and keep each in the file as it is done."""
        self._forget(())
        while todo or self._running:
            free = len(self._running) < self._among.count
            begin = next((one for one in todo if not self._waits(one)), None) if free else None
            if begin is not None:
                todo.remove(begin)
                self._begin(begin)
                continue
            for done in wait(self._running, return_when=FIRST_COMPLETED).done:
                self._end(done)
            self._forget(todo)

    def _waits(self, entry: Entry) -> bool:
        """Whether a cell that is at work makes what this one needs."""
        method, _, seed = entry
        others = [other for other, _ in self._running.values()]
        return any(
            (self._shares(entry) and self._shares(other) and other[2] == seed and seed not in self._gathered)
            or (self._choice(entry) is not None and self._choice(other) == self._choice(entry) not in self._chosen)
            or (other[1:] == entry[1:] and method in self._plan.companions(other[0]))
            for other in others
        )

    def _begin(self, entry: Entry) -> None:
        method, target, seed = entry
        began = time.monotonic()
        self._progress.begins(_name(entry))
        if (method.name, str(target), seed) in self._file.cells:
            self._progress.ends(_name(entry), "measured in the run of another method", began)
            return
        config = dataclasses.replace(self._plan.experiment(method, target, seed), workers="1")
        chosen = self._chosen.get(choice) if (choice := self._choice(entry)) is not None else None
        sums = self._gathered.get(seed) if self._shares(entry) else None
        companions = self._plan.companions(method)
        future = self._among.submit(self._among.count, _cells, config, method, companions, self._texts, chosen, sums)
        self._running[future] = entry, began

    def _end(self, future: "Future[tuple[list[Cell], Sparsity]]") -> None:
        entry, began = self._running.pop(future)
        method, target, seed = entry
        cells, chosen = result(future, _name(entry))
        for cell in reversed(cells):  # its own last: a study that is cut off here measures it again
            if cell.key not in self._file.cells:
                self._file.add(cell)
        self._progress.ends(_name(entry), f"perplexity {cells[0].mean:.2f}", began)
        if (choice := self._choice(entry)) is not None:
            self._chosen.setdefault(choice, chosen)
        config = self._plan.experiment(method, target, seed)
        if self._shares(entry):
            self._gathered.setdefault(seed, (Path(config.run_dir) / STATISTICS, cells[0]))
        if method.name not in self._plan.keep_models:
            _drop(config, "model", "models")

    def _forget(self, todo: Sequence[Entry]) -> None:
        """Remove sums that no cell needs any more, those of an interrupted study too; they are its largest files."""
        needed = {one[2] for one in (*todo, *(one for one, _ in self._running.values())) if self._shares(one)}
        self._gathered = {seed: of for seed, of in self._gathered.items() if seed in needed}
        kept = {sums for sums, _ in self._gathered.values()}
        if not self._running:
            for folder in set((self._plan.out / RUNS).glob(f"*/{STATISTICS}")) - kept:
                shutil.rmtree(folder)

    def _shares(self, entry: Entry) -> bool:
        """Whether sums serve it, or it gathers them."""
        return entry[0].shares_uploads and not self._plan.experiment(*entry).recovery.rounds

    def _choice(self, entry: Entry) -> Choice | None:
        """What the targets of all matrices depend on, where they are chosen: a choice holds for all methods."""
        config = self._plan.experiment(*entry)
        return (str(config.client_configs.train_configs.sparsity), config.seed) if config.allocates else None


def _name(entry: Entry) -> str:
    method, target, seed = entry
    return f"{method.name}  sparsity {target}  seed {seed}"


def _cells(
    config: Config,
    method: Method,
    companions: Sequence[Method],
    texts: Mapping[str, Tensor],
    chosen: Sparsity | None,
    sums: tuple[Path, Cell] | None,
) -> tuple[list[Cell], Sparsity]:
    """The cell of a method and those that are measured in its run, and the targets of all matrices.

    Args:
        config: its experiment.
        method: the method.
        companions: methods that are measured in its run.
        texts: windows to measure on.
        chosen: targets that another cell has chosen.
        sums: what another cell has gathered, and that cell.
    """
    plugins.load(config.plugins)
    registration.agents()  # not in the seconds and memory of the cell
    if config.allocates:
        config = config.with_sparsity(chosen or allocated(config).client_configs.train_configs.sparsity)
    cells = [_from_sums(config, method, texts, *sums)] if sums else _run(config, method, companions)
    return cells, config.client_configs.train_configs.sparsity


def _drop(config: Config, *names: str) -> None:
    for name in names:
        shutil.rmtree(Path(config.run_dir) / name, ignore_errors=True)


def _run(config: Config, method: Method, companions: Sequence[Method]) -> list[Cell]:
    """Run one experiment: its cell, and those of methods that are measured from its uploads."""
    costs = Costs()
    results, log = experiment.conduct(config, serial.run, True, costs, dense=False)
    up, down = traffic(log)
    client_seconds = sum(event["seconds"] for event in log.uploads)
    zeros, entries = _from_manifests(Path(config.run_dir))
    cell = Cell(
        method.name,
        str(config.client_configs.train_configs.sparsity.default),
        config.seed,
        results.perplexity[config.algorithm],
        zeros,
        entries,
        up,
        down,
        sum(matrix.entries for matrix in results.matrices),
        client_seconds,
        round(_seconds(log) - client_seconds, 4),
        costs.bytes,
        cpu_seconds=costs.cpu_seconds,
    )
    return [cell, *(_beside(cell, one.name, results.perplexity[one.algorithm]) for one in companions)]


def _beside(cell: Cell, method: str, perplexity: Mapping[str, float]) -> Cell:
    """The cell of a method that was measured in the run of another; no model of it is written."""
    return dataclasses.replace(cell, method=method, perplexity=perplexity, zeros=0, entries=0, run_of=cell.method)


def _seconds(log: EventLog) -> float:
    """Wall seconds from when the clients were ready until the model was written and read back."""
    return log.of("written")[0]["time"] - log.of("ready")[0]["time"]


def _from_manifests(run: Path) -> tuple[int, int]:
    """(zeros, entries) of the model of a run, or of all models of its clients."""
    files = [run / "manifest.json"] if (run / "manifest.json").is_file() else sorted(run.glob("models/*/manifest.json"))
    found = [json.loads(file.read_text("utf-8")) for file in files]
    return sum(one["zeros"] for one in found), sum(one["prunable"] for one in found)


def _from_sums(config: Config, method: Method, texts: Mapping[str, Tensor], sums: Path, gathering: Cell) -> Cell:
    """Make a model from stored sums, and check and measure it as a run would."""
    skeleton, sparsity = Skeleton.of(config), config.client_configs.train_configs.sparsity
    with run_dir.claimed(config, overwrite=True) as run:
        costs, started = Costs(), time.monotonic()
        packed = further_models.pruned(config, sparsity, skeleton, GramStore(sums), run / "state")
        experiment.write_pruned(config, skeleton, packed, run)
        seconds = time.monotonic() - started
        costs.read()
        zeros, entries = _from_manifests(run)
        perplexity = evaluation.evaluate(config, texts, {method.algorithm: packed.get}, ignore)[method.algorithm]
        card.write(run, config, {method.algorithm: perplexity})
        _drop(config, "state")
    return dataclasses.replace(
        gathering,
        method=method.name,
        target=str(sparsity.default),
        perplexity=perplexity,
        zeros=zeros,
        entries=entries,
        server_seconds=round(seconds, 4),
        memory_bytes=costs.bytes,
        cpu_seconds=costs.cpu_seconds,
        stored=True,
    )


class Costs:
    """The most memory that the process has had above what it held when this was made, and its processor time since.

    As a listener of events it reads both when the pruned models are written.

    Attributes:
        bytes: resident; None where the system does not say.
        cpu_seconds: of all threads.
    """

    def __init__(self) -> None:
        self.bytes: int | None = None
        self.cpu_seconds = 0.0
        self._start: int | None = None
        gc.collect()
        give_back()
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            self._start = _resident("VmRSS")
        self._began = time.process_time()

    def __call__(self, event: Event) -> None:
        """Take one event."""
        if event["event"] == "written":
            self.read()

    def read(self) -> None:
        """Note both."""
        self.cpu_seconds = round(time.process_time() - self._began, 4)
        self.bytes = None if self._start is None else _resident("VmHWM") - self._start


def _resident(name: str) -> int:
    """Resident memory of this process in bytes: `VmRSS` now, `VmHWM` at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _write(plan: Plan, dense: Cell, cells: list[Cell], console: Console) -> None:
    measured = report.Study(
        dense,
        cells,
        tuple(method.name for method in plan.methods),
        tuple(map(str, plan.targets)),
        plan.seeds,
        plan.config,
        plan.command(),
        {method.name: registry.find(method.algorithm) for method in plan.methods},
    )
    plots.write(measured, plan.out)
    report.write(measured, plan.out)
    console.print(report.table(measured))
    console.print(f"study   {plan.out / 'study.md'}", highlight=False, markup=False)
