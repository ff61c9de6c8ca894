"""What the values of a configuration must fulfil together, each rule with the values received and the fix.

`check` looks at values only. `check_with_files` opens model and text as well, which is still far cheaper than a run: the
model is built without weights.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedspallm_appfl.aggregation.layer_sampling import STRATEGIES, draw, expected_uncovered, to_text
from fedspallm_appfl.aggregation.mask_expansion import GROUPS
from fedspallm_appfl.algorithms.exchange import Groups
from fedspallm_appfl.algorithms.gram import FIRST_INPUTS, PROPAGATE, TARGETS, GramSettings
from fedspallm_appfl.algorithms.registry import ALGORITHMS, COMPARISONS, LABELS, exchanges
from fedspallm_appfl.devices import is_device
from fedspallm_appfl.errors import ConfigError, DataError, FedSpaLLMError
from fedspallm_appfl.globus.store.data_store import CONNECTORS
from fedspallm_appfl.models.activations import ACTIVATIONS
from fedspallm_appfl.models.dtypes import DTYPES
from fedspallm_appfl.models.layout import Linear, left_dense
from fedspallm_appfl.models.perplexity import held_out_windows
from fedspallm_appfl.models.text import check_vocabulary, cut_windows, load_tokenizer, read_text, too_few
from fedspallm_appfl.pruning.pruner import PRUNERS
from fedspallm_appfl.rounds.server import FOLDS, WEIGHTS
from fedspallm_appfl.settings.schema import Client, Config, Gram, Paths, Store, keeps_weights
from fedspallm_appfl.tensors.sparsity import Target, check_divides, parse_target
from fedspallm_appfl.wire.compression import COMPRESSIONS
from fedspallm_appfl.wire.grams import PRECISIONS
from fedspallm_appfl.wire.messages import MESSAGE_LIMIT, plan
from fedspallm_appfl.wire.packed import Shapes, packed_sizes

if TYPE_CHECKING:
    from fedspallm_appfl.models.lazy_model import Skeleton

MOST_DAMPING = 100.0
BUCKET = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9.-]{1,61}[a-zA-Z0-9]")
URL = re.compile(r"https?://[\w.-]+(:\d{1,5})?/?")
UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
IN_A_FILE = re.compile(r".+\.py:[A-Za-z_]\w*")  # a class of the user's
MOST = 10**9  # nobody means more, and what is not a machine integer fails far from here


def check(config: Config) -> list[str]:
    """Every problem that the values alone show."""
    return [
        *_top(config),
        *_clients(config),
        *_choices(config),
        *_numbers(config),
        *_comparisons(config),
        *_algorithm(config),
        *_globus(config),
    ]


def _top(config: Config) -> Iterator[str]:
    if not config.run_dir:
        yield "run_dir: name a folder for the results, e.g. runs/first"
    if not config.model.path:
        yield "model.path: name the dense model, a folder saved by save_pretrained or a hub name"
    server = config.server_configs
    for path, value, expected in (
        ("server_configs.aggregator", server.aggregator, "FedSpaLLMAggregator"),
        ("server_configs.scheduler", server.scheduler, "FedSpaLLMScheduler"),
        ("client_configs.train_configs.trainer", config.client_configs.train_configs.trainer, "FedSpaLLMTrainer"),
    ):
        if value != expected and not IN_A_FILE.fullmatch(value):
            yield f"{path}: expected {expected}, got {value!r}; a subclass is named as path/to/file.py:ClassName"


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
            yield f"clients: client_id {client_id!r} is used {times} times; ids must differ"
    yield from _said_once([list(_client_numbers("", client)) for client in config.clients])
    for index, client in enumerate(config.clients):
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,99}", client.client_id, re.ASCII):  # it names a folder too
            yield f"clients.{index}.client_id: one or more letters, digits, '-', '_', '.'; got {client.client_id!r}"
        if client.train_configs.pruner != "magnitude" and not client.data.text and not client.endpoint_id:
            yield f"clients.{index}.data.text: client {client.client_id!r} has no private text; name a file or a folder"
        yield from _must_be_shared(f"clients.{index}", client, config)


def _said_once(by_client: list[list[str]]) -> Iterator[str]:
    """What is wrong for every client is wrong in `client_configs`."""
    everywhere = [problem for problem in by_client[0] if all(problem in found for found in by_client)]
    common = everywhere if len(by_client) > 1 else []
    yield from (f"client_configs{problem}" for problem in common)
    for index, found in enumerate(by_client):
        yield from (f"clients.{index}{problem}" for problem in found if problem not in common)


def _must_be_shared(path: str, client: Client, config: Config) -> Iterator[str]:
    for group, names in (
        ("train_configs", ("sparsity", "layer_sampling", "trainer")),
        ("comm_configs", ("blocks_per_message", "max_message_bytes", "compression", "store")),
    ):
        for name in names:
            own, common = getattr(getattr(client, group), name), getattr(getattr(config.client_configs, group), name)
            if own != common:
                yield f"{path}.{group}.{name}: the same for every client, got {own!r} beside {common!r}"


def _client_numbers(path: str, client: Client) -> Iterator[str]:
    train, data = client.train_configs, client.data
    if not 0 < train.resource_share <= 1:
        yield f"{path}.train_configs.resource_share: a share in (0, 1], got {train.resource_share}"
    if train.pruner not in PRUNERS:
        yield f"{path}.train_configs.pruner: one of {', '.join(PRUNERS)}; got {train.pruner!r}"
    if not 0 < train.damping <= MOST_DAMPING:
        yield f"{path}.train_configs.damping: greater than 0, at most {MOST_DAMPING:g}, got {train.damping}"
    yield from _between(f"{path}.train_configs.damping_retries", train.damping_retries, 0, 100)
    yield from _between(f"{path}.train_configs.iterations", train.iterations, 1)
    if train.threads is not None and train.threads < 1:
        yield f"{path}.train_configs.threads: at least 1, or null to leave it to torch; got {train.threads}"
    yield from _device(f"{path}.train_configs.device", train.device)
    for name, least in (("windows", 1), ("length", 2), ("batch", 1)):
        yield from _between(f"{path}.data.{name}", getattr(data, name), least)
    if data.activations not in ACTIVATIONS:
        yield f"{path}.data.activations: one of {', '.join(ACTIVATIONS)}; got {data.activations!r}"


def _device(path: str, device: str) -> Iterator[str]:
    if not is_device(device):
        yield f"{path}: auto, cpu, cuda or cuda:N; got {device!r}"


def _choices(config: Config) -> Iterator[str]:
    kwargs, train = config.server_configs.aggregator_kwargs, config.client_configs.train_configs
    for path, value, valid in (
        ("algorithm", config.algorithm, ALGORITHMS),
        ("gram.precision", config.gram.precision, tuple(PRECISIONS)),
        ("gram.propagate", config.gram.propagate, PROPAGATE),
        ("gram.target", config.gram.target, TARGETS),
        ("gram.first_input", config.gram.first_input, FIRST_INPUTS),
        ("model.dtype", config.model.dtype, ("auto", *DTYPES)),
        ("server_configs.aggregator_kwargs.weights", kwargs.weights, WEIGHTS),
        ("server_configs.aggregator_kwargs.fold", kwargs.fold, FOLDS),
        ("server_configs.aggregator_kwargs.expansion", kwargs.expansion, GROUPS),
        ("client_configs.train_configs.layer_sampling", train.layer_sampling, STRATEGIES),
        ("client_configs.comm_configs.compression", config.client_configs.comm_configs.compression, COMPRESSIONS),
    ):
        if value not in valid:
            yield f"{path}: one of {', '.join(valid)}; got {value!r}"
    try:
        parse_target(train.sparsity)
    except ValueError as error:
        yield f"client_configs.train_configs.sparsity: {error}"


def _numbers(config: Config) -> Iterator[str]:
    server, comm, evaluation = config.server_configs, config.client_configs.comm_configs, config.evaluation
    for path, value, least in (
        ("gram.min_tokens", 1 if config.gram.min_tokens is None else config.gram.min_tokens, 1),
        ("server_configs.num_global_epochs", server.num_global_epochs, 1),
        ("server_configs.scheduler_kwargs.max_open_blocks", server.scheduler_kwargs.max_open_blocks, 1),
        ("client_configs.comm_configs.blocks_per_message", comm.blocks_per_message, 1),
        ("client_configs.comm_configs.max_message_bytes", comm.max_message_bytes, 1024),
        ("evaluation.length", evaluation.length, 2),
        ("evaluation.windows", 1 if evaluation.windows is None else evaluation.windows, 1),
        ("evaluation.batch", evaluation.batch, 1),
        ("seed", config.seed, 0),
    ):
        yield from _between(path, value, least, MESSAGE_LIMIT if path.endswith("bytes") else MOST)
    yield from _device("server_configs.device", server.device)
    yield from _device("evaluation.device", evaluation.device)


def _between(path: str, value: int, least: int, most: int = MOST) -> Iterator[str]:
    if value < least:
        yield f"{path}: at least {least}, got {value}"
    if value > most:
        why = ", a little below where MPI ends" if most == MESSAGE_LIMIT else ""
        yield f"{path}: at most {most}{why}, got {value}"


def _comparisons(config: Config) -> Iterator[str]:
    compare = config.evaluation.compare
    for name in compare:
        if name not in COMPARISONS:
            yield f"evaluation.compare: of {', '.join(COMPARISONS)} (dense is always there); got {name!r}"
    if compare and not config.evaluation.texts:
        yield "evaluation.compare: there is nothing to compare on; name some held-out text in evaluation.texts"
    partial = [client.client_id for client in config.clients if client.train_configs.resource_share < 1]
    if "standalone" in config.comparisons() and (partial or config.server_configs.num_global_epochs > 1):
        yield (
            "evaluation.compare: standalone needs every client to prune every block in one round, here are "
            f"{config.server_configs.num_global_epochs} rounds and resource shares below 1 of {partial or 'no client'}; "
            "measure it in a run of its own with resource_share 1 and one round"
        )


def _algorithm(config: Config) -> Iterator[str]:
    """What does not go with the algorithm."""
    name, gram = config.algorithm, config.gram
    if gram != Gram() and name != "gram":
        yield f"gram: its keys are for algorithm gram, got algorithm {name}"
    if gram.target == "dense" and gram.propagate != "pruned":
        yield "gram.target: dense outputs are a target in a sweep; set gram.propagate to pruned, or gram.target to own"
    if name in ("gram", "centralized"):
        yield from _one_pruner(config)
    yield from _without_effect(config)
    if name == "consensus" and any(keeps_weights(client.train_configs) for client in config.clients):
        yield (
            "client_configs.train_configs.pruner: with wanda or magnitude no weight changes, so consensus is fedprllm; "
            "choose that, another pruner, or refit for wanda"
        )
    if name in ("standalone", "centralized"):
        yield from _whole_model_once(config)
    yield from _refits(config)


def _without_effect(config: Config) -> Iterator[str]:
    """What would be silently ignored."""
    name, kwargs = config.algorithm, config.server_configs.aggregator_kwargs
    path = "server_configs.aggregator_kwargs"
    if kwargs.weights != "equal" and name not in ("fedspallm", "fedavg", "consensus"):
        yield f"{path}.weights: nothing is averaged over clients with {name}; leave it at equal"
    if kwargs.expansion != "matrix" and name not in ("fedspallm", "fedprllm", "consensus"):
        yield f"{path}.expansion: no mask is expanded with {name}; leave it at matrix"
    if kwargs.fold != "latest" and config.gram.propagate == "pruned":
        yield f"{path}.fold: statistics of a sweep hold for one pruned model and cannot be added up; leave it at latest"
    if kwargs.fold != "latest" and name == "consensus":
        yield f"{path}.fold: values of a round belong to its masks, so consensus adds up nothing; leave it at latest"
    lengths = sorted({client.data.length for client in config.clients})
    if name == "centralized" and lengths != [config.client_configs.data.length]:
        yield f"client_configs.data.length: centralized puts all windows together, so one length for all; got {lengths}"


def _refits(config: Config) -> Iterator[str]:
    """Least squares that would be lost or are done anyway."""
    why = {"magnitude": "magnitude knows no inputs", "admm": "admm always fits what it keeps"}
    for train in {str(client.train_configs): client.train_configs for client in config.clients}.values():
        if train.refit and (train.pruner in why or config.algorithm == "fedprllm"):
            reason = why.get(train.pruner, "with fedprllm masks alone travel, and weights stay dense")
            yield f"client_configs.train_configs.refit: {reason}; leave it at false"


def _one_pruner(config: Config) -> Iterator[str]:
    """The server, or the one that has all text, prunes for all."""
    shared = config.client_configs.train_configs
    for index, client in enumerate(config.clients):
        for key in ("pruner", "damping", "damping_retries", "iterations", "refit", "threads"):
            own, common = getattr(client.train_configs, key), getattr(shared, key)
            if own != common:
                yield (
                    f"clients.{index}.train_configs.{key}: {config.algorithm} prunes in one place, so the same for all; "
                    f"got {own!r} beside {common!r}"
                )
    if config.algorithm == "gram" and shared.pruner == "magnitude":
        yield "client_configs.train_configs.pruner: magnitude needs no statistics; choose another pruner for gram"


def _whole_model_once(config: Config) -> Iterator[str]:
    rounds = config.server_configs.num_global_epochs
    partial = [client.client_id for client in config.clients if client.train_configs.resource_share < 1]
    if rounds > 1 or partial:
        yield (
            f"algorithm: {config.algorithm} prunes every block once; set server_configs.num_global_epochs to 1 and "
            f"resource_share to 1, got {rounds} rounds and shares below 1 of {partial or 'no client'}"
        )


def _globus(config: Config) -> Iterator[str]:
    """What only a run over Globus Compute looks at."""
    server, store = config.server_configs, config.client_configs.comm_configs.store
    if server.min_clients is not None:
        yield from _between("server_configs.min_clients", server.min_clients, 1, len(config.clients))
    for name in ("round_deadline", "preflight_deadline"):
        seconds = getattr(server, name)
        if seconds is not None and not 0 < seconds <= MOST:
            yield f"server_configs.{name}: seconds, greater than 0 and at most {MOST}, got {seconds:g}"
    functions = vars(server.functions)
    if any(functions.values()) and not all(named and UUID.fullmatch(named) for named in functions.values()):
        yield f"server_configs.functions: the two UUIDs that fedspallm functions shows, got {functions}"
    for index, client in enumerate(config.clients):
        if client.endpoint_id and not UUID.fullmatch(client.endpoint_id):
            where = f"clients.{index}.endpoint_id"
            yield f"{where}: the UUID that globus-compute-endpoint list shows, got {client.endpoint_id!r}"
    yield from _store("client_configs.comm_configs.store", store)


def _store(where: str, store: Store) -> Iterator[str]:
    if store.connector not in CONNECTORS:
        yield f"{where}.connector: one of {', '.join(CONNECTORS)}; got {store.connector!r}"
    if store.connector == "file" and not Path(store.folder or "").expanduser().is_absolute():
        yield f"{where}.folder: name a folder that the server and every client mount, from the root; got {store.folder!r}"
    if store.connector == "redis":
        yield from _between(f"{where}.port", store.port, 1, 65535)
    if store.connector == "s3":
        if not BUCKET.fullmatch(store.bucket or ""):
            yield f"{where}.bucket: name an S3 bucket (3 to 63 letters, digits, '-', '.'), got {store.bucket!r}"
        if store.url and not URL.fullmatch(store.url):
            yield f"{where}.url: http:// or https:// and the host of the service, without a password or a path"
    if store.connector == "endpoint":
        wrong = [endpoint for endpoint in store.endpoints if not UUID.fullmatch(endpoint)]
        if wrong or not store.endpoints:
            yield (
                f"{where}.endpoints: the UUIDs that proxystore-endpoint list shows on the server, first, and at each site; "
                f"got {wrong or store.endpoints!r}"
            )


def check_with_files(config: Config) -> list[str]:
    """Every problem that shows once model and text are opened; says what it can where values are wrong too."""
    from fedspallm_appfl.models.lazy_model import Skeleton

    problems: list[str] = []
    skeleton = tokenizer = None
    try:
        if config.model.path and config.model.dtype in ("auto", *DTYPES):
            skeleton = Skeleton(config.model.path, config.model.blocks, config.model.dtype)
            tokenizer = load_tokenizer(skeleton.folder)
    except FedSpaLLMError as error:
        problems.append(f"model: {error}")
    if skeleton is not None:
        problems += _sizes(config, skeleton)
    longest = getattr(skeleton.model.config, "max_position_embeddings", None) if skeleton else None
    for client in config.clients:
        where, data, text = f"client {client.client_id}", client.data, client.data.text
        if not text:
            continue
        found = _count_windows(where, text, data.length, tokenizer, skeleton, problems)
        if found is not None and found < data.windows:
            problems.append(too_few(client.client_id, data.windows, data.length, found))
        problems += too_long(f"{where}: data.length", data.length, longest)
    length = config.evaluation.length
    for name, text in config.evaluation.texts.items():
        try:
            known = (tokenizer, skeleton.vocabulary) if skeleton is not None and length > 0 else ()
            held_out_windows(name, text, length, *known)
        except DataError as error:
            problems.append(str(error))
    if config.evaluation.texts:
        problems += too_long("evaluation.length", length, longest)
    return problems


def _count_windows(
    where: str, text: Paths, length: int, tokenizer: Any, skeleton: "Skeleton | None", problems: list[str]
) -> int | None:
    """Windows in a text; None if it cannot be read or counted."""
    try:
        words = read_text(text)
        if tokenizer is None or skeleton is None or length < 1:
            return None
        windows = cut_windows(tokenizer, words, length)
        check_vocabulary(windows, skeleton.vocabulary, where)
    except DataError as error:
        problems.append(f"{where}: {error}")
        return None
    return len(windows)


def forecast(config: Config) -> list[str]:
    """What a run will prune, in words."""
    from fedspallm_appfl.models.lazy_model import Skeleton

    skeleton = Skeleton(config.model.path, config.model.blocks, config.model.dtype)
    blocks = skeleton.layout.blocks
    entries = sum(linear.shape[0] * linear.shape[1] for block in blocks for linear in block)
    names = ", ".join(linear.name for linear in blocks[0])
    lines = [
        headline(config),
        *_notices(config),
        f"prunes {sum(map(len, blocks))} matrices with {entries:,} weights in {len(blocks)} blocks: {names}",
    ]
    dense = left_dense(skeleton.model, skeleton.layout)
    if dense:
        lines.append(f"leaves dense inside the blocks: {', '.join(dense)}")
    missed = uncovered(config, len(blocks))
    if missed:
        lines.append(
            f"leaves dense what no client draws in {rounds_text(config)}: block {to_text(missed)}; "
            "raise resource_share or num_global_epochs to reach them"
        )
    if config.client_configs.train_configs.layer_sampling == "uniform":
        expected = expected_uncovered(config.roster(), len(blocks))
        lines.append(f"uniform sampling leaves {expected:.2f} blocks a round to nobody, in expectation")
    return lines


def _notices(config: Config) -> Iterator[str]:
    """What the algorithm means for the rest of the configuration."""
    if config.evaluation.compare and not config.comparisons():
        yield f"evaluation.compare is left out: {', '.join(config.evaluation.compare)} are made of uploads of fedspallm"
    if config.algorithm == "gram":
        gram = config.gram
        yield f"clients send Gram matrices in {gram.precision}, of inputs of the {gram.propagate} model"
        if gram.first_input == "private":
            yield "gram.first_input is private: the server can tell how often each token occurs in a client's text"


def headline(config: Config) -> str:
    """Who prunes how, in a line."""
    sparsity = config.client_configs.train_configs.sparsity
    how = f"{LABELS[config.algorithm]} with {config.pruners()}"
    clients = f"{len(config.clients)} client{'s' * (len(config.clients) != 1)}"
    return f"{clients}, {rounds_text(config)}, {how}, sparsity {sparsity}"


def rounds_text(config: Config) -> str:
    """The number of rounds in words."""
    rounds = config.server_configs.num_global_epochs
    return f"{rounds} round{'s' * (rounds > 1)}"


def draws(config: Config, blocks: int) -> list[dict[str, list[int]]]:
    """The blocks of each client in each round."""
    rounds, strategy = config.server_configs.num_global_epochs, config.client_configs.train_configs.layer_sampling
    return [draw(strategy, config.seed, index, rounds, config.roster(), blocks) for index in range(rounds)]


def uncovered(config: Config, blocks: int) -> list[int]:
    """Blocks that no client prunes in any round, with the layers that the run will draw."""
    drawn = {block for assigned in draws(config, blocks) for mine in assigned.values() for block in mine}
    return sorted(set(range(blocks)) - drawn)


def _sizes(config: Config, skeleton: "Skeleton") -> Iterator[str]:
    """What does not go with the shapes of the model."""
    layout, comm = skeleton.layout, config.client_configs.comm_configs
    try:
        target = parse_target(config.client_configs.train_configs.sparsity)
    except ValueError:  # `check` says so
        return
    if config.algorithm == "gram":
        yield from _too_few_tokens(config, max(linear.shape[1] for block in layout.blocks for linear in block))
    yield from indivisible(layout.blocks, target)
    if config.algorithm not in ALGORITHMS or config.gram.precision not in PRECISIONS:
        return
    shapes = {block: layout.shapes(block) for block in range(len(layout.blocks))}
    alone = tuple(tuple((linear.name,) for linear in linears) for linears in layout.blocks)
    try:  # that some share an input does not change which statistics are the largest
        for table in travelling(config, shapes, skeleton.stored_dtype, alone):
            plan(table, max(1, comm.blocks_per_message), comm.max_message_bytes)
    except ConfigError as error:
        yield f"client_configs.comm_configs.max_message_bytes: {error}"


def travelling(
    config: Config, shapes: Mapping[int, Shapes], dtype: torch.dtype, groups: Groups
) -> Iterator[dict[int, dict[str, int]]]:
    """Bytes of what travels in a round, by block and linear or input: up and then down, an exchange after the other.

    With values whatever the pruner, as messages are planned so, and nothing after the last exchange of all.

    Args:
        config: the experiment.
        shapes: for each block (O, I) of each linear.
        dtype: dtype of the checkpoint.
        groups: linears that share an input.
    """
    from fedspallm_appfl.rounds.uploads import sizes

    target = parse_target(config.client_configs.train_configs.sparsity)
    made = exchanges(config.algorithm, groups, config.gram.propagate)
    answered = len(made) - (config.server_configs.num_global_epochs == 1)
    for number, exchange in enumerate(made):
        yield sizes(exchange, shapes, target, dtype, groups, GramSettings(**dataclasses.asdict(config.gram)))
        if exchange.down is not None and number < answered:
            yield {
                block: packed_sizes(shapes[block], target, dtype, exchange.down)
                for block in shapes
                if exchange.concerns(block)
            }


def _too_few_tokens(config: Config, widest: int) -> Iterator[str]:
    """Clients that will refuse to send statistics."""
    least = GramSettings(min_tokens=config.gram.min_tokens).least(widest)
    for client in config.clients:
        tokens = client.data.windows * client.data.length
        if tokens < least:
            yield (
                f"client {client.client_id}: {client.data.windows} windows of {client.data.length} are {tokens} tokens, "
                f"but statistics of fewer than {least} are not sent; give more windows, or lower gram.min_tokens"
            )


def indivisible(blocks: tuple[tuple[Linear, ...], ...], target: Target) -> Iterator[str]:
    """The linears whose rows a pattern n:m does not fit."""
    found = {(linear.name, check_divides(target, linear.shape[1])): None for block in blocks for linear in block}
    yield from (f"client_configs.train_configs.sparsity: {name}: {problem}" for name, problem in found if problem)


def too_long(what: str, length: int, longest: int | None) -> list[str]:
    """What is wrong with windows of a length for a model that takes `longest` tokens, if it has a limit."""
    if longest is None or length <= longest:
        return []
    return [f"{what}: the model takes at most {longest} tokens (max_position_embeddings), got {length}"]
