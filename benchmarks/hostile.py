"""What one hostile client does to the model, and what screening sees of honest ones.

    python -m benchmarks.hostile [--honest] [--full] [--model FOLDER --texts FILE FILE FILE FILE]

Without `--honest`: four clients, one of them hostile; perplexity of the result with screening off and on. With it: the
range of each fact that screening looks at (`aggregation/screening.py`) over honest clients; `--full` is the whole grid.
Both run in one process on the bundled model, or on one that is named.
"""

import argparse
import contextlib
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fedspallm_appfl as fs
from benchmarks.tables import Table
from fedspallm_appfl.aggregation import screening
from fedspallm_appfl.rounds.client import LocalClient
from fedspallm_appfl.rounds.folds import intake
from fedspallm_appfl.runs import serial
from fedspallm_appfl.settings.reading import read_config
from fedspallm_appfl.tensors.bitmask import from_bits, gather, scatter, to_bits

DEMO = Path("examples/demo")
DOMAINS = ("austen", "bible", "csource", "sqldocs")
TARGETS = ("0.5", "0.6", "0.7", "0.8", "2:4")
SETUPS = (  # clients, whether all have the same kinds of text, (windows, length)
    (4, False, (8, 64)),
    (4, True, (12, 128)),
    (16, False, (8, 64)),
    (16, True, (8, 64)),
)
HOSTILE = "c0"
Parts = dict[str, Any]  # of one matrix, as they travel


@dataclass(frozen=True)
class Attack:
    """What a hostile client does.

    Attributes:
        name: in the table.
        spoil: changes the parts of one matrix or of the statistics of one input.
        algorithm: of the run.
        pruner: of the run.
        samples: what it says of its calibration windows, times the truth; other than 1 with `weights: sample_size`.
        recovers: whether a round of recovery follows, of which alone it spoils the changes.
    """

    name: str
    spoil: Callable[[Parts], None]
    algorithm: str = "fedspallm"
    pruner: str = "sparsegpt"
    samples: int = 1
    recovers: bool = False


def _values(change: Callable[[Tensor], Tensor]) -> Callable[[Parts], None]:
    def spoil(parts: Parts) -> None:
        values = parts["values"]
        parts["values"] = change(values.float()).to(values.dtype)

    return spoil


