"""Presets: one word for a whole way to prune.

A preset sets several keys at once. In a file it stands below everything else that the file says. As an override or as an
argument it stands above the file, and what is asked for beside it stands above both.
"""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "algorithm": "fedspallm",
        "client_configs": {"train_configs": {"pruner": "sparsegpt", "layer_sampling": "uniform", "refit": False}},
        "server_configs": {"aggregator_kwargs": {"expansion": "matrix", "weights": "equal"}},
    },
    "fast": {
        "algorithm": "fedprllm",
        "client_configs": {"train_configs": {"pruner": "wanda", "refit": False}},
    },
    "best": {
        "algorithm": "gram",
        "client_configs": {"train_configs": {"pruner": "admm"}},
        "allocation": {"method": "fisher"},
        "recovery": {"rounds": 1},
    },
}


def over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Keys and values with others over them; a group that is named but empty changes nothing."""
    made = dict(below)
    for key, value in above.items():
        group = isinstance(made.get(key), dict) and (value is None or isinstance(value, dict))
        made[key] = over(made[key], value or {}) if group else value
    return made


def filled(raw: dict[str, Any]) -> dict[str, Any]:
    """Keys and values over those of the preset that they name; as they are if they name none."""
    return over(PRESETS.get(str(raw.get("preset")), {}), raw)
