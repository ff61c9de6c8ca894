"""What `fedspallm estimate` prints: bytes, transports, disk and memory, for people.

For a configuration that is meant for Globus Compute it speaks of tasks, data store and workers instead of transports.
"""

from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Column
from rich.text import Text

from fedspallm_appfl.aggregation.layer_sampling import to_text
from fedspallm_appfl.algorithms.algorithm import CONFIRM, KEYS, OPENING, SHARES, SQUARES, of_round
from fedspallm_appfl.devices import proc_bytes
from fedspallm_appfl.errors import ConfigError
from fedspallm_appfl.estimates import memory, over_globus, traffic
from fedspallm_appfl.estimates.duration import SPREAD, Durations, durations
from fedspallm_appfl.estimates.job import Job
from fedspallm_appfl.estimates.memory import Memory, Parts
from fedspallm_appfl.estimates.over_globus import INLINE_LIMIT, Worker
from fedspallm_appfl.estimates.processes import settled
from fedspallm_appfl.estimates.traffic import RoundTraffic
from fedspallm_appfl.globus.store.data_store import place
from fedspallm_appfl.reports.parts import bytes_text
from fedspallm_appfl.reports.progress import duration
from fedspallm_appfl.reports.result import count
from fedspallm_appfl.reports.terminal import ConsoleTable
from fedspallm_appfl.rounds.participants import own_windows
from fedspallm_appfl.validation.words import headline, left_out

WORDS = {
    "weights": "pruned weights",
    "masks": "masks",
    "values": "values",
    "grams": "Gram matrices",
    KEYS: "keys of secure sums",
    SHARES: "shares of their secrets",
    SQUARES: "sums of squares",
    CONFIRM: "who is in the sums",
    OPENING: "shares that open sums",
}


def tables(job: Job) -> Group:
    """Everything that can be said before a run.

    Raises:
        ConfigError: a message cannot be carried over Globus Compute.
    """
    windows = traffic.evaluation_windows(job)
    return Group(
        Text("\n".join([*_who_prunes_what(job), *_what_travels(job), *_time(job, durations(job))])),
        _traffic(job),
        _globus(job) if job.config.over_globus() else _transports(job),
        _disk(job),
        *_memory(job, windows),
    )


def _who_prunes_what(job: Job) -> Iterator[str]:
    yield f"{headline(job.config)}, {len(job.model.blocks)} blocks"
    yield from list(left_out(job.config, list(job.model.layout.pruned))) or ["every block is pruned by some client"]


def _what_travels(job: Job) -> Iterator[str]:
    """The exchanges of a round, and what about them had to be assumed."""
    own, recovery = of_round(job.exchanges, last=False), job.config.recovery
    if not recovery.model:
        yield f"each round: {_exchanges([(one.up, None if one.hidden else one.down) for one in own], job)}"
    if recovery.rounds:
        times = count(recovery.rounds, "round")
        what = "factors of changes" if recovery.rank else "changes of kept weights"
        yield f"then {times} of recovery: {what} up, weights down; nothing down after the last"
    try:
        made = traffic.messages(job)
        yield f"a client sends {made.count} messages a round, the largest of {bytes_text(made.largest)}"
    except ConfigError:
        pass  # the table of transports says so
    if own_windows(job.config):
        yield (
            "after the last round each client measures the model on its own text: at most "
            f"{bytes_text(traffic.final(job))} down to each"
        )
    if job.algorithm.gathers:
        inputs = "; ".join(", ".join(names) for names in job.model.groups[min(job.model.layout.pruned)])
        yield f"linears that share an input: {inputs}"
    if job.model.assumed:
        dtype = str(job.model.stored).removeprefix("torch.")
        yield f"there are no weights in {job.model.folder}: taken to be {dtype}, as config.json says"


