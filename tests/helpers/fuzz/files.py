"""Files and answers that others wrote: configurations, site files, model folders, run directories, results over Globus."""

import json
import random
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from fedspallm_appfl.api import validate
from fedspallm_appfl.cli.checked import well_formed
from fedspallm_appfl.errors import ConfigError, UpdateError
from fedspallm_appfl.events import EventLog
from fedspallm_appfl.globus.server.ledger import FOLDER, read
from fedspallm_appfl.globus.server.results import read_result
from fedspallm_appfl.globus.site.site_file import read_site_file
from fedspallm_appfl.models.lazy_model import Skeleton
from fedspallm_appfl.models.storage.checkpoint import PACKED_INDEX
from fedspallm_appfl.models.storage.packing import pack, unpack
from fedspallm_appfl.pruning.from_sums import Sums
from fedspallm_appfl.runs import further_models, run_dir
from fedspallm_appfl.settings.reading import load_config, to_yaml
from fedspallm_appfl.texts.checks import look_at
from fedspallm_appfl.wire.metadata import read_metadata
from fedspallm_appfl.wire.store import GramStore
from fedspallm_appfl.wire.update import checked_losses
from helpers.fuzz.harness import Attempt, Unnamed
from helpers.fuzz.mutations import changed, changed_text
from helpers.fuzz.uploads import Federation, Kind
from helpers.paths import ROOT
from helpers.tiny import INPUTS, save_tiny, tiny_config

METADATA = {"_chunk_idx": 0, "_total_chunks": 1, "samples": 4, "seconds": 0.5, "notes": '{"q": {"n": 1}}', "host": "a"}
LINEARS = {
    "self_attn.q_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}
SITE = b"""model: model
may_send: [weights, masks]
min_tokens: 100
store: {folder: store}
plugins: [mine.py]
evaluation: true
clients:
  ann: {text: [notes.txt, more], field: text}
  bob: {text: notes.jsonl}
"""


def attempts() -> Iterator[tuple[str, Attempt]]:
    """(name, what makes and runs a case) of each."""
    yield "configuration", _configuration
    yield "override", _override
    yield "site file", _site_file
    yield "text", _text
    yield "model folder", _model_folder
    yield "packed folder", _packed_folder
    yield "run directory, prune", _run_directory
    yield "run directory, state", _resume
    yield "run directory, configuration", _other_configuration
    yield "run directory, events and tasks", _events
    yield "result over Globus", _result
    yield "metadata and losses", _metadata


@cache
def _room() -> Path:
    """A folder for this process with a tiny model, and a run that could be pruned further."""
    own = tempfile.TemporaryDirectory(prefix="fuzz-")
    _KEPT.append(own)
    folder = Path(own.name)
    torch.manual_seed(0)
    model = save_tiny(folder / "model", blocks=1)
    run = folder / "run"
    config, problems = load_config(tiny_config(folder, model, "gram", 2, run_dir=str(run)))
    assert not problems
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(config))
    (run / run_dir.MARK).touch()
    (run / "manifest.json").write_text(
        json.dumps({"matrices": [{"name": "model.layers.0.mlp.down_proj.weight", "zeros": 1}]})
    )
    for name, side in INPUTS.items():
        x = torch.randn(2 * side, side)
        GramStore(run / "statistics").save(0, LINEARS[name], Sums((x.T @ x).triu(), 2 * side), True)
    return folder


_KEPT: list[tempfile.TemporaryDirectory] = []


def _configuration(dice: random.Random) -> None:
    texts = [*sorted((ROOT / "configs").glob("*.yaml")), _room() / "config.yaml"]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        file = Path(folder) / "config.yaml"
        file.write_bytes(changed_text(dice.choice(texts).read_bytes(), dice))
        problems = validate(well_formed(str(file), []), files=False)
    if problems:
        raise ConfigError("; ".join(problems))


def _override(dice: random.Random) -> None:
    keys = [
        "clients.0.data.text",
        "client_configs.train_configs.sparsity",
        "algorithm",
        "clients",
        "clients.9.x",
        "run_dir",
    ]
    override = changed_text(f"{dice.choice(keys)}={dice.choice(['0.5', 'a', '[1]', '{a: 1}', '2:4'])}".encode(), dice)
    well_formed(str(_room() / "config.yaml"), [override.decode("utf-8", "replace")])


def _site_file(dice: random.Random) -> None:
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        file = Path(folder) / "site.yaml"
        file.write_bytes(changed_text(SITE, dice))
        read = read_site_file(file, "client ann: ")
        for client in ("ann", "bob"):
            read.of(client)


def _text(dice: random.Random) -> None:
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        ending = dice.choice(["txt", "md", "jsonl", "json", "csv", "txt.gz", "txt.zst", "parquet"])
        file = Path(folder) / f"a.{ending}"
        file.write_bytes(changed_text(b'{"text": "One line."}\n{"text": "Another, longer."}\n', dice))
        look_at(str(file), dice.choice([None, "text"]))


