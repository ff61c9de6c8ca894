"""One experiment, one YAML: the schema, its defaults, and a reader that reports every problem at once.

The top-level keys `server_configs`, `client_configs` and `clients` are APPFL's. Each entry of `clients` is merged over
`client_configs`. The same file runs in one process and under mpiexec; `key=value` arguments override single values,
`clients.0.data.text=...` reaches into the list. `${here:path}` is a path relative to the folder of the file itself; other
relative paths start from the working directory.

An unknown key is an error that names the nearest valid one: a setting that is misspelt must not silently be the default.
Such errors are there at once: reading a file imports no torch (the rule of imports is in `cli`).
"""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedspallm_appfl.errors import ConfigError, first_line
from fedspallm_appfl.settings import yaml_text as yaml_io

Paths = str | list[str]


@dataclass
class Model:
    """The dense model that every client and the server hold themselves."""

    path: str = ""  # folder saved by save_pretrained, or hub name
    dtype: str = "auto"  # arithmetic of forward passes: auto (as stored), float32, float16, bfloat16
    blocks: str | None = None  # dotted name of the list of decoder blocks, where the search does not find it


@dataclass
class Gram:
    """What clients send with `algorithm: gram`."""

    precision: str = "int8"  # fp32 | bf16 | int8
    propagate: str = "dense"  # dense (one pass) | pruned (a sweep, an exchange for each input of each block)
    target: str = "own"  # own | dense: in a sweep, whether outputs should be those of the dense model
    first_input: str = (
        "public"  # public (random tokens) | private: the first block's first input, which tells token counts
    )
    min_tokens: int | None = None  # statistics of fewer tokens are not sent; null is the width of the input


@dataclass
class AggregatorKwargs:
    """How uploads are combined."""

    weights: str = "equal"  # equal | sample_size (calibration windows of each client)
    fold: str = "latest"  # latest | cumulative: what a later round does with the sums of earlier ones
    expansion: str = "matrix"  # matrix | row: group in which entries compete in mask expansion


@dataclass
class SchedulerKwargs:
    """How uploads are let in."""

    max_open_blocks: int = 2  # blocks whose sums are in memory before clients that run ahead have to wait


@dataclass
class Functions:
    """Ids of this package's functions at Globus Compute, as `fedspallm functions` has registered them."""

    look_around: str | None = None
    prune: str | None = None


@dataclass
class ServerConfigs:
    """The server and the rounds."""

    num_clients: int | None = None  # must equal the length of `clients` where it is given
    num_global_epochs: int = 1  # rounds
    min_clients: int | None = None  # over Globus Compute: a round ends once so many have answered; null waits for all
    round_deadline: float | None = None  # over Globus Compute: seconds an exchange may take; null waits without end
    preflight_deadline: float = 600.0  # over Globus Compute: seconds an endpoint has to answer the preflight
    functions: Functions = field(
        default_factory=Functions
    )  # where sites allow these alone; else registered by each run
    device: str = "auto"  # where sums are kept and combined: auto (a GPU if the server sees one), cpu, cuda, cuda:1
    aggregator: str = "FedSpaLLMAggregator"
    aggregator_kwargs: AggregatorKwargs = field(default_factory=AggregatorKwargs)
    scheduler: str = "FedSpaLLMScheduler"
    scheduler_kwargs: SchedulerKwargs = field(default_factory=SchedulerKwargs)


@dataclass
class TrainConfigs:
    """Local pruning."""

    trainer: str = "FedSpaLLMTrainer"
    pruner: str = "sparsegpt"  # sparsegpt | admm | wanda | magnitude
    sparsity: str = "0.5"  # share in [0, 1), or n:m; the same for every client
    damping: float = 0.01  # added to the diagonal of G, as a share of its mean (SparseGPT) or of each entry (ADMM)
    damping_retries: int = 3  # failed factorizations are tried again with ten times the damping, so often
    iterations: int = 60  # ADMM: steps
    refit: bool = False  # least squares on the support after SparseGPT or Wanda
    layer_sampling: str = "balanced"  # balanced | uniform | sweep
    resource_share: float = 1.0  # share of the blocks that a client prunes in a round, in (0, 1]
    device: str = "auto"  # auto (a GPU of this node if there is one), cpu, cuda, cuda:1
    threads: int | None = None  # CPU threads of a client; null leaves it to torch