def _time(job: Job, found: Durations) -> Iterator[str]:
    """How long it takes here, with the spread of that."""
    least, most = min(found.clients.values()), max(found.clients.values())
    each = duration(most) if duration(least) == duration(most) else f"{duration(least)} to {duration(most)}"
    together = f", {duration(sum(found.clients.values()))} for all" if len(found.clients) > 1 else ""
    server = f", {duration(found.server)} for the server" if found.server else ""
    server += f", {duration(found.allocation)} before that to choose targets" if found.allocation else ""
    spread = f"runs took {1 / SPREAD:g} to {SPREAD:g} times that"
    yield f"rounds on this CPU: {each} a client{together}{server}; {spread}"


def _exchanges(kinds: Sequence[tuple[str, str | None]], job: Job) -> str:
    """What goes up and down in the exchanges of a round; what is answered in no round is left out."""
    distinct = list(kinds if job.config.server_configs.secure_sums else dict.fromkeys(kinds))  # a sweep repeats itself
    repeated = len(kinds) > len(distinct)
    never = job.rounds == 1 and not repeated and not job.config.recovery.rounds
    last = distinct[-1]
    ways = [
        f"{WORDS[up]} up" + (f", {WORDS[down]} down" if down and not (never and (up, down) == last) else "")
        for up, down in distinct
    ]
    at_last = (
        "; nothing down after the last upload of all"
        if last[1] and not never and not job.config.recovery.rounds
        else ""
    )
    return (f"{len(kinds)} times " if repeated else "") + "; ".join(ways) + at_last


def _traffic(job: Job) -> ConsoleTable:
    """Bytes a round; rounds with the same numbers share a line."""
    compressed = job.config.client_configs.comm_configs.compression == "zstd"
    most = " at most" if compressed else ""
    up = [Column(f"up, a client{most}", justify="right")]
    up += [Column("about, compressed", justify="right")] * compressed
    rest = [Column(name, justify="right") for name in ("dense float16", "up, all", f"down, a client{most}")]
    table = ConsoleTable(
        "round", Column("blocks", justify="right"), *up, *rest, title="Bytes that travel", title_justify="left"
    )
    rows: dict[tuple[str, ...], list[int]] = {}
    made = (over_globus if job.config.over_globus() else traffic).traffic(job)
    for number, one in enumerate(made, 1):
        rows.setdefault(_row(one, compressed), []).append(number)
    for row, numbers in rows.items():
        table.add_row(to_text(numbers), *row)
    return table


def _row(made: RoundTraffic, compressed: bool) -> tuple[str, ...]:
    return (
        str(made.blocks),
        _range(made.up),
        *[_range(made.zstd)] * compressed,
        _range(made.dense),
        bytes_text(sum(made.up.values())),
        bytes_text(made.down),
    )


def _range(of_clients: Mapping[str, int]) -> str:
    least, most = bytes_text(min(of_clients.values())), bytes_text(max(of_clients.values()))
    return least if least == most else f"{least} to {most}"


def _transports(job: Job) -> ConsoleTable:
    table = ConsoleTable("transport", "carries it", "what to know", title="Transports", title_justify="left")
    for transport in (*traffic.transports(job), over_globus.transport(job)):
        table.add_row(transport.name, "yes" if transport.carries else "no", escape(transport.why))
    return table


def _globus(job: Job) -> ConsoleTable:
    """Tasks, submissions, and where the bytes lie."""
    tasks, store = over_globus.tasks(job), job.config.client_configs.comm_configs.store
    table = ConsoleTable("", "", show_header=False, title="Over Globus Compute", title_justify="left")
    measuring = f", after them {tasks.exchange} more measure the model" if own_windows(job.config) else ""
    table.add_row("tasks", f"{_tasks(tasks)}; before them {tasks.exchange} more ask the sites{measuring}")
    table.add_row("submissions", _submissions(tasks))
    table.add_row("a task or its result", f"up to {bytes_text(tasks.largest)}{_fits(tasks.largest, store.connector)}")
    if store.connector != "none":
        stored, about = (max(turn.stored for turn in over_globus.turns(job, small)) for small in (False, True))
        compressed = job.config.client_configs.comm_configs.compression == "zstd"
        less = f", about {bytes_text(about)} compressed" if compressed else ""
        table.add_row("data store", escape(f"holds at most {bytes_text(stored)}{less}, in {place(vars(store))}"))
    return table


