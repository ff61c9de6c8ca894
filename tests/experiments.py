"""A small experiment on the bundled model, written as a user would write it."""

from pathlib import Path

import yaml

from conftest import DEMO

DOMAINS = ("austen", "bible", "csource", "sqldocs")


def small_config(folder: Path, count: int = 3, **changes) -> Path:
    """Write a configuration that runs in seconds; `changes` are merged into the top-level groups."""
    config = {
        "run_dir": str(folder / "run"),
        "model": {"path": str(DEMO / "model"), "dtype": "float32"},
        "server_configs": {"num_clients": count},
        "client_configs": {
            "train_configs": {"threads": 1, "device": "cpu"},
            "data": {"windows": 6, "length": 64, "batch": 3},
        },
        "clients": [
            {"client_id": name, "data": {"text": str(DEMO / "text" / name / "calib.txt")}} for name in DOMAINS[:count]
        ],
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


# Every part that could depend on the layout of processes: unequal shares and windows, rounds, weights, sums kept.
UNEVEN = {
    "server_configs": {"num_global_epochs": 2, "aggregator_kwargs": {"weights": "sample_size", "fold": "cumulative"}},
    "clients": [
        {
            "client_id": name,
            "data": {"text": str(DEMO / "text" / name / "calib.txt"), "windows": windows},
            "train_configs": {"resource_share": share},
        }
        for name, windows, share in zip(DOMAINS[:3], (6, 5, 4), (1.0, 0.5, 0.4), strict=True)
    ],
}
