"""A small experiment on the bundled model, written as a user would write it."""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import yaml

from helpers.paths import DEMO

DOMAINS = ("austen", "bible", "csource", "sqldocs")
PAGES = tempfile.TemporaryDirectory(prefix="first-pages-")


def whole_text(name: str) -> Path:
    """The calibration text of a client."""
    return DEMO / "text" / name / "calib.txt"


@functools.cache
def first_pages(name: str, letters: int = 4_000) -> Path:
    """The beginning of it; whole texts take longer to cut than the model to prune."""
    file = Path(PAGES.name) / str(letters) / name / "calib.txt"
    file.parent.mkdir(parents=True)
    file.write_text(whole_text(name).read_text("utf-8")[:letters], "utf-8")
    return file


def small_config(folder: Path, count: int = 3, text: Callable[[str], Path] = whole_text, **changes) -> Path:
    """Write a configuration that runs in seconds; `changes` are merged into the top-level groups."""
    config = {
        "run_dir": str(folder / "run"),
        "model": {"path": str(DEMO / "model"), "dtype": "float32"},
        "server_configs": {"num_clients": count},
        "client_configs": {
            "train_configs": {"threads": 1, "device": "cpu"},
            "data": {"windows": 6, "length": 64, "batch": 3},
        },
        "clients": [{"client_id": name, "data": {"text": str(text(name))}} for name in DOMAINS[:count]],
    }
    merge(config, changes)
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def merge(into: dict, changes: dict) -> None:
    """Merge nested dicts in place."""
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value


def uneven(text: Callable[[str], Path] = whole_text) -> dict:
    """Every part that could depend on the layout of processes: unequal shares and windows, rounds, weights, sums kept."""
    return {
        "server_configs": {
            "num_global_epochs": 2,
            "aggregator_kwargs": {"weights": "sample_size", "fold": "cumulative"},
        },
        "clients": [
            {
                "client_id": name,
                "data": {"text": str(text(name)), "windows": windows},
                "train_configs": {"resource_share": share},
            }
            for name, windows, share in zip(DOMAINS[:3], (6, 5, 4), (1.0, 0.5, 0.4), strict=True)
        ],
    }


UNEVEN = uneven()