def _tasks(tasks: over_globus.Tasks) -> str:
    of_round = f"{tasks.round} a round, " if tasks.round < tasks.all else ""
    return f"{of_round}{tasks.all} in all, one for each client and exchange"


def _submissions(tasks: over_globus.Tasks) -> str:
    least, most = tasks.delay
    if not most:
        return f"one a task; the {tasks.exchange} of an exchange leave at once"
    return (
        f"one a task; {over_globus.AT_ONCE} leave at once, each later one 4 to 5 s after the one before, so the last "
        f"of {tasks.exchange} after {least} to {most} s"
    )


def _fits(largest: int, connector: str) -> str:
    if connector != "none":
        return " of tensors, in the data store"
    if largest <= INLINE_LIMIT:
        return f" of tensors; {bytes_text(INLINE_LIMIT)} fit"
    return f" of tensors, but {bytes_text(INLINE_LIMIT)} fit; set client_configs.comm_configs.store.connector"


def _disk(job: Job) -> ConsoleTable:
    table = ConsoleTable("written", Column("bytes", justify="right"), "kept", title="Disk", title_justify="left")
    for one in traffic.disk(job):
        table.add_row(one.what, bytes_text(one.nbytes), "yes" if one.stays else "while it runs")
    return table


def _memory(job: Job, windows: Mapping[str, int] | None) -> Iterator[RenderableType]:
    globus = job.config.over_globus()
    columns = [Column(name, justify="right") for name in ("needs", "resident", *["on the GPU"] * globus)]
    table = ConsoleTable(
        "process",
        *columns,
        Column("largest part"),
        Column("lower it with"),
        title="Memory, at most",
        title_justify="left",
    )
    for name, needs, gpu in _processes(job, windows):
        part, size = max((gpu or needs.parts).items(), key=lambda item: item[1])
        numbers = bytes_text(needs.needed), bytes_text(needs.resident)
        on_gpu = [bytes_text(sum(gpu.values())) if gpu else "-"] * globus
        table.add_row(escape(name), *numbers, *on_gpu, f"{part}, {bytes_text(size)}", lower(job, part))
    yield table
    here = proc_bytes("self/status", "VmRSS")
    if here:
        fixed = bytes_text(here + memory.APPFL)
        yield Text(f"add Python and its packages to each process: {fixed}, this one and what APPFL adds")
    yield Text("resident: with the files that it reads, which the system takes back when it wants their memory")
    count = 1 if globus else int(settled(job.config, job=job).workers)
    if count > 1:
        together = bytes_text(memory.workers_memory(job, count))
        asked = f"workers: {job.config.workers}"
        yield Text(
            f"fedspallm run starts {count} worker processes here ({asked}); with the server they need {together}"
        )
    if job.config.evaluation.texts and windows is None:
        yield Text("without the evaluation: evaluation.texts cannot be read here; set evaluation.windows")
    gpus = any(place != "cpu" for client in job.config.clients for place in client.train_configs.places)
    if globus and gpus:
        yield Text("on a GPU: computed from what was measured on CPUs; CUDA's own memory comes on top")
    elif gpus:
        yield Text("on a GPU, what a client needs lies there; measured on CPUs only")
    several = {
        one.client_id: (sum(memory.on_first_gpu(memory.client_memory(job, one)).values()), sum(further.values()))
        for one in job.config.clients
        if len(set(one.train_configs.devices)) > 1
        for further in [memory.further_device(job, one)]
    }
    for clients, (first, further) in _alike(several):
        of = f" of {clients}" if clients else ""
        yield Text(f"first GPU{of}: {bytes_text(first)}; each further one: {bytes_text(further)}")


