"""What a run over Globus Compute will send and take at the sites.

A task makes the messages of one exchange. It is told of all that went down so far (`globus.server.run.Downlink`), and loads
what its worker has not kept, which is everything except in a sweep. Its messages wait in the data store, or in its result,
until the server folds them. Bytes are those of tensors; the text around them is less than a kilobyte a matrix, and some
kilobytes a task.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from fedspallm_appfl.algorithms.algorithm import Exchange
from fedspallm_appfl.errors import ConfigError, FedSpaLLMError
from fedspallm_appfl.estimates import traffic as messages
from fedspallm_appfl.estimates.job import Job, mask_only
from fedspallm_appfl.estimates.memory import (
    ON_GPU,
    Memory,
    Parts,
    client_memory,
    on_first_gpu,
    server_memory,
    with_heap,
    worst,
)
from fedspallm_appfl.estimates.traffic import RoundTraffic, Transport, exchange_share, zstd_share
from fedspallm_appfl.settings.schema import Client, Config
from fedspallm_appfl.wire.messages import plan

INLINE_LIMIT = 7_000_000  # bytes of tensors in a task or a result: 10 MB by the service, less what base64 adds
AT_ONCE = 4  # submissions that the SDK sends without a pause
PAUSE = (4, 5)  # seconds before each later one, measured
BASE64 = 4 / 3  # bytes of text a byte that travels inside a task or a result
SENDING = 2  # copies of a message while it is placed: as it was made and compressed, or that and as bytes
READING = 3  # copies of a message while it is read: bytes, tensors, and what they inflate to
RESULT = 3  # copies of a whole result: its messages as text, the text that is measured, and the one that is sent

Share = Callable[[Exchange, bool], float]  # (exchange, whether masks alone go up) -> what its bytes shrink to
Payload = dict[tuple[str | None, int, str], float]  # (what goes down, block, linear) -> bytes


@dataclass(frozen=True)
class Turn:
    """One exchange over Globus Compute: a task for each client.

    Attributes:
        round: the round, from 0.
        down: bytes that each task is told of.
        loaded: those of them that a worker loads which has had the tasks before.
        up: client -> bytes that its task sends.
        made: bytes that go down after it, to be loaded by the tasks to come.
        stored: the most bytes that lie in the data store meanwhile; uploads of clients that are late count.
    """

    round: int
    down: int
    loaded: int
    up: Mapping[str, int]
    made: int
    stored: int


def turns(job: Job, compressed: bool = False) -> list[Turn]:
    """All exchanges of a run; `compressed` gives about what compression leaves, instead of what it starts from."""
    made, rounds = job.exchanges, job.draws
    up_share, down_share = (_up_share(job), _down_share(job)) if compressed else (_whole, _whole)
    uploads = [_uploads(job, exchange, up_share) for exchange in made]
    placed: list[Payload] = []  # what each payload that lies there holds
    fresh: list[Payload] = []  # of the last exchange
    waiting: dict[str, float] = {}  # the most that a client has sent so far; where it is late, that may still lie there
    found = []
    for number in range(len(rounds)):
        for index, exchange in enumerate(job.of_round(number)):
            assigned = job.assigned(number, exchange)
            changed = sorted({block for mine in assigned.values() for block in mine})
            up = {client: sum(uploads[index][client][block] for block in mine) for client, mine in assigned.items()}
            waiting = {client: max(size, waiting.get(client, 0)) for client, size in up.items()}
            ended = (number + 1, index + 1) == (len(rounds), len(made))
            down, new = _bytes(placed), _bytes(fresh)
            fresh = [] if ended else _payloads(job, index, changed, down_share(exchange, False))
            more, sent = _bytes(fresh), {client: round(size) for client, size in up.items()}
            stored, loaded = down + max(sum(waiting.values()), more), new if exchange.only and index else down
            found.append(Turn(number, round(down), round(loaded), sent, round(more), round(stored)))
            newer = set().union(*fresh)
            placed = [payload for payload in placed if payload.keys() - newer] + fresh
    return found


def _bytes(payloads: list[Payload]) -> float:
    return sum(sum(payload.values()) for payload in payloads)


def _whole(exchange: Exchange, masks: bool) -> float:
    return 1.0


def _up_share(job: Job) -> Share:
    return lambda exchange, masks: exchange_share(job, exchange, masks)


def _down_share(job: Job) -> Share:
    return lambda exchange, _: zstd_share(job.sparsity.default, job.model.stored, exchange.down or "weights")


def _uploads(job: Job, exchange: Exchange, share: Share) -> dict[str, dict[int, float]]:
    """Client -> block -> bytes that go up."""
    tables = {}
    for masks in (False, True):
        sizes = job.up(exchange, masks)
        tables[masks] = {
            block: share(exchange, masks) * sum(sizes.get(block, {}).values()) for block in job.model.shapes
        }
    return {client.client_id: tables[mask_only(client)] for client in job.config.clients}


def _payloads(job: Job, index: int, changed: list[int], share: float) -> list[Payload]:
    """The payloads in which an exchange goes down, as `GlobalModel.changes` cuts them."""
    table = job.down(job.exchanges[index])
    sizes = {block: table[block] for block in changed if block in table}
    parts = plan(sizes, max(1, len(sizes)), job.config.client_configs.comm_configs.max_message_bytes)
    return [
        {(job.exchanges[index].down, block, name): share * sizes[block][name] for block, name in part} for part in parts
    ]


def _inline(job: Job) -> bool:
    """Whether everything travels with the tasks."""
    return job.config.client_configs.comm_configs.store.connector == "none"


def traffic(job: Job) -> list[RoundTraffic]:
    """What travels in each round; down goes what all tasks of a client load."""
    down = [0] * job.rounds
    for turn in turns(job):
        down[turn.round] += turn.down if _inline(job) else turn.loaded
    return [dataclasses.replace(one, down=size) for one, size in zip(messages.traffic(job), down, strict=True)]


@dataclass(frozen=True)
class Tasks:
    """How many tasks a run is, each a submission of its own.

    Attributes:
        exchange: in an exchange, one for each client.
        round: in a round.
        all: in all rounds; asking the sites before takes one more for each client.
        delay: seconds, at least and at most, from the first submission of an exchange to the last.
        up: bytes of tensors that a result holds, or tells of, at most.
        down: bytes of tensors that a task holds, or tells of, at most.
    """

    exchange: int
    round: int
    all: int
    delay: tuple[int, int]
    up: int
    down: int

    @property
    def largest(self) -> int:
        """Bytes of tensors that a task or its result holds at most."""
        return max(self.up, self.down)


def tasks(job: Job) -> Tasks:
    """The tasks of a run, if no client is left out of a round."""
    clients, made = len(job.config.clients), turns(job)
    late = max(0, clients - AT_ONCE)
    delay = PAUSE[0] * late, PAUSE[1] * late
    up, down = max(max(turn.up.values()) for turn in made), max(turn.down for turn in made)
    return Tasks(clients, clients * len(made) // job.rounds, clients * len(made), delay, up, down)


def check_sizes(config: Config) -> Iterator[str]:
    """Whether what travels fits into tasks and results where no data store is configured."""
    if config.client_configs.comm_configs.store.connector != "none":
        return
    try:
        made = tasks(Job.of(config))
    except (FedSpaLLMError, ValueError):  # `check_with_files` says so
        return
    for what, size in (("what a client sends in an exchange", made.up), ("what is sent to a client", made.down)):
        if size > INLINE_LIMIT:
            yield (
                f"client_configs.comm_configs.store: {what} may take {size / 1e6:.1f} MB before compression, "
                f"{INLINE_LIMIT / 1e6:.0f} MB fit into a task of Globus Compute; set another connector"
            )


def transport(job: Job) -> Transport:
    """Whether tasks and results can carry the messages, with the setting to change when not."""
    name, store = "Globus Compute", job.config.client_configs.comm_configs.store.connector
    if job.algorithm.pools_text:
        return Transport(name, False, f"{job.algorithm.name} pools the text of all clients in one process")
    try:
        largest = tasks(job).largest
    except ConfigError as error:
        return Transport(name, False, str(error))
    holds, limit = f"a task or its result holds up to {largest / 1e6:.1f} MB", f"{INLINE_LIMIT / 1e6:.1f} MB"
    if not _inline(job):
        return Transport(name, True, f"{holds}, in the data store {store}")
    if largest <= INLINE_LIMIT:
        return Transport(name, True, f"{holds} of {limit}")
    return Transport(name, False, f"{holds}, {limit} fit; set comm_configs.store.connector")


@dataclass(frozen=True)
class Worker:
    """Memory of the process that runs the tasks of one client at its site.

    Attributes:
        on_cpu: where `device` is a CPU.
        on_gpu: main memory where it is a GPU.
        gpu: bytes on that GPU; of several, on the first.
    """

    on_cpu: Memory
    on_gpu: Memory
    gpu: Parts


def worker_memory(job: Job, client: Client) -> Worker:
    """Memory of the worker of a client; that on a GPU is computed as on a CPU, and was not measured.

    Amid a sweep it keeps the hidden states of all clients of its endpoint, whatever it does.
    """
    alone, kept = _at_site(job, client), _kept_in_sweep(job, client)
    alone = dataclasses.replace(alone, parts={**alone.parts, **kept})
    largest, down, up = messages.messages(job).largest, _largest_payload(job), 0
    if _inline(job):
        up = max(turn.up[client.client_id] for turn in turns(job))
    collected = {"result of a task": round(BASE64 * up)}
    sending = {"message on its way": SENDING * largest, "earlier blocks of a message": 0} | collected
    loading = {"what came down": READING * down}
    ending = {"result of a task": round(RESULT * BASE64 * up)}
    device = on_first_gpu(alone)
    resting = {part: size for part, size in device.items() if part in ("outer parts", "activations")}
    working = {part: size for part, size in alone.parts.items() if part != "heap"}
    outer = {"outer parts": device["outer parts"]} | kept
    others = {part: size for part, size in working.items() if part not in ON_GPU}
    on_cpu = worst([working | collected, resting | sending, outer | loading, outer | ending])
    on_gpu = worst([others | sending, loading, ending])
    return Worker(with_heap(on_cpu, alone.mapped), with_heap(on_gpu, alone.mapped), device)


def _at_site(job: Job, client: Client) -> Memory:
    data = dataclasses.replace(client.data, text=client.data.text or "of the site")  # some pruners do without, or not
    return client_memory(job, dataclasses.replace(client, data=data))


def _kept_in_sweep(job: Job, client: Client) -> Parts:
    """Hidden states, and token ids, of all clients whose tasks the worker of a client runs; nothing without a sweep."""
    if not any(exchange.only for exchange in job.exchanges):
        return {}
    endpoint = str(client.endpoint_id).lower()
    beside = [one for one in job.config.clients if one.client_id != client.client_id]
    sharing = [one for one in beside if one.endpoint_id and one.endpoint_id.lower() == endpoint]
    return {"activations": sum(_at_site(job, one).parts["activations"] for one in (client, *sharing))}


def _largest_payload(job: Job) -> int:
    """The most bytes that go down in one piece."""
    answered, most = len(job.exchanges) - (job.rounds == 1), 0
    for index in range(answered):
        for payload in _payloads(job, index, list(job.model.shapes), 1.0):
            most = max(most, round(sum(payload.values())))
    return most


def receiving_memory(job: Job) -> Memory:
    """Memory of the server: it reads messages as bytes, has results wait, and places what goes down all together."""
    alone = server_memory(job, together=READING)
    serving = {part: size for part, size in alone.parts.items() if part != "heap"}
    made, waiting, told, asking = turns(job), 0, 0, 0
    if _inline(job):
        waiting = round(BASE64 * max(sum(turn.up.values()) for turn in made))
        told = round(BASE64 * max(turn.down for turn in made))
        asking = told * len(job.config.clients)
    placing = {"what goes down": SENDING * _largest_payload(job) + told + asking}
    return with_heap(worst([serving | {"results that wait": waiting}, placing]), alone.mapped)
