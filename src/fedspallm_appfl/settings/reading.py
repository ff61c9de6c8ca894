"""Read a configuration: YAML, overrides and references into the classes of `schema`, with every problem at once.

Each entry of `clients` is merged over `client_configs`. The same file runs in one process, under mpiexec and over Globus
Compute; `key=value` arguments override single values, `clients.0.data.text=...` reaches into the list. `${here:path}` is a
path relative to the folder of the file itself; other relative paths start from the working directory.

An unknown key is an error that names the nearest valid one: a misspelt setting must not silently be the default.
"""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedspallm_appfl.errors import ConfigError, first_line, quoted, shortened
from fedspallm_appfl.settings import presets, yaml_text
from fedspallm_appfl.settings.presets import over
from fedspallm_appfl.settings.schema import Config, plain
from fedspallm_appfl.tensors.targets import Sparsity, parse_sparsity

WORDS = {list: "a list", dict: "keys and values", bool: "true or false"}
MEANT = dict.fromkeys(("ignore", "skip", "exclude", "skip_layers", "ignore_layers", "skip_blocks"), "prune.ignore")


def load_config(
    file: str | Path, overrides: Sequence[str] = (), more: dict[str, Any] | None = None
) -> tuple[Config, list[str]]:
    """Read a YAML file.

    Args:
        file: the file.
        overrides: `key=value` with dotted keys; values are read as YAML.
        more: keys and values that replace those of the file.

    Returns:
        The configuration, and every problem of its form: unknown keys, values of the wrong type. What the values must
        fulfil is checked by `rules.check`.

    Raises:
        ConfigError: the file cannot be read as YAML, or an override has no `=`.
    """
    above = more or {}
    return read_config(over(_merge(_read(Path(file)), overrides), over(presets.of(above.get("preset")), above)))


def read_config(raw: dict[str, Any]) -> tuple[Config, list[str]]:
    """The same from plain keys and values."""
    problems: list[str] = []
    raw = over(presets.of(raw.get("preset")), raw)
    merged = {**raw, "clients": _merged_clients(raw, problems)}
    return build(Config, merged, "", problems), _without_echoes(problems)


def to_yaml(config: Config) -> str:
    """The whole configuration, defaults and merged clients spelt out."""
    return yaml_text.dump(plain(config))


