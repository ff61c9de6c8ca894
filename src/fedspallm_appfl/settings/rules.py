"""What the values of a configuration must fulfil, as far as it shows without a model: each rule with value and fix.

Choices and ranges stand with their keys in `schema`; what follows from several values together is here. Rules that ask what
an algorithm or a pruner needs are in `validation.rules`.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedspallm_appfl.errors import extra, quoted
from fedspallm_appfl.settings.plugins import ADDED
from fedspallm_appfl.settings.schema import TRACKERS, UUID, Allocation, Client, ClientConfigs, Config, Rule, Store
from fedspallm_appfl.tensors.targets import Sparsity, Targets

BUCKET = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9.-]{1,61}[a-zA-Z0-9]")
URL = re.compile(r"https?://[\w.-]+(:\d{1,5})?/?")
OWN_CLASS = re.compile(r".+\.py:[A-Za-z_]\w*")
SHARED = {  # what must be the same for every client
    "train_configs": ("sparsity", "layer_sampling", "trainer"),
    "comm_configs": ("blocks_per_message", "max_message_bytes", "compression", "store"),
}


def check(config: Config) -> list[str]:
    """Every problem that the values show by themselves and together."""
    return [*_top(config), *_values(config), *_clients(config), *_devices(config), *_globus(config)]


def _values(config: Config) -> Iterator[str]:
    """Values outside their choices or ranges; what all clients have from `client_configs` is said once."""
    shared = set(wrong_values(config.client_configs, "", config.plugins))
    for problem in wrong_values(config, "", config.plugins):
        own = re.match(r"clients\.\d+\.(.*)", problem, re.DOTALL)
        if not (own and own[1] in shared):
            yield problem


def wrong_values(settings: Any, path: str, plugins: list[str]) -> Iterator[str]:
    """Values of a group of settings that break the rule of their key.

    Args:
        settings: one of the classes of `schema`.
        path: what its keys stand in.
        plugins: where there are some, they may have added choices, which are known once they are loaded.
    """
    for one in dataclasses.fields(settings):
        value, where = getattr(settings, one.name), f"{path}{one.name}"
        if isinstance(value, list) and one.name == "clients":
            for index, client in enumerate(value):
                yield from wrong_values(client, f"{where}.{index}.", plugins)
        elif dataclasses.is_dataclass(value) and not isinstance(value, Sparsity):
            yield from wrong_values(value, f"{where}.", plugins)
        elif "rule" in one.metadata and (wrong := _broken(one.metadata["rule"], value, plugins)):
            yield f"{where}: {wrong}"


def _broken(rule: Rule, value: Any, plugins: list[str]) -> str | None:
    """What is wrong with a value, or None; an empty value is one that nobody gave."""
    if value is None:
        return None
    each = value if isinstance(value, list) else [value]
    wrong = [one for one in each if one not in rule.choices]
    if rule.choices and wrong and not (rule.extensible and (plugins or ADDED)):
        return f"one of {', '.join(rule.choices)}; got {quoted(wrong[0])}"
    if rule.form:
        form, says = rule.form
        wrong = [one for one in each if not re.fullmatch(form, str(one), re.ASCII)]
        if wrong:
            return f"{says}; got {quoted(wrong[0])}"
    return _out_of_range(rule, value)


def _out_of_range(rule: Rule, value: Any) -> str | None:
    low = rule.least is not None and not (
        value > 0 if isinstance(value, float) and not rule.least else value >= rule.least
    )
    high = rule.most is not None and not value <= rule.most
    if (low or high) and rule.range:
        return rule.range.format(value=value)
    if low:
        return f"{'at least' if rule.least or not isinstance(value, float) else 'above'} {rule.least:g}, got {value}"
    return f"at most {rule.most:.0f}, got {value}" if high else None


def _top(config: Config) -> Iterator[str]:
    if not config.run_dir:
        yield "run_dir: name a folder for the results, e.g. runs/first"
    if not config.model.path:
        yield "model.path: name the dense model, a folder saved by save_pretrained or a hub name"
    server, train = config.server_configs, config.client_configs.train_configs
    for path, name, own in (
        ("server_configs.aggregator", server.aggregator, "FedSpaLLMAggregator"),
        ("server_configs.scheduler", server.scheduler, "FedSpaLLMScheduler"),
        ("client_configs.train_configs.trainer", train.trainer, "FedSpaLLMTrainer"),
    ):
        if name != own and not OWN_CLASS.fullmatch(name):
            yield f"{path}: expected {own}, got {quoted(name)}; a subclass is named as path/to/file.py:ClassName"
    if config.evaluation.compare and not config.evaluation.texts:
        yield "evaluation.compare: there is nothing to compare on; name some held-out text in evaluation.texts"
    yield from _tracking(config)
    yield from _allocation(config)
    if config.gram.target == "dense" and config.gram.propagate != "pruned":
        yield "gram.target: dense outputs are a target in a sweep; set gram.propagate to pruned, or gram.target to own"
    if config.gram.stride and config.gram.propagate != "pruned":
        yield "gram.stride: one pass of the dense model has no parts; set gram.propagate to pruned, or gram.stride to 0"
    if config.gram.stride and config.gram.target == "dense":
        yield "gram.target: dense outputs are matched input by input; set gram.stride to 0, or gram.target to own"


def _tracking(config: Config) -> Iterator[str]:
    """Trackers whose library is not here; names that there are not are told of with the values."""
    for name in config.tracking:
        missing = [module for module in TRACKERS.get(name, ()) if find_spec(module) is None]
        if missing:
            yield f"tracking: {name} needs {' and '.join(missing)}; leave it out, or {extra(name)}"
    if len(set(config.tracking)) < len(config.tracking):
        yield f"tracking: each tracker can be named once, got {', '.join(config.tracking)}"


def _allocation(config: Config) -> Iterator[str]:
    asked, sparsity = config.allocation, config.client_configs.train_configs.sparsity
    if not asked.asked and asked != Allocation():
        yield "allocation: its other keys do nothing with method uniform; set allocation.method to fisher"
    if asked.asked and isinstance(sparsity, Targets):
        where = "client_configs.train_configs.sparsity"
        yield (
            f"{where}: allocation chooses the target of each matrix, so one share for all; got {shown(sparsity)}. "
            "allocation.method=uniform keeps targets that were chosen before"
        )


def _clients(config: Config) -> Iterator[str]:
    if not config.clients:
        yield "clients: the list is empty; name at least one client with a client_id and data.text"
        return
    ids = [client.client_id for client in config.clients]
    if config.server_configs.num_clients not in (None, len(ids)):
        yield (
            f"server_configs.num_clients is {config.server_configs.num_clients}, `clients` lists {len(ids)}; "
            "make them equal"
        )
    for client_id, times in Counter(ids).items():
        if times > 1 and client_id:
            yield f"clients: client_id {quoted(client_id)} is used {times} times; ids must differ"
    for index, client in enumerate(config.clients):
        yield from _must_be_shared(f"clients.{index}", client, config)


def _devices(config: Config) -> Iterator[str]:
    """What several devices of one client do not go with; each problem is said once, of the first that has it."""
    said: set[str] = set()
    groups = {"client_configs": config.client_configs}
    for path, one in (groups | {f"clients.{index}": client for index, client in enumerate(config.clients)}).items():
        for problem in _wrong_devices(one, config.workers):
            if problem not in said:
                yield f"{path}.train_configs.devices: {problem}"
            said.add(problem)


def _wrong_devices(client: ClientConfigs, workers: str) -> Iterator[str]:
    train = client.train_configs
    asked, kinds = train.devices, set(train.devices)
    if kinds != {"cpu"} and ("cpu" in kinds or len(kinds) < len(asked)):  # several times the CPU is for tests
        yield f"each GPU once, and no CPU beside them; got {', '.join(asked)}"
    if asked and train.device != "auto":
        yield (
            f"these take the place of train_configs.device, got {train.device} there; leave one of both out, and where "
            "one client differs from the others, set devices to [] for it"
        )
    takes_text = isinstance(client, Client) and client.data.text and client.data.batch > 0
    if len(asked) > 1 and takes_text and len(asked) > -(-client.data.windows // client.data.batch):
        yield (
            f"each needs a batch, got {len(asked)} and {client.data.windows} windows in batches of {client.data.batch}; "
            "lower data.batch, or name fewer"
        )
    if len(asked) > 1 and workers not in ("auto", "1"):
        yield f"a client with several has them to itself, got workers: {workers}; set workers to 1"


def _must_be_shared(path: str, client: Client, config: Config) -> Iterator[str]:
    for group, names in SHARED.items():
        for name in names:
            own, common = getattr(getattr(client, group), name), getattr(getattr(config.client_configs, group), name)
            if own != common:
                yield f"{path}.{group}.{name}: the same for every client, got {shown(own)} beside {shown(common)}"


def shown(value: Any) -> str:
    """A value as messages show it."""
    return repr(str(value) if isinstance(value, Sparsity) else value)


def _globus(config: Config) -> Iterator[str]:
    """What only a run over Globus Compute looks at."""
    server, store = config.server_configs, config.client_configs.comm_configs.store
    if server.min_clients is not None and server.min_clients > len(config.clients):
        yield f"server_configs.min_clients: at most {len(config.clients)}, got {server.min_clients}"
    functions = vars(server.functions)
    if any(functions.values()) and not all(named and re.fullmatch(UUID, named) for named in functions.values()):
        yield f"server_configs.functions: the two UUIDs that fedspallm functions shows, got {functions}"
    yield from _store("client_configs.comm_configs.store", store)


def _store(where: str, store: Store) -> Iterator[str]:
    if store.connector == "file" and not Path(store.folder or "").expanduser().is_absolute():
        found = quoted(store.folder)
        yield f"{where}.folder: name a folder that the server and every client mount, from the root; got {found}"
    if store.connector == "s3":
        if not BUCKET.fullmatch(store.bucket or ""):
            yield f"{where}.bucket: name an S3 bucket (3 to 63 letters, digits, '-', '.'), got {quoted(store.bucket)}"
        if store.url and not URL.fullmatch(store.url):
            yield f"{where}.url: http:// or https:// and the host of the service, without a password or a path"
    if store.connector == "endpoint":
        wrong = [endpoint for endpoint in store.endpoints if not re.fullmatch(UUID, endpoint)]
        if wrong or not store.endpoints:
            yield (
                f"{where}.endpoints: the UUIDs that proxystore-endpoint list shows on the server, first, and at each site; "
                f"got {quoted(wrong or store.endpoints)}"
            )
