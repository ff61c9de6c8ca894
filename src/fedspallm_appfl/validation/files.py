"""What of a configuration cannot be run, once its model and its texts are opened; the model is built without weights."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from fedspallm_appfl.algorithms import registry as algorithms
from fedspallm_appfl.algorithms.algorithm import Groups
from fedspallm_appfl.allocation.curves import unseen_experts
from fedspallm_appfl.allocation.text import public_windows
from fedspallm_appfl.errors import ConfigError, DataError, FedSpaLLMError
from fedspallm_appfl.models.choice import unmatched
from fedspallm_appfl.models.layout import Layout
from fedspallm_appfl.models.lazy_model import Skeleton
from fedspallm_appfl.rounds.beginning import opened
from fedspallm_appfl.rounds.participants import algorithm_of, exchanges, own_windows
from fedspallm_appfl.rounds.uploads import down_sizes, sizes
from fedspallm_appfl.settings import schema
from fedspallm_appfl.settings.schema import Client, Config
from fedspallm_appfl.tensors.target import check_divides
from fedspallm_appfl.tensors.targets import Sparsity, Targets
from fedspallm_appfl.texts.checks import check_vocabulary, held_out_windows, look_at
from fedspallm_appfl.texts.drawing import draw
from fedspallm_appfl.texts.files import are_tokens
from fedspallm_appfl.texts.tokenizer import load_tokenizer
from fedspallm_appfl.texts.windows import Cut
from fedspallm_appfl.wire.messages import plan
from fedspallm_appfl.wire.packed import Shapes


def check_with_files(config: Config) -> list[str]:
    """Every problem that shows once model and text are opened; says what it can where values are wrong too."""
    problems: list[str] = []
    skeleton = tokenizer = None
    try:
        if config.model.path and config.model.dtype in ("auto", *schema.DTYPES):
            skeleton = Skeleton.of(config)
            tokenizer = load_tokenizer(skeleton.folder) if _has_words(config) else None
    except ConfigError as error:
        problems.append(str(error))
    except FedSpaLLMError as error:
        problems.append(f"model: {error}")
    if skeleton is not None:
        problems += _sizes(config, skeleton)
        problems += _to_recover(config, skeleton)
    longest = skeleton.longest_window if skeleton else None
    long = []
    for client in config.clients:
        if client.data.text:
            try:
                _look_at_text(config, client, tokenizer, skeleton)
            except DataError as error:
                problems.append(str(error))
            long += [(client.client_id, problem) for problem in too_long("data.length", client.data.length, longest)]
    problems += _of_clients(long)
    evaluation = config.evaluation
    length = evaluation.length
    for name, text in evaluation.texts.items():
        try:
            known = (tokenizer, skeleton.vocabulary) if skeleton is not None and length > 1 else ()
            cut = Cut(length, evaluation.bos, evaluation.field)
            held_out_windows(name, text, cut, evaluation.windows, *known)
        except DataError as error:
            problems.append(str(error))
    if config.allocates and skeleton is not None:
        problems += _allocation(config, skeleton)
    if config.evaluation.texts:
        problems += too_long("evaluation.length", length, longest)
    return problems


def _to_recover(config: Config, skeleton: Skeleton) -> Iterator[str]:
    """What keeps a model from being recovered, as far as it shows without its weights."""
    try:
        if config.recovery.model:
            opened(config, skeleton)
    except FedSpaLLMError as error:
        yield str(error)


def _allocation(config: Config, skeleton: Skeleton) -> Iterator[str]:
    """What keeps the targets from being chosen."""
    if refused := unseen_experts(skeleton.layout):
        yield f"allocation.method: {refused}"
    long = too_long("allocation.length", config.allocation.length or 0, skeleton.longest_window)
    yield from long
    try:
        if not long:
            public_windows(config, skeleton)
    except FedSpaLLMError as error:
        yield str(error)


def _has_words(config: Config) -> bool:
    """Whether some text is to be tokenized; one that cannot be found, which is said elsewhere, may be."""
    texts = [client.data.text for client in config.clients] + list(config.evaluation.texts.values())
    try:
        return not all(are_tokens(text) for text in texts if text)
    except DataError:
        return True


def _look_at_text(config: Config, client: Client, tokenizer: Any, skeleton: Skeleton | None) -> None:
    """Draw a client's windows, as it will, where model and values allow.

    Raises:
        DataError: its text cannot be read or is too short.
    """
    name, data, text = client.client_id, client.data, client.data.text or []
    try:
        if skeleton is None or data.length < 2 or data.windows < 1 or (tokenizer is None and not are_tokens(text)):
            look_at(text, data.field)
            return
    except DataError as error:
        raise DataError(f"client {name}: {error}") from error
    cut = Cut(data.length, data.bos, data.field, data.control_words)
    windows = draw(text, cut, tokenizer, data.windows, config.seed, name, own_windows(config))
    check_vocabulary(windows, skeleton.vocabulary, f"client {name}")


def _sizes(config: Config, skeleton: Skeleton) -> Iterator[str]:
    """What does not go with the shapes of the model."""
    layout, comm = skeleton.layout, config.client_configs.comm_configs
    if config.algorithm not in algorithms.names():  # `rules.check` says so
        return
    if algorithm_of(config).gathers and not config.recovery.model:
        if config.gram.drift and any(linear.expert for block in layout.blocks for linear in block):
            yield (
                "gram.target: the dense model sends other tokens to an expert than the pruned one, so that their outputs "
                "cannot be compared; leave it at own"
            )
        yield from _too_few_tokens(config, max(linear.shape[1] for block in layout.blocks for linear in block))
    if config.server_configs.secure_sums and any(linear.expert for block in layout.blocks for linear in block):
        yield "server_configs.secure_sums: which experts a client's text reaches is not hidden; leave it at false"
    yield from unfit(layout, config.client_configs.train_configs.sparsity)
    if config.gram.precision not in ("fp32", "bf16", "int8"):  # the same
        return
    alone = tuple(tuple((linear.name,) for linear in linears) for linears in layout.blocks)
    try:  # that some share an input does not change which statistics are the largest
        for table in travelling(config, layout.pruned, skeleton.stored_dtype, alone):
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
    sparsity = config.client_configs.train_configs.sparsity
    made = exchanges(config, groups)
    answered = len(made) - (config.server_configs.num_global_epochs == 1)
    for number, exchange in enumerate(made):
        yield sizes(exchange, shapes, sparsity, dtype, groups, config.gram)
        if exchange.down is not None and number < answered:
            yield down_sizes(exchange, shapes, sparsity, dtype, groups)


def _too_few_tokens(config: Config, widest: int) -> Iterator[str]:
    """Clients that will refuse to send statistics."""
    least = config.gram.fewest_tokens(widest)
    few = [
        (
            client.client_id,
            f"{client.data.windows} windows of {client.data.length} are {tokens} tokens, but statistics of fewer than "
            f"{least} are not sent; give more windows, or lower gram.min_tokens",
        )
        for client in config.clients
        if (tokens := client.data.windows * client.data.length) < least
    ]
    yield from _of_clients(few)


def unfit(layout: Layout, sparsity: Sparsity) -> Iterator[str]:
    """What of the targets does not fit the model: rows that n:m does not divide, patterns that mean no matrix."""
    where = "client_configs.train_configs.sparsity"
    found = {
        (linear.name, problem): None
        for block, linears in enumerate(layout.blocks)
        for linear in linears
        if (problem := check_divides(sparsity.of(block, linear.name), linear.shape[1]))
    }
    yield from (f"{where}: {', '.join(names)}: {problem}" for names, problem in together(found))
    if isinstance(sparsity, Targets):
        yield from (f"{where}: {problem}" for problem in unmatched(layout, [one for one, _ in sparsity.others]))


def _of_clients(found: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Problems of clients, each once."""
    for clients, problem in together(found):
        yield f"client{'s' if len(clients) > 1 else ''} {', '.join(clients)}: {problem}"


def together(found: Iterable[tuple[str, str]]) -> Iterator[tuple[list[str], str]]:
    """Of pairs (name, problem): all that have a problem, and the problem."""
    names: dict[str, list[str]] = {}
    for name, problem in found:
        names.setdefault(problem, []).append(name)
    yield from ((those, problem) for problem, those in names.items())


def too_long(what: str, length: int, longest: int | None) -> list[str]:
    """What is wrong with windows of a length for a model that takes `longest` tokens, if it has a limit."""
    if longest is None or length <= longest:
        return []
    return [f"{what}: the model takes at most {longest} tokens (max_position_embeddings), got {length}"]
