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
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from torch import Tensor

from fedspallm_appfl.adaptors import registration
from fedspallm_appfl.algorithms import registry
from fedspallm_appfl.allocation.choice import allocated
from fedspallm_appfl.devices import give_back, proc_bytes
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
from fedspallm_appfl.study import page, plots, report
from fedspallm_appfl.study.cells import DENSE, FILE, Cell, CellFile, Key, opened
from fedspallm_appfl.study.plan import RUNS, Method, Plan, cells_of
from fedspallm_appfl.tensors.targets import Sparsity
from fedspallm_appfl.wire.store import GramStore

Choice = tuple[str, int]  # targets, seed
OWN = (FILE, "study.md", "study.json", page.FILE, RUNS, *plots.FILES)


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


@dataclass(frozen=True, eq=False)
class _Entry:
    """A cell to be measured.

    Attributes:
        method: the method.
        config: its experiment, in one process.
        key: of the cell.
        companions: methods that are measured in its run.
    """

    method: Method
    config: Config
    key: Key
    companions: Sequence[Method]

    @property
    def name(self) -> str:
        """What progress calls it."""
        return "{}  sparsity {}  seed {}".format(*self.key)

    @property
    def seed(self) -> int:
        """Of its windows."""
        return self.config.seed

    @property
    def shares(self) -> bool:
        """Whether sums serve it, or it gathers them."""
        return self.method.shares_uploads and not self.config.recovery.rounds

    @property
    def choice(self) -> Choice | None:
        """What the targets of all matrices depend on, where they are chosen: a choice holds for all methods."""
        sparsity = self.config.client_configs.train_configs.sparsity
        return (str(sparsity), self.seed) if self.config.allocates else None


def _measure(plan: Plan, file: CellFile, console: Console) -> None:
    todo = [
        _Entry(
            method,
            dataclasses.replace(plan.experiment(method, target, seed), workers="1"),
            key,
            plan.companions(method),
        )
        for method, target, seed in cells_of(plan)
        if (key := (method.name, str(target), seed)) not in file.cells
    ]
    texts = evaluation.held_out(plan.config)
    count = int(settled(plan.config, len(todo)).workers) if todo else 1
    if count > 1:
        _trained_first(todo)
    with StudyProgress(console, len(todo)) as progress, Workers(count) as among:
        if (DENSE, "", 0) not in file.cells:
            row = evaluation.evaluate(plan.config, texts, evaluation.DENSE, ignore, among=among)[DENSE]
            file.add(Cell(DENSE, "", 0, row))
        _Bench(plan, file, texts, progress, among).measure(todo)


def _trained_first(todo: list[_Entry]) -> None:
    """Seed by seed, begin with what trains: it takes longest, and is not left alone at the end."""
    seeds = list(dict.fromkeys(entry.seed for entry in todo))
    todo.sort(key=lambda entry: (seeds.index(entry.seed), not entry.config.recovery.rounds))


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
        self._running: dict[Future[tuple[list[Cell], Sparsity]], tuple[_Entry, float]] = {}

    def measure(self, todo: list[_Entry]) -> None:
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

    def _waits(self, entry: _Entry) -> bool:
        """Whether a cell that is at work makes what this one needs."""
        gathering = entry.shares and entry.seed not in self._gathered
        choosing = entry.choice is not None and entry.choice not in self._chosen
        return any(
            (gathering and other.shares and other.seed == entry.seed)
            or (choosing and other.choice == entry.choice)
            or (other.key[1:] == entry.key[1:] and entry.method in other.companions)
            for other in self._at_work
        )

    def _begin(self, entry: _Entry) -> None:
        began = time.monotonic()
        self._progress.begins(entry.name)
        if entry.key in self._file.cells:
            self._progress.ends(entry.name, "measured in the run of another method", began)
            return
        chosen = self._chosen.get(entry.choice) if entry.choice else None
        sums = self._gathered.get(entry.seed) if entry.shares else None
        given = entry.config, entry.method, entry.companions, self._texts, chosen, sums
        self._running[self._among.submit(self._among.count, _cells, *given)] = entry, began

    def _end(self, future: "Future[tuple[list[Cell], Sparsity]]") -> None:
        entry, began = self._running.pop(future)
        cells, chosen = result(future, entry.name)
        for cell in reversed(cells):  # its own last: a study that is cut off here measures it again
            if cell.key not in self._file.cells:
                self._file.add(cell)
        self._progress.ends(entry.name, f"perplexity {cells[0].mean:.2f}", began)
        if entry.choice:
            self._chosen.setdefault(entry.choice, chosen)
        if entry.shares:
            self._gathered.setdefault(entry.seed, (Path(entry.config.run_dir) / STATISTICS, cells[0]))
        if entry.method.name not in self._plan.keep_models:
            _drop(entry.config, "model", "models")

    def _forget(self, todo: Sequence[_Entry]) -> None:
        """Remove sums that no cell needs any more, those of an interrupted study too; they are its largest files."""
        needed = {one.seed for one in (*todo, *self._at_work) if one.shares}
        self._gathered = {seed: of for seed, of in self._gathered.items() if seed in needed}
        kept = {sums for sums, _ in self._gathered.values()}
        if not self._running:
            for folder in set((self._plan.out / RUNS).glob(f"*/{STATISTICS}")) - kept:
                shutil.rmtree(folder)

    @property
    def _at_work(self) -> list[_Entry]:
        return [entry for entry, _ in self._running.values()]


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
            self._start = proc_bytes("self/status", "VmRSS")
        self._began = time.process_time()

    def __call__(self, event: Event) -> None:
        """Take one event."""
        if event["event"] == "written":
            self.read()

    def read(self) -> None:
        """Note both."""
        self.cpu_seconds = round(time.process_time() - self._began, 4)
        peak = proc_bytes("self/status", "VmHWM")
        self.bytes = None if self._start is None or peak is None else peak - self._start


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
    page.write(measured, plan.out)
    report.write(measured, plan.out)
    console.print(report.table(measured))
    for name in (page.FILE, "study.md"):
        console.print(f"study   {plan.out / name}", highlight=False, markup=False)