@dataclass
class Data:
    """Private text of a client and what is taken from it."""

    text: Paths | None = None  # a UTF-8 file, a folder of .txt files, or a list of these
    windows: int = 128  # calibration windows drawn from it
    length: int = 2048  # tokens in a window
    batch: int = 1  # windows in a forward pass; more is faster on a GPU and takes more memory
    activations: str = "memory"  # memory | file: where hidden states between two blocks are kept


@dataclass
class Store:
    """Where payloads lie that are too large for a task of Globus Compute."""

    connector: str = "none"  # none (everything travels with the tasks) | file | redis | s3 | endpoint
    folder: str | None = None  # file: a folder that server and clients mount
    host: str = "127.0.0.1"  # redis; its password is in FEDSPALLM_REDIS_PASSWORD
    port: int = 6379  # redis
    tls: bool = False  # redis
    bucket: str | None = None  # s3; credentials as boto3 takes them, of the server alone
    url: str | None = None  # s3: address of the service where it is not that of AWS
    endpoints: list[str] = field(
        default_factory=list
    )  # endpoint: UUIDs of all ProxyStore endpoints, the server's first


@dataclass
class CommConfigs:
    """Messages."""

    blocks_per_message: int = 1
    max_message_bytes: int = 2**29  # of one rank; a block that is larger is split; MPI ends at 2^31 - 1
    compression: str = (
        "auto"  # auto (zstd over Globus Compute, none under serial and MPI, with fast links) | none | zstd
    )
    store: Store = field(default_factory=Store)


@dataclass
class ClientConfigs:
    """What all clients share."""

    train_configs: TrainConfigs = field(default_factory=TrainConfigs)
    data: Data = field(default_factory=Data)
    comm_configs: CommConfigs = field(default_factory=CommConfigs)


@dataclass
class Client(ClientConfigs):
    """One client, `client_configs` with its own entry merged over it."""

    client_id: str = ""
    endpoint_id: str | None = None  # over Globus Compute: the UUID of its endpoint


@dataclass
class Evaluation:
    """Held-out text on which the server measures perplexity."""

    texts: dict[str, Paths] = field(default_factory=dict)  # name -> file, folder or list
    length: int = 2048
    windows: int | None = None  # at most so many of each text; null takes all
    batch: int = 1
    device: str = "auto"  # auto (a GPU if the server sees one), cpu, cuda, cuda:1
    compare: list[str] = field(default_factory=list)  # standalone, fedavg; dense is always there


@dataclass
class Config:
    """One experiment."""

    run_dir: str = ""
    seed: int = 0
    algorithm: str = "fedspallm"  # fedspallm | fedprllm | fedavg | consensus | gram | standalone | centralized
    gram: Gram = field(default_factory=Gram)
    model: Model = field(default_factory=Model)
    server_configs: ServerConfigs = field(default_factory=ServerConfigs)
    client_configs: ClientConfigs = field(default_factory=ClientConfigs)
    clients: list[Client] = field(default_factory=list)
    evaluation: Evaluation = field(default_factory=Evaluation)

    def to_yaml(self) -> str:
        """The whole configuration, defaults and merged clients spelt out."""
        return yaml_io.dump(dataclasses.asdict(self))

    def pruners(self) -> str:
        """The pruners that clients use, in the order of the file."""
        return ", ".join(dict.fromkeys(client.train_configs.pruner for client in self.clients))

    def over_globus(self) -> bool:
        """Whether every client has an endpoint, so that the file is meant for Globus Compute."""
        return bool(self.clients) and all(client.endpoint_id for client in self.clients)

    def participants(self) -> list[Client]:
        """The clients of the experiment; with `centralized` one that has the text of all."""
        if self.algorithm != "centralized":
            return self.clients
        from fedspallm_appfl.algorithms.centralized import POOLED

        shared = self.client_configs
        return [Client(shared.train_configs, shared.data, shared.comm_configs, client_id=POOLED)]

    def comparisons(self) -> list[str]:
        """What is made beside the global model; of the uploads of `fedspallm` only."""
        return self.evaluation.compare if self.algorithm == "fedspallm" else []

    def roster(self) -> dict[str, float]:
        """Participant's id -> resource share, in the order of the file."""
        return {client.client_id: client.train_configs.resource_share for client in self.participants()}


def keeps_weights(train: TrainConfigs) -> bool:
    """Whether a client's pruner leaves the weights that it keeps as they were."""
    from fedspallm_appfl.pruning import pruner as pruning

    return pruning.keeps_weights(train.pruner, train.refit)