def _read(file: Path) -> DictConfig:
    resolver = getattr(OmegaConf, "register_resolver", None) or OmegaConf.register_new_resolver
    resolver("here", lambda path: str((file.resolve().parent / path).resolve()), replace=True)
    try:
        loaded = yaml_text.load(file.read_text("utf-8"))
    except OSError as error:
        fix = f"that of the run is {file / 'config.yaml'}" if (file / "config.yaml").is_file() else "name a YAML file"
        raise ConfigError(f"the configuration {shortened(file)} cannot be read: {error.strerror}; {fix}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid YAML: {str(error).replace('<unicode string>', file.name)}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{file} must hold keys and values, such as `run_dir: runs/first`")
    try:
        return OmegaConf.create(loaded)
    except (OmegaConfBaseException, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read as a configuration: {first_line(error)}") from error


def _merge(loaded: DictConfig, overrides: Sequence[str]) -> dict[str, Any]:
    named = [one for one in overrides if one.startswith("preset=")]
    for override in (*named[-1:], *(one for one in overrides if one not in named)):  # a preset lies below the others
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigError(
                f"an override is key=value, got {quoted(override)}; e.g. client_configs.train_configs.sparsity=0.7"
            )
        try:
            parsed = yaml_text.load(value)
            if override in named:
                loaded.merge_with(presets.of(parsed))
            OmegaConf.update(loaded, key, parsed, merge=True)
        except IndexError as error:
            raise ConfigError(
                f"the override {quoted(override)} cannot be applied: there is no such entry in the list; the first is 0"
            ) from error
        except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError) as error:
            raise ConfigError(f"the override {quoted(override)} cannot be applied: {first_line(error)}") from error
    try:
        return OmegaConf.to_container(loaded, resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        where = getattr(error, "full_key", None) or "a value"
        raise ConfigError(f"{where} refers to something that is not there: {first_line(error)}") from error


def _merged_clients(raw: dict[str, Any], problems: list[str]) -> Any:
    shared, clients = raw.get("client_configs") or {}, raw.get("clients")
    if not isinstance(clients, list) or not isinstance(shared, dict):
        return clients
    merged = []
    for index, client in enumerate(clients):
        if not isinstance(client, dict):
            problems.append(
                f"clients.{index}: a client is a group of keys such as client_id and data, got {quoted(client)}"
            )
            client = {}
        merged.append(over(shared, client))
    return merged


def _without_echoes(problems: list[str]) -> list[str]:
    """What is wrong in `client_configs` shows in every client again; say it once."""
    shared = {problem.removeprefix("client_configs.") for problem in problems if problem.startswith("client_configs.")}
    return [problem for problem in problems if re.sub(r"^clients\.\d+\.", "", problem) not in shared]


def build(kind: Any, raw: Any, path: str = "", problems: list[str] | None = None) -> Any:
    """Make one of the classes of `schema` of plain keys and values.

    Args:
        kind: the class.
        raw: keys and values; None for all defaults.
        path: what the keys stand in, for messages.
        problems: takes what is wrong, and the default stands in its place; None ignores unknown keys, such as APPFL's own.

    Raises:
        ConfigError: without `problems`, a value of a wrong type.
    """
    if raw is None:
        return kind()
    found: list[str] = [] if problems is None else problems
    if not isinstance(raw, dict):
        found.append(f"{path or 'the file'}: expected keys and values, got {quoted(raw)}")
        return kind()
    hints, made = _hints(kind), {}
    for key, value in raw.items():
        where = f"{path}.{shortened(key)}" if path else shortened(key)
        if key in hints:
            made[key] = _value(hints[key], _as_word(kind, key, value), where, problems, found)
        elif problems is not None:
            meant = f"; did you mean {MEANT[key]}, with the value {quoted(value)}?" if key in MEANT else None
            found.append(f"{where}: unknown key{meant or _nearest(str(key), list(hints), kind)}")
    if problems is None and found:
        raise ConfigError("; ".join(found))
    return kind(**{key: value for key, value in made.items() if value is not _WRONG})


def _as_word(kind: Any, key: str, value: Any) -> Any:
    """`off` where it is one of a key's words: YAML reads it as a boolean."""
    rule = kind.__dataclass_fields__[key].metadata.get("rule")
    return "off" if value is False and rule is not None and "off" in rule.choices else value


_WRONG: Any = object()  # a value that does not fit; the default stands in its place
_hints = cache(typing.get_type_hints)


@cache
def _paths(kind: Any, path: str = "") -> tuple[str, ...]:
    """Dotted names of all keys of a class and of the classes within."""
    inner = [(f"{path}{key}", hint) for key, hint in _hints(kind).items() if key in kind.__dataclass_fields__]
    return tuple(
        name
        for where, hint in inner
        for name in (_paths(typing.cast(type, hint), f"{where}.") if dataclasses.is_dataclass(hint) else (where,))
    )


def _value(hint: Any, value: Any, where: str, outer: list[str] | None, problems: list[str]) -> Any:
    """A value as its key's type wants it; `outer` is what `build` was given for `problems`."""
    if hint == Sparsity:
        return _target(value, where, problems)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where, outer)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        if value is None and types.NoneType in arguments:
            return None
        fits = [a for a in arguments if isinstance(value, list) == (typing.get_origin(a) is list)]
        return _value(fits[0] if fits else arguments[0], value, where, outer, problems)
    if origin in (list, dict) and value is None:
        return _WRONG  # an empty list or group is the default
    if origin is list and isinstance(value, list):
        items = [_value(arguments[0], v, f"{where}.{i}", outer, problems) for i, v in enumerate(value)]
        return ["" if item is _WRONG else item for item in items]
    if origin is dict and isinstance(value, dict):
        values = {str(k): _value(arguments[1], v, f"{where}.{k}", outer, problems) for k, v in value.items()}
        return {k: "" if v is _WRONG else v for k, v in values.items()}
    return _scalar(hint, value, where, problems)


def _scalar(hint: Any, value: Any, where: str, problems: list[str]) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is str and (isinstance(value, str) or number):
        return str(value)
    if hint is float and number:
        return float(value)
    if hint is int and number and isinstance(value, int):
        return value
    if hint is bool and isinstance(value, bool):
        return value
    kind = typing.get_origin(hint) or hint
    problems.append(f"{where}: expected {WORDS.get(kind) or getattr(hint, '__name__', str(hint))}, got {quoted(value)}")
    return _WRONG


def _target(value: Any, where: str, problems: list[str]) -> Any:
    try:
        return parse_sparsity(value)
    except ValueError as error:
        problems.append(f"{where}: {error}")
        return _WRONG


def _nearest(key: str, valid: list[str], kind: Any) -> str:
    if inside := [path for path in _paths(kind) if path.endswith(f".{key}")]:
        return f"; did you mean {' or '.join(inside)}?"
    near = difflib.get_close_matches(key, valid, n=1)
    return f"; did you mean {near[0]}?" if near else f"; valid here are {', '.join(sorted(valid))}"