NO_SETTING = "no setting"
LOWER = {  # largest part of a process -> the setting that makes it smaller
    "outer parts": NO_SETTING,
    "activations": "data.activations: file",
    "one block": NO_SETTING,
    "inputs of experts": "data.activations: file",
    "further devices": "train_configs.devices",
    "forward passes": "data.batch",
    "pruned model": "recovery.scope: blockwise",
    "kept weights": "recovery.scope: blockwise",
    "dense model's states": "data.activations: file",
    "pruning a block": "train_configs.pruner: wanda",
    "Gram matrices": NO_SETTING,
    "packed statistics": "gram.precision: int8",
    "earlier blocks of a message": "comm_configs.blocks_per_message",
    "a client at work": "data.batch, or MPI",
    "open blocks": "comm_configs.blocks_per_message",
    "other open blocks": "scheduler_kwargs.max_open_blocks",
    "block to close": NO_SETTING,
    "uploads": "comm_configs.max_message_bytes",
    "message on its way": "comm_configs.max_message_bytes",
    "what came down": "comm_configs.max_message_bytes",
    "what goes down": NO_SETTING,
    "result of a task": "comm_configs.store",
    "results that wait": "comm_configs.store",
    "hidden states of all blocks": "allocation.windows",
    "gradients": "allocation.batch",
    "windows of all texts": "evaluation.windows",
    "a block, or logits": "evaluation.batch",
    "heap": NO_SETTING,
}


def lower(job: Job, part: str) -> str:
    """The setting that makes a part smaller, unless it is set already, by all clients if it is theirs."""
    key, _, value = LOWER[part].partition(": ")
    group = key.partition(".")[0]
    owners = [one for one in (job.config, *job.config.clients) if hasattr(one, group)]
    return NO_SETTING if value and all(str(attrgetter(key)(one)) == value for one in owners) else LOWER[part]


Process = tuple[str, Memory, Parts | None]  # name, main memory, what lies on its GPU


def _processes(job: Job, windows: Mapping[str, int] | None) -> Iterator[Process]:
    """Each process with its memory; clients with the same numbers share a line."""
    if job.config.over_globus():
        yield from _workers(job)
        yield "server", over_globus.receiving_memory(job), None
    else:
        yield "serial, all in one", memory.serial_memory(job), None
        if not job.algorithm.pools_text:
            yield from _ranks(job)
    if job.config.allocates:
        yield "allocation, at the server", memory.allocation_memory(job), None
    if windows:
        yield "evaluation", memory.evaluation_memory(job, windows), None


def _ranks(job: Job) -> Iterator[Process]:
    of_client = {client.client_id: memory.rank_memory(job, client) for client in job.config.clients}
    for clients, needs in _alike(of_client):
        yield f"MPI, {clients or 'each client'}", needs, None
    yield "MPI, server", memory.server_memory(job), None


def _workers(job: Job) -> Iterator[Process]:
    """The worker at each site, with and without a GPU where the configuration leaves it open."""
    workers = {
        client.client_id: (train.places[0], over_globus.worker_memory(job, client))
        for client in job.config.clients
        for train in [client.train_configs]
    }
    for clients, (device, worker) in _alike(workers):
        yield from _worker(f"worker of {clients}" if clients else "each worker", device, worker)


def _worker(name: str, device: str, worker: Worker) -> Iterator[Process]:
    if device in ("auto", "cpu"):
        yield f"{name}, CPU", worker.on_cpu, None
    if device != "cpu":
        yield f"{name}, GPU", worker.on_gpu, worker.gpu


def _alike(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Clients of one value together, and the value; no names where it is that of all."""
    names: dict[str, list[str]] = {}
    for name, value in values.items():
        names.setdefault(str(value), []).append(name)
    for together in names.values():
        yield ("" if len(names) == 1 else ", ".join(together)), values[together[0]]