def load_config(file: str | Path, overrides: Sequence[str] = ()) -> tuple[Config, list[str]]:
    """Read a YAML file.

    Args:
        file: the file.
        overrides: `key=value` with dotted keys; values are read as YAML.

    Returns:
        The configuration, and every problem of its form: unknown keys, values of the wrong type. What the values mean
        together is checked by `config_rules.check`.

    Raises:
        ConfigError: the file cannot be read as YAML, or an override has no `=`.
    """
    raw = _merge(_read(Path(file)), overrides)
    problems: list[str] = []
    raw["clients"] = _merged_clients(raw, problems)
    config = _build(Config, raw, "", problems)
    return config, _without_echoes(problems)


def _read(file: Path) -> DictConfig:
    resolver = getattr(OmegaConf, "register_resolver", None) or OmegaConf.register_new_resolver
    resolver("here", lambda path: str((file.resolve().parent / path).resolve()), replace=True)
    try:
        loaded = yaml_io.load(file.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"the configuration {file} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{file} must hold keys and values, such as `run_dir: runs/first`")
    try:
        return OmegaConf.create(loaded)
    except (OmegaConfBaseException, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read as a configuration: {first_line(error)}") from error


def _merge(loaded: DictConfig, overrides: Sequence[str]) -> dict[str, Any]:
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigError(
                f"an override is key=value, got {override!r}; e.g. client_configs.train_configs.sparsity=0.7"
            )
        try:
            OmegaConf.update(loaded, key, yaml_io.load(value), merge=True)
        except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, IndexError) as error:
            raise ConfigError(f"the override {override!r} cannot be applied: {first_line(error)}") from error
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
            problems.append(f"clients.{index}: a client is a group of keys such as client_id and data, got {client!r}")
            client = {}
        merged.append(_over(shared, client))
    return merged


def _over(shared: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A client's own values over the shared ones; a group that is named but empty changes nothing."""
    made = dict(shared)
    for key, value in own.items():
        group = isinstance(made.get(key), dict) and (value is None or isinstance(value, dict))
        made[key] = _over(made[key], value or {}) if group else value
    return made


def _without_echoes(problems: list[str]) -> list[str]:
    """What is wrong in `client_configs` shows in every client again; say it once."""
    shared = {problem.removeprefix("client_configs.") for problem in problems if problem.startswith("client_configs.")}
    return [problem for problem in problems if re.sub(r"^clients\.\d+\.", "", problem) not in shared]


def _build(kind: Any, raw: Any, path: str, problems: list[str]) -> Any:
    """Make a dataclass of a dict, collecting what is wrong instead of stopping."""
    made = kind()
    if raw is None:
        return made
    if not isinstance(raw, dict):
        problems.append(f"{path or 'the file'}: expected keys and values, got {raw!r}")
        return made
    hints = typing.get_type_hints(kind)
    for key, value in raw.items():
        where = f"{path}.{key}" if path else str(key)
        if key not in hints:
            problems.append(f"{where}: unknown key{_nearest(str(key), list(hints))}")
        else:
            setattr(made, key, _value(hints[key], value, where, problems, getattr(made, key)))
    return made


def _value(hint: Any, value: Any, where: str, problems: list[str], default: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where, problems)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        if value is None and types.NoneType in arguments:
            return None
        fits = [a for a in arguments if isinstance(value, list) == (typing.get_origin(a) is list)]
        return _value(fits[0] if fits else arguments[0], value, where, problems, default)
    if origin in (list, dict) and value is None:
        return default
    if origin is list and isinstance(value, list):
        return [_value(arguments[0], v, f"{where}.{i}", problems, "") for i, v in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {str(k): _value(arguments[1], v, f"{where}.{k}", problems, "") for k, v in value.items()}
    if hint is Any:
        return value
    if hint is str and isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is bool and isinstance(value, bool):
        return value
    name = {list: "a list", dict: "keys and values", bool: "true or false"}.get(origin or hint) or getattr(
        hint, "__name__", str(hint)
    )
    problems.append(f"{where}: expected {name}, got {value!r}")
    return default


def _nearest(key: str, valid: list[str]) -> str:
    near = difflib.get_close_matches(key, valid, n=1)
    return f"; did you mean {near[0]}?" if near else f"; valid here are {', '.join(sorted(valid))}"