def _one_value(values: Tensor) -> Tensor:
    values[len(values) // 2] = 6e4
    return values


def _noise(values: Tensor) -> Tensor:
    return torch.randn(values.shape, generator=torch.Generator().manual_seed(len(values))) * values.std()


def _zeros_in(share: float) -> Callable[[Tensor], Tensor]:
    def change(values: Tensor) -> Tensor:
        values[: int(share * len(values))] = 0
        return values

    return change


def _inverted(parts: Parts) -> None:
    """Keep what would be pruned; of 50 % the counts are the same."""
    parts["mask"] = ~parts["mask"]


def _at_random(parts: Parts) -> None:
    rows, columns = parts["shape"]
    kept = from_bits(parts["mask"], (rows * columns,))
    parts["mask"] = to_bits(kept[torch.randperm(rows * columns, generator=torch.Generator().manual_seed(rows))])


def _one_column(parts: Parts) -> None:
    """-100 times the weights of the first input feature."""
    weight = scatter(parts["values"], parts["mask"], tuple(parts["shape"]))
    weight[:, 0] *= -100
    parts["values"] = gather(weight, parts["mask"])


def _large_diagonal(parts: Parts) -> None:
    parts["diagonal"] = torch.full_like(parts["diagonal"], 3e38)


def _rank_one(times: float, parts: Parts) -> None:
    """`v v^T` with so many times the diagonal."""
    roots = times**0.5 * parts["diagonal"].sqrt()
    side = len(roots)
    above = torch.triu_indices(side, side, 1)
    parts["diagonal"] = roots.square()
    parts["upper"] = (roots[above[0]] * roots[above[1]]).to(parts["upper"].dtype)
    parts.pop("scale", None)


def _correlated(parts: Parts) -> None:
    parts["upper"] = (parts["upper"].float() * 10).to(parts["upper"].dtype)


def _too_many_tokens(parts: Parts) -> None:
    """A billion times the statistics, with other signs, said to be of as many more tokens."""
    parts["tokens"] *= 10**9
    parts["diagonal"] *= 1e9
    parts["upper"] *= -1e9


def _changes(times: float) -> Callable[[Parts], None]:
    def spoil(parts: Parts) -> None:
        if "levels" in parts:
            parts["scale"] = parts["scale"] * times

    return spoil


@dataclass(frozen=True)
class Kind:
    """A way to prune.

    Attributes:
        name: in the table.
        pruner: of the clients, or of the server.
        algorithm: of the run.
        refit: least squares afterwards.
        gram: keys of `gram`.
        recovery: rounds of it.
    """

    name: str
    pruner: str
    algorithm: str = "fedspallm"
    refit: bool = False
    gram: Mapping[str, Any] = field(default_factory=dict)
    recovery: int = 0


KINDS = (
    Kind("wanda", "wanda"),
    Kind("sparsegpt", "sparsegpt"),
    Kind("sparsegpt with refit", "sparsegpt", refit=True),
    Kind("admm", "admm"),
    Kind("consensus, sparsegpt", "sparsegpt", "consensus"),
    Kind("gram", "sparsegpt", "gram"),
    Kind("gram, a sweep", "sparsegpt", "gram", gram={"propagate": "pruned"}),
    Kind("gram, a sweep to the dense output", "sparsegpt", "gram", gram={"propagate": "pruned", "target": "dense"}),
    Kind("sparsegpt, recovery", "sparsegpt", recovery=1),
)
ATTACKS = (
    Attack("sign flipped", _values(torch.neg)),
    Attack("x10", _values(lambda values: 10 * values)),
    Attack("one value of 6e4 a matrix", _values(_one_value)),
    Attack("x-10", _values(lambda values: -10 * values)),
    Attack("zeros", _values(torch.zeros_like)),
    Attack("a tenth of them zeros", _values(_zeros_in(0.1))),
    Attack("noise", _values(_noise)),
    Attack("one column x-100", _one_column),
    Attack("x1.3", _values(lambda values: 1.3 * values)),
    Attack("x1.8", _values(lambda values: 1.8 * values)),
    Attack("noise of half the size added", _values(lambda values: values + _noise(values) / 2)),
    Attack("x-10, 1000 times the samples", _values(lambda values: -10 * values), samples=1000),
    Attack("masks inverted", _inverted, pruner="wanda"),
    Attack("masks at random", _at_random, pruner="wanda"),
    Attack("gram: diagonal of 3e38", _large_diagonal, "gram"),
    Attack("gram: rank one x1e6", partial(_rank_one, 1e6), "gram"),
    Attack("gram: rank one x20", partial(_rank_one, 20.0), "gram"),
    Attack("gram: correlations x10", _correlated, "gram"),
    Attack("gram: x-1e9, of 1e9 times the tokens", _too_many_tokens, "gram"),
    Attack("recovery: changes x10", _changes(10), recovers=True),
    Attack("recovery: changes x-10", _changes(-10), recovers=True),
    Attack("recovery: changes x-100", _changes(-100), recovers=True),
)


@contextlib.contextmanager
def hostile(attack: Attack) -> Iterator[None]:
    """Let the client `c0` attack."""
    make = LocalClient.next_message

    def next_message(client: LocalClient) -> Any:
        message = make(client)
        if client.settings.client_id == HOSTILE:
            client.samples = client.settings.data.windows * attack.samples
            for units in message.update.get("blocks", {}).values():
                for parts in units.values():
                    attack.spoil(parts)
        return message

    with mock.patch.object(LocalClient, "next_message", next_message):
        yield


def configuration(
    folder: Path, model: Path, texts: Sequence[Path], clients: int, mixed: bool, windows: int, length: int, **train: Any
) -> dict[str, Any]:
    """A run without evaluation; by domain or, mixed, with a part of every text for each client.

    Args:
        folder: for the texts of clients and the run.
        model: the dense model.
        texts: one a domain.
        clients: how many.
        mixed: whether all have the same kinds of text.
        windows: of each client.
        length: of a window.
        **train: keys of `train_configs`.
    """
    written = [text.read_text("utf-8", errors="ignore") for text in texts]
    own = []
    for number in range(clients):
        parts = written if mixed else [written[number % len(texts)]]
        sharing, mine = (clients, number) if mixed else (-(-clients // len(texts)), number // len(texts))
        sizes = [len(text) // sharing for text in parts]
        cut = [text[mine * size : (mine + 1) * size] for text, size in zip(parts, sizes, strict=True)]
        file = folder / f"c{number}.txt"
        file.write_text("\n".join(cut), "utf-8")
        own.append({"client_id": f"c{number}", "data": {"text": str(file)}})
    return {
        "run_dir": str(folder / "run"),
        "model": {"path": str(model), "dtype": "float32"},
        "server_configs": {"device": "cpu"},
        "client_configs": {
            "train_configs": {"threads": 1, "device": "cpu", **train},
            "data": {"windows": windows, "length": length, "batch": 8},
        },
        "clients": own,
    }


def honest_facts(raw: Mapping[str, Any], found: dict[str, list[float]]) -> int:
    """Add all values of each fact in one run of honest clients; returns how many are outside the limits."""
    refused = 0

    def note(facts: Mapping[str, float], fitted: bool) -> list[screening.Outlier]:
        nonlocal refused
        for fact, value in facts.items():
            found.setdefault(fact, []).append(value)
        refused += len(screening.outliers(facts, fitted))
        return []

    config, problems = read_config(dict(raw))
    assert not problems, problems
    with tempfile.TemporaryDirectory() as state, mock.patch.object(intake, "outliers", note):
        serial.run(config, Path(state), lambda event: None)
    return refused


def honest(model: Path, texts: Sequence[Path], full: bool) -> Table:
    """The range of each fact over a grid of honest runs."""
    table = Table("Honest clients", ("what", "target", "runs", *screening.LIMITS, "outside"))
    for kind, target in itertools.product(KINDS, TARGETS if full else ("0.5", "0.8", "2:4")):
        found: dict[str, list[float]] = {}
        runs, outside = 0, 0
        for clients, mixed, (windows, length) in SETUPS if full else SETUPS[:1]:
            train = {"pruner": kind.pruner, "refit": kind.refit, "sparsity": target}
            with tempfile.TemporaryDirectory() as folder:
                raw = configuration(Path(folder), model, texts, clients, mixed, windows, length, **train)
                raw |= {"algorithm": kind.algorithm, "gram": dict(kind.gram), "recovery": {"rounds": kind.recovery}}
                outside += honest_facts(raw, found)
            runs += 1
        spread = [
            f"{min(found[fact]):.3g} to {max(found[fact]):.3g}" if fact in found else "" for fact in screening.LIMITS
        ]
        table.add(kind.name, target, runs, *spread, outside)
        sys.stderr.write(f"{time.process_time():.0f} s: {table.rows[-1]}\n")
    return table


def attacks(model: Path, texts: Sequence[Path], held_out: Mapping[str, Path]) -> Table:
    """Perplexity under each attack with screening off and on, beside that of the honest clients."""
    table = Table(
        "One of four clients is hostile", ("attack", "screening off", "refuse", "three honest clients", "seen")
    )
    honest_three: dict[tuple[str, str, int, bool], float] = {}
    for attack in ATTACKS:
        kind = attack.algorithm, attack.pruner, attack.samples, attack.recovers
        if kind not in honest_three:
            honest_three[kind] = _perplexity(model, texts, held_out, attack, None, "off")[0]
        off, _ = _perplexity(model, texts, held_out, attack, attack, "off")
        on, seen = _perplexity(model, texts, held_out, attack, attack, "refuse")
        table.add(attack.name, f"{off:.4g}", f"{on:.4g}", f"{honest_three[kind]:.4g}", seen)
        sys.stderr.write(f"{table.rows[-1]}\n")
    return table


def _perplexity(
    model: Path, texts: Sequence[Path], held_out: Mapping[str, Path], like: Attack, attack: Attack | None, how: str
) -> tuple[float, str]:
    """Geometric mean of the perplexities of a run, and why the hostile client was left out."""
    with tempfile.TemporaryDirectory() as folder:
        raw = configuration(Path(folder), model, texts, 4, False, 16, 128, pruner=like.pruner, sparsity="0.5")
        raw["algorithm"] = like.algorithm
        raw |= {"gram": {"precision": "fp32"}} if like.algorithm == "gram" else {}
        raw |= {"recovery": {"rounds": int(like.recovers)}}
        raw["clients"] = raw["clients"] if attack else raw["clients"][1:]
        weights = "equal" if like.samples == 1 else "sample_size"
        raw["server_configs"] |= {"min_clients": 3, "aggregator_kwargs": {"screening": how, "weights": weights}}
        raw["evaluation"] = {"texts": {name: str(file) for name, file in held_out.items()}, "length": 128}
        raw["evaluation"] |= {"windows": 30, "batch": 10}
        config, problems = read_config(raw)
        assert not problems, problems
        with hostile(attack) if attack else contextlib.nullcontext():
            try:
                result = fs.run(config)
            except fs.FedSpaLLMError as error:
                return float("nan"), str(error)
        events = (Path(folder) / "run" / "metrics.jsonl").read_text("utf-8")
    refused = [line for line in events.splitlines() if '"absent"' in line]
    measured = list(result.perplexity.values())[-1]
    return statistics.geometric_mean(measured.values()), "; ".join(refused) or "no"


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hostile", description=__doc__)
    parser.add_argument("--honest", action="store_true", help="ranges of the facts of honest clients")
    parser.add_argument("--full", action="store_true", help="the whole grid")
    parser.add_argument("--model", type=Path, default=DEMO / "model", metavar="FOLDER")
    parser.add_argument("--texts", type=Path, nargs="+", metavar="FILE", help="one a domain, to calibrate with")
    options = parser.parse_args()
    torch.set_num_threads(1)
    texts = options.texts or [DEMO / "text" / name / "calib.txt" for name in DOMAINS]
    if options.honest:
        table = honest(options.model, texts, options.full)
    else:
        table = attacks(options.model, texts, {text.parent.name: text.with_name("test.txt") for text in texts})
    sys.stdout.write(table.markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
