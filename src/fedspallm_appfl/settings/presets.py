"""Presets: one word for a whole way to prune.

A preset sets several keys at once. In a file it stands below everything else that the file says. As an override or as an
argument it takes the place of the file's, stands above the file, and what is asked for beside it stands above both.
"""

from typing import Any

PRUNING_ALONE: dict[str, Any] = {"allocation": {"method": "uniform"}, "recovery": {"rounds": 0}}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "algorithm": "fedspallm",
        "client_configs": {"train_configs": {"pruner": "sparsegpt", "layer_sampling": "uniform", "refit": False}},
        "server_configs": {"aggregator_kwargs": {"expansion": "matrix", "weights": "equal"}},
        **PRUNING_ALONE,
    },
    "fast": {
        "algorithm": "fedprllm",
        "client_configs": {"train_configs": {"pruner": "wanda", "refit": False}},
        **PRUNING_ALONE,
    },
    "best": {
        "algorithm": "gram",
        "client_configs": {"train_configs": {"pruner": "admm", "refit": False}},
        "allocation": {"method": "fisher"},
        "recovery": {"rounds": 1},
    },
}


def of(name: Any) -> dict[str, Any]:
    """What a preset sets; nothing if there is none of that name."""
    return PRESETS.get(str(name), {})


def applied(raw: dict[str, Any], name: str) -> dict[str, Any]:
    """A whole configuration, as plain keys and values, with a preset over it and over each of its clients."""
    made = over(raw, of(name))
    return made | {"clients": [over(client, of(name)["client_configs"]) for client in raw["clients"]]}


def over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Keys and values with others over them; a group that is named but empty changes nothing."""
    made = dict(below)
    for key, value in above.items():
        group = isinstance(made.get(key), dict) and (value is None or isinstance(value, dict))
        made[key] = over(made[key], value or {}) if group else value
    return made
