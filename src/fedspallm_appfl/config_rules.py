"""What the values of a configuration must fulfil together, each rule with the values received and the fix.

`check` looks at values only. `check_with_files` opens model and text as well, which is still far cheaper than a run: the
model is built without weights.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from fedspallm_appfl.blocks import left_dense
from fedspallm_appfl.calibration import check_vocabulary, cut_windows, load_tokenizer, read_text
from fedspallm_appfl.config import Client, Config
from fedspallm_appfl.devices import is_device
from fedspallm_appfl.dtypes import DTYPES
from fedspallm_appfl.errors import DataError, FedSpaLLMError
from fedspallm_appfl.global_model import COMPARISONS, FOLDS, WEIGHTS
from fedspallm_appfl.layer_sampling import STRATEGIES, expected_uncovered
from fedspallm_appfl.mask_expansion import GROUPS
from fedspallm_appfl.pruning import PRUNERS
from fedspallm_appfl.sparsity import Target, check_divides, parse_target

MPI_LIMIT = 2**31 - 1


def check(config: Config) -> list[str]:
    """Every problem that the values alone show."""
    return [*_top(config), *_clients(config), *_choices(config), *_numbers(config), *_comparisons(config)]


def _top(config: Config) -> Iterator[str]:
    if not config.run_dir:
        yield "run_dir: name a folder for the results, e.g. runs/first"
    if not config.model.path:
        yield "model.path: name the dense model, a folder saved by save_pretrained or a hub name"
    for name in ("aggregator", "scheduler"):
        expected = f"FedSpaLLM{name.capitalize()}"
        if getattr(config.server_configs, name) != expected:
            yield f"server_configs.{name}: expected {expected}, got {getattr(config.server_configs, name)!r}"
    trainer = config.client_configs.train_configs.trainer
    if trainer != "FedSpaLLMTrainer":
        yield f"client_configs.train_configs.trainer: expected FedSpaLLMTrainer, got {trainer!r}"


def _clients(config: Config) -> Iterator[str]:
    if not config.clients:
        yield "clients: the list is empty; name at least one client with a client_id and data.text"
        return
    ids = [client.client_id for client in config.clients]
    if config.server_configs.num_clients != len(ids):
        yield (
            f"server_configs.num_clients is {config.server_configs.num_clients}, `clients` lists {len(ids)}; "
            "make them equal"
        )
    for client_id, times in Counter(ids).items():
        if times > 1 and client_id:
            yield f"clients: client_id {client_id!r} is used {times} times; ids must differ"
    for index, client in enumerate(config.clients):
        if not client.client_id or not all(c.isalnum() or c in "-_." for c in client.client_id):
            yield f"clients.{index}.client_id: one or more letters, digits, '-', '_', '.'; got {client.client_id!r}"
        if client.train_configs.pruner != "magnitude" and not client.data.text:
            yield f"clients.{index}.data.text: client {client.client_id!r} has no private text; name a file or a folder"
        yield from _client_numbers(f"clients.{index}", client)
        yield from _must_be_shared(f"clients.{index}", client, config)


def _must_be_shared(path: str, client: Client, config: Config) -> Iterator[str]:
    for group, names in (
        ("train_configs", ("sparsity", "layer_sampling", "trainer")),
        ("comm_configs", ("blocks_per_message", "max_message_bytes")),
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
    if not 0 < train.damping < float("inf"):
        yield f"{path}.train_configs.damping: greater than 0, got {train.damping}"
    if train.damping_retries < 0:
        yield f"{path}.train_configs.damping_retries: at least 0, got {train.damping_retries}"
    if train.threads is not None and train.threads < 1:
        yield f"{path}.train_configs.threads: at least 1, or null to leave it to torch; got {train.threads}"
    yield from _device(f"{path}.train_configs.device", train.device)
    for name, least in (("windows", 1), ("length", 2), ("batch", 1)):
        if getattr(data, name) < least:
            yield f"{path}.data.{name}: at least {least}, got {getattr(data, name)}"


def _device(path: str, device: str) -> Iterator[str]:
    if not is_device(device):
        yield f"{path}: auto, cpu, cuda or cuda:N; got {device!r}"


def _choices(config: Config) -> Iterator[str]:
    kwargs, train = config.server_configs.aggregator_kwargs, config.client_configs.train_configs
    for path, value, valid in (
        ("model.dtype", config.model.dtype, ("auto", *DTYPES)),
        ("server_configs.aggregator_kwargs.weights", kwargs.weights, WEIGHTS),
        ("server_configs.aggregator_kwargs.fold", kwargs.fold, FOLDS),
        ("server_configs.aggregator_kwargs.expansion", kwargs.expansion, GROUPS),
        ("client_configs.train_configs.layer_sampling", train.layer_sampling, STRATEGIES),
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
        ("server_configs.num_global_epochs", server.num_global_epochs, 1),
        ("server_configs.scheduler_kwargs.max_open_blocks", server.scheduler_kwargs.max_open_blocks, 1),
        ("client_configs.comm_configs.blocks_per_message", comm.blocks_per_message, 1),
        ("client_configs.comm_configs.max_message_bytes", comm.max_message_bytes, 1024),
        ("evaluation.length", evaluation.length, 2),
        ("evaluation.windows", 1 if evaluation.windows is None else evaluation.windows, 1),
        ("evaluation.batch", evaluation.batch, 1),
        ("seed", config.seed, 0),
    ):
        if value < least:
            yield f"{path}: at least {least}, got {value}"
    yield from _device("server_configs.device", server.device)
    yield from _device("evaluation.device", evaluation.device)
    if comm.max_message_bytes > MPI_LIMIT:
        path = "client_configs.comm_configs.max_message_bytes"
        yield f"{path}: at most {MPI_LIMIT}, where MPI ends; got {comm.max_message_bytes}"


def _comparisons(config: Config) -> Iterator[str]:
    compare = config.evaluation.compare
    for name in compare:
        if name not in COMPARISONS:
            yield f"evaluation.compare: of {', '.join(COMPARISONS)} (dense is always there); got {name!r}"
    if compare and not config.evaluation.texts:
        yield "evaluation.compare: there is nothing to compare on; name some held-out text in evaluation.texts"
    partial = [client.client_id for client in config.clients if client.train_configs.resource_share < 1]
    if "standalone" in compare and (partial or config.server_configs.num_global_epochs > 1):
        yield (
            "evaluation.compare: standalone needs every client to prune every block in one round, here are "
            f"{config.server_configs.num_global_epochs} rounds and resource shares below 1 of {partial or 'no client'}; "
            "measure it in a run of its own with resource_share 1 and one round"
        )


def check_with_files(config: Config) -> list[str]:
    """Every problem that shows once model and text are opened; call it when `check` found none."""
    from fedspallm_appfl.lazy_model import Skeleton

    try:
        skeleton = Skeleton(config.model.path, config.model.blocks, config.model.dtype)
        tokenizer = load_tokenizer(skeleton.folder)
    except FedSpaLLMError as error:
        return [f"model: {error}"]
    target = parse_target(config.client_configs.train_configs.sparsity)
    vocabulary = skeleton.vocabulary
    longest = getattr(skeleton.model.config, "max_position_embeddings", None)
    problems = list(_indivisible(skeleton.layout.blocks[0], target))
    for client in config.clients:
        try:
            if not client.data.text:  # magnitude needs none
                continue
            windows = cut_windows(tokenizer, read_text(client.data.text), client.data.length)
            check_vocabulary(windows, vocabulary, f"client {client.client_id}")
        except DataError as error:
            problems.append(f"client {client.client_id}: {error}")
            continue
        if len(windows) < client.data.windows:
            problems.append(
                f"client {client.client_id}: {client.data.windows} calibration windows of {client.data.length} tokens "
                f"were asked for, its text has {len(windows)}; give more text, or lower data.windows or data.length"
            )
        problems += _too_long(f"client {client.client_id}: data.length", client.data.length, longest)
    for name, text in config.evaluation.texts.items():
        try:
            if not len(cut_windows(tokenizer, read_text(text), config.evaluation.length)):
                problems.append(
                    f"evaluation.texts.{name}: shorter than one window of {config.evaluation.length} tokens"
                )
        except DataError as error:
            problems.append(f"evaluation.texts.{name}: {error}")
    if config.evaluation.texts:
        problems += _too_long("evaluation.length", config.evaluation.length, longest)
    return problems


def forecast(config: Config) -> list[str]:
    """What a run will prune, in words."""
    from fedspallm_appfl.lazy_model import Skeleton

    skeleton = Skeleton(config.model.path, config.model.blocks, config.model.dtype)
    blocks = skeleton.layout.blocks
    entries = sum(linear.shape[0] * linear.shape[1] for block in blocks for linear in block)
    names = ", ".join(linear.name for linear in blocks[0])
    train, rounds = config.client_configs.train_configs, config.server_configs.num_global_epochs
    lines = [
        f"{len(config.clients)} clients, {rounds} round{'s' * (rounds > 1)}, {train.pruner}, sparsity {train.sparsity}",
        f"prunes {sum(map(len, blocks))} matrices with {entries:,} weights in {len(blocks)} blocks: {names}",
    ]
    dense = left_dense(skeleton.model, skeleton.layout)
    if dense:
        lines.append(f"leaves dense inside the blocks: {', '.join(dense)}")
    if config.client_configs.train_configs.layer_sampling == "uniform":
        expected = expected_uncovered(config.roster(), len(blocks))
        lines.append(f"uniform sampling leaves {expected:.2f} blocks a round to nobody, in expectation")
    return lines


def _indivisible(linears: tuple, target: Target) -> Iterator[str]:
    for linear in linears:
        problem = check_divides(target, linear.shape[1])
        if problem:
            yield f"client_configs.train_configs.sparsity: {linear.name}: {problem}"


def _too_long(what: str, length: int, longest: int | None) -> list[str]:
    if longest is None or length <= longest:
        return []
    return [f"{what}: the model takes at most {longest} tokens (max_position_embeddings), got {length}"]


def run_dir_problem(config: Config, overwrite: bool) -> str | None:
    """Why the run directory cannot be used, or None."""
    folder = Path(config.run_dir)
    if folder.exists() and not folder.is_dir():
        return f"run_dir: {folder} is a file; name a folder"
    dense = Path(config.model.path).expanduser().resolve()
    if dense == folder.resolve() or dense.is_relative_to((folder / "model").resolve()):
        return f"run_dir: {folder} holds the dense model of model.path, which a run there would replace; name another"
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        return f"run_dir: {folder} exists and is not empty; give another run_dir=..., or --overwrite to replace it"
    return None
