"""How far one server reaches: `python -m benchmarks.reach` prints the tables of docs/scale.md.

Bytes and memory are those of `fedspallm estimate` for models of which only the shapes are known. Hours follow of them and
of two rates: what one core folds, measured by `python -m benchmarks scale`, and what a link carries.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from transformers import LlamaConfig

from benchmarks.tables import Table
from fedspallm_appfl.estimates.job import Job, Outline, open_outline
from fedspallm_appfl.estimates.memory import server_memory
from fedspallm_appfl.estimates.traffic import final, traffic
from fedspallm_appfl.settings.schema import Client, Config, Model

FOLDED = {"fedspallm": 0.25, "consensus": 0.20, "gram": 0.35}  # GB/s of uploads on one core, measured
LINKS = {"10 Gbit/s": 1.25, "100 Gbit/s": 12.5}  # GB/s
CLIENTS = (16, 256, 4096)
SHAPES = {  # blocks, width, width of the MLP, heads, heads of keys and values, vocabulary
    "7B": (32, 4096, 11008, 32, 32, 32000),
    "70B": (80, 8192, 28672, 64, 8, 128256),
    "405B": (126, 16384, 53248, 128, 8, 128256),
}
LARGEST_MESSAGE = 2**31 - 1


def main() -> None:
    """Print both tables."""
    with tempfile.TemporaryDirectory() as scratch:
        models = {name: _outline(Path(scratch) / name, *shape) for name, shape in SHAPES.items()}
        print("\n".join(table.markdown() for table in (_uploads(models), _server(models))))


def _outline(folder: Path, blocks: int, width: int, mlp: int, heads: int, key_heads: int, vocabulary: int) -> Outline:
    """A model of which only the shapes are known."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        tie_word_embeddings=False,
        dtype="float16",
    )
    config.save_pretrained(folder)
    return open_outline(Model(path=str(folder)))


def _job(model: Outline, algorithm: str, clients: int) -> Job:
    config = Config(clients=[Client(client_id=f"client-{number}") for number in range(clients)])
    config.algorithm = algorithm
    config.client_configs.comm_configs.max_message_bytes = LARGEST_MESSAGE
    return Job(config, model)


def _uploads(models: dict[str, Outline]) -> Table:
    table = Table("What a client sends and gets", ("model", "algorithm", "GB up", "GB down", "largest part, MB"))
    for name, model in models.items():
        for algorithm in FOLDED:
            job = _job(model, algorithm, 1)
            up, down = _bytes(job)
            largest = max(size for one in job.exchanges for units in job.up(one).values() for size in units.values())
            table.add(name, algorithm, f"{up / 1e9:.1f}", f"{down / 1e9:.1f}", f"{largest / 1e6:.0f}")
    return table


def _server(models: dict[str, Outline]) -> Table:
    heads = (
        "model",
        "algorithm",
        "clients",
        "TB up",
        "TB down",
        "hours of folding",
        *(f"hours at {link}" for link in LINKS),
    )
    table = Table("What the server takes in a round", (*heads, "GB of memory"))
    for name, model in models.items():
        for algorithm in FOLDED:
            for clients in CLIENTS:
                table.add(name, algorithm, clients, *_load(_job(model, algorithm, clients)))
    return table


def _load(job: Job) -> Sequence[str]:
    up, down = (each * len(job.clients) / 1e9 for each in _bytes(job))
    hours = [up / FOLDED[job.algorithm.name], *(max(up, down) / speed for speed in LINKS.values())]
    memory = server_memory(job).needed / 1e9
    return [f"{up / 1e3:.2f}", f"{down / 1e3:.2f}", *(_hours(seconds / 3600) for seconds in hours), f"{memory:.0f}"]


def _bytes(job: Job) -> tuple[int, int]:
    """Of one client in a round, up and down."""
    [sent] = traffic(job)
    return next(iter(sent.up.values())), sent.down + final(job)


def _hours(hours: float) -> str:
    return f"{hours:.2g}" if hours < 99.5 else f"{hours:.0f}"


if __name__ == "__main__":
    main()