def _changed_file(file: Path, dice: random.Random) -> None:
    """Change some of a file's text, or of the header of its tensors."""
    data = file.read_bytes()
    head = len(data)
    if file.suffix == ".safetensors":
        head = 8 + int.from_bytes(data[:8], "little")
        if dice.random() < 0.7:  # a header of the right length
            text = changed_text(data[8:head], dice)
            file.write_bytes(len(text).to_bytes(8, "little") + text + data[head:])
            return
    file.write_bytes(changed_text(data[:head], dice) + data[head:])


def _model_folder(dice: random.Random) -> None:
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        model = Path(shutil.copytree(_room() / "model", Path(folder) / "model"))
        name = dice.choice(["config.json", "model.safetensors"])
        if dice.random() < 0.2:
            name = "model.safetensors.index.json"
            weights = dict.fromkeys(Skeleton(str(_room() / "model")).files.keys(), "a.safetensors")
            (model / name).write_text(json.dumps({"weight_map": weights}))
            (model / "model.safetensors").rename(model / "a.safetensors")
        _changed_file(model / name, dice)
        skeleton = Skeleton(str(model))
        for block, linears in enumerate(skeleton.layout.blocks):
            for linear in linears:
                skeleton.dense_weight(block, linear).float().sum()


@cache
def _packed() -> Path:
    """The tiny model, its small weights zero, packed."""
    folder = _room()
    model = Path(shutil.copytree(folder / "model", folder / "pruned"))
    state = load_file(model / "model.safetensors")
    save_file({key: one * (one.abs() > 0.03) for key, one in state.items()}, model / "model.safetensors")
    pack(model, folder / "packed")
    return folder / "packed"


def _packed_folder(dice: random.Random) -> None:
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        packed = Path(shutil.copytree(_packed(), Path(folder) / "packed"))
        _changed_file(packed / dice.choice([PACKED_INDEX, "packed.safetensors", "packed.safetensors"]), dice)
        unpack(packed, Path(folder) / "out")


def _run_directory(dice: random.Random) -> None:
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        run = Path(shutil.copytree(_room() / "run", Path(folder) / "run"))
        _changed_file(dice.choice([run / "manifest.json", run / "config.yaml", *(run / "statistics").iterdir()]), dice)
        further_models.prune(run, ["0.5"], None, Console(quiet=True))


def _resume(dice: random.Random) -> None:
    """A run that was cut off after a block."""
    kind = dice.choice([Kind("weights", "fedspallm"), Kind("values", "consensus"), Kind("masks", "consensus")])
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        state = Path(folder) / "state"
        first = Federation(kind, state)
        for client in ("ann", "bob"):
            update = first.honest(client)
            first.model.receive(client, {**update, "blocks": {"0": update["blocks"]["0"]}}, 1)
        files = [*state.rglob("*.json"), *state.glob("finished/*/*/*.safetensors"), *state.glob("*/*.safetensors")]
        _changed_file(dice.choice([*files, state / "position.json", *state.glob("finished/*/record.json")]), dice)
        second = Federation(kind, state)
        if second.model.resumed is not None:
            second.model.held(2**20)
            second.end()


def _other_configuration(dice: random.Random) -> None:
    """The configuration that a run was begun with, where another start reads it."""
    config, _ = load_config(_room() / "config.yaml")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        config.run_dir = folder
        (Path(folder) / run_dir.MARK).touch()
        (Path(folder) / run_dir.STATE).mkdir()
        (Path(folder) / "config.yaml").write_bytes(changed_text((_room() / "run" / "config.yaml").read_bytes(), dice))
        if wrong := run_dir.problem(config, overwrite=False, resume=True):
            raise ConfigError(wrong)


def _events(dice: random.Random) -> None:
    """What was written down while a run over Globus Compute was at work."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        file, ledger = Path(folder) / "metrics.jsonl", Path(folder) / FOLDER / "ledger.json"
        file.write_text('{"event": "start", "version": "1", "time": 1.5}\n{"event": "block", "block": 3, "time": 2}\n')
        ledger.parent.mkdir()
        ledger.write_text('{"run": "a", "starts": 1, "turn": [0, 0], "tasks": {"ann": "id"}, "objects": ["x"]}')
        _changed_file(dice.choice([file, ledger]), dice)
        EventLog(file)({"event": "block", "block": 3})
        read(Path(folder))


def _result(dice: random.Random) -> None:
    message = {"payload": {"inline": "AAAA"}, "metadata": METADATA}
    error = {"error": {"message": "no room", "traceback": "Traceback", "host": "a", "blocks": "0-3"}}
    result, _ = changed(dice.choice([{"messages": [message]}, error]), dice)
    _naming("ann", lambda: read_result("ann", result, 1))


def _metadata(dice: random.Random) -> None:
    metadata, _ = changed(METADATA, dice)
    losses, _ = changed({"tokens": 10, "dense": 1.5, "pruned": 2.5}, dice)
    _naming("ann", lambda: read_metadata(metadata, "client ann"))
    _naming("ann", lambda: checked_losses("ann", losses))


def _naming(client: str, read: object) -> None:
    try:
        read()
    except UpdateError as error:
        if f"client {client}" not in str(error):
            raise Unnamed(str(error)[:500]) from error
        raise
