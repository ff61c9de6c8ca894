"""Many clients at one server, for `scale`: uploads of a few real clients, sent again under many names.

    python -m benchmarks.replay record MODEL ALGORITHM UPLOADS
    python -m benchmarks.replay play MODEL ALGORITHM UPLOADS CLIENTS FOLDER

`record` runs `DISTINCT` clients and keeps every message as bytes. `play` hands them to a server of any number of clients, a
multiple of these: decoding, checks, screening, folding and finishing are those of a real run, and so are scheduler, log and
report. Whoever may go on sends next, in a random order. Votes and sums are those of the real clients times a power of 4, so
the model has the same bits, whatever the number of clients. The last line is JSON.
"""

import hashlib
import json
import random
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import memory
from benchmarks.federation import configuration
from fedspallm_appfl.adaptors import registration
from fedspallm_appfl.adaptors.aggregator import FedSpaLLMAggregator
from fedspallm_appfl.events import EventLog
from fedspallm_appfl.reports.report import write_report
from fedspallm_appfl.reports.result import Result
from fedspallm_appfl.runs import serial
from fedspallm_appfl.runs.absence import spare
from fedspallm_appfl.settings.schema import Config
from fedspallm_appfl.wire.as_bytes import from_bytes, to_bytes

DISTINCT = 4  # real clients


class Uploads:
    """Messages of real clients in files, one each, and what they said beside them.

    Attributes:
        nbytes: bytes read so far.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.nbytes = 0

    def keep(self, exchange: int, number: int, client: int, update: Any, metadata: dict[str, Any]) -> None:
        """Store a message."""
        file = self._file(exchange, number, client)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(to_bytes(update))
        file.with_suffix(".json").write_text(json.dumps(metadata))

    def get(self, exchange: int, number: int, client: int) -> tuple[Any, dict[str, Any]]:
        """A message as it arrives, for any client."""
        file = self._file(exchange, number, client % DISTINCT)
        data = file.read_bytes()
        self.nbytes += len(data)
        return from_bytes(data, f"client-{client}"), json.loads(file.with_suffix(".json").read_text())

    def _file(self, exchange: int, number: int, client: int) -> Path:
        return self._folder / f"{exchange}-{number}-{client}.bin"


def configured(model: Path, algorithm: str, clients: int, folder: Path) -> Config:
    """An experiment with so many clients."""
    folder.mkdir(parents=True, exist_ok=True)
    return configuration(model, clients, 1, folder, algorithm=algorithm, gram={"min_tokens": 1})


def record(model: Path, algorithm: str, uploads: Path) -> dict[str, Any]:
    """Run the real clients and keep what they send."""
    config, kept = configured(model, algorithm, DISTINCT, uploads), Uploads(uploads)
    registration.register()
    receive = FedSpaLLMAggregator.receive

    def keeping(self: FedSpaLLMAggregator, client: str, update: Any, metadata: dict[str, Any]) -> bool:
        number, exchange = int(client.removeprefix("client-")), self.global_model.round.exchange
        kept.keep(exchange, metadata["_chunk_idx"], number, update, metadata)
        return receive(self, client, update, metadata)

    with mock.patch.object(FedSpaLLMAggregator, "receive", keeping):
        aggregator = serial.run(config, uploads / "state", lambda event: None)
    return {"digest": digest(aggregator)}


def play(model: Path, algorithm: str, uploads: Path, clients: int, folder: Path) -> dict[str, Any]:
    """Serve many clients and measure from the first upload to the finished model, and the report apart."""
    config, sent = configured(model, algorithm, clients, folder), Uploads(uploads)
    server = registration.agents().server_agent(config, folder / "state")
    log = EventLog(folder / "metrics.jsonl")
    server.aggregator.on_event = log
    spare(server, config)
    memory.reset_peak()
    wall, cpu, before = time.perf_counter(), time.process_time(), memory.resident()
    messages = sum(
        _exchange(server, sent, exchange, clients) for exchange in range(len(server.aggregator.global_model.exchanges))
    )
    found = {
        "seconds": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "peak": memory.peak() - before,
        "left": memory.resident() - before,
        "messages": messages,
        "bytes": sent.nbytes,
        "digest": digest(server.aggregator),
    }
    cpu = time.process_time()
    write_report(folder / "report.md", config, Result({}, [], 1, 1, folder / "model"), log)
    return found | {"report": time.process_time() - cpu}


def _exchange(server: Any, sent: Uploads, exchange: int, clients: int) -> int:
    """All messages of an exchange; returns their number."""
    ready, order, messages = [(client, 0) for client in range(clients)], random.Random(exchange), 0
    while ready:
        chosen = order.randrange(len(ready))
        ready[chosen], ready[-1] = ready[-1], ready[chosen]
        client, number = ready.pop()
        update, metadata = sent.get(exchange, number, client)
        future = server.global_update(f"client-{client}", update, blocking=False, **metadata)
        messages += 1
        if number + 1 < metadata["_total_chunks"]:
            future.add_done_callback(lambda _, to=(client, number + 1): ready.append(to))
    return messages


def digest(aggregator: FedSpaLLMAggregator) -> str:
    """Of all bits of the global model."""
    found, done = hashlib.sha256(), aggregator.global_model.done
    for block in done.blocks():
        for name, packed in sorted((done.get(block) or {}).items()):
            found.update(name.encode())
            for part in (packed.bits, packed.values):
                assert part is not None, "a global model has weights"
                found.update(part.view(torch.uint8).numpy().data)
    return found.hexdigest()


def main() -> None:
    what, model, algorithm, uploads, *more = sys.argv[1:]
    torch.set_num_threads(1)
    if what == "record":
        made = record(Path(model), algorithm, Path(uploads))
    else:
        made = play(Path(model), algorithm, Path(uploads), int(more[0]), Path(more[1]))
    print(json.dumps(made))


if __name__ == "__main__":
    main()
