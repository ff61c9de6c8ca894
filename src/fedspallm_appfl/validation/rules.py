"""What a configuration must fulfil for its algorithm and its pruners: facts of theirs against the values, with the fix.

`check` looks at values only; `files.check_with_files` opens model and text as well.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedspallm_appfl.algorithms import registry as algorithms
from fedspallm_appfl.errors import ConfigError, FedSpaLLMError, quoted
from fedspallm_appfl.pruning import registry as pruners
from fedspallm_appfl.rounds.hidden.coding import MOST_CLIENTS
from fedspallm_appfl.rounds.hidden.terms import alike, outweighs
from fedspallm_appfl.rounds.participants import algorithm_of, comparisons, needs_text, partial_clients, tokens
from fedspallm_appfl.secure.identity import LEAST_CLIENTS, MAKE, Identity, Roster
from fedspallm_appfl.settings import plugins, rules
from fedspallm_appfl.settings.rules import shown
from fedspallm_appfl.settings.schema import REDIS_LIMIT, AggregatorKwargs, Config, Gram, Recovery, TrainConfigs

ONE_PLACE = ("pruner", "damping", "damping_retries", "iterations", "refit", "threads")


def check(config: Config) -> list[str]:
    """Every problem that the values alone show; plugins are loaded."""
    problems = rules.check(config)
    try:
        plugins.load(config.plugins)
    except ConfigError as error:
        return [*problems, str(error)]
    unknown = list(_unknown(config))
    if unknown:
        return [*problems, *(one for one in unknown if one not in problems)]
    return [*problems, *_texts(config), *_comparisons(config), *_algorithm(config), *_refits(config)]


def _unknown(config: Config) -> Iterator[str]:
    """Algorithms and pruners that neither the package nor a plugin has."""
    if config.algorithm not in algorithms.names():
        yield f"algorithm: one of {', '.join(algorithms.names())}; got {quoted(config.algorithm)}"
    shared = config.client_configs.train_configs.pruner
    owners = {"client_configs": shared} | {
        f"clients.{index}": client.train_configs.pruner
        for index, client in enumerate(config.clients)
        if client.train_configs.pruner != shared
    }
    for path, pruner in owners.items():
        if pruner not in pruners.names():
            yield f"{path}.train_configs.pruner: one of {', '.join(pruners.names())}; got {quoted(pruner)}"


def _texts(config: Config) -> Iterator[str]:
    for index, client in enumerate(config.clients):
        if needs_text(client) and not client.data.text and not client.endpoint_id:
            who = quoted(client.client_id)
            yield f"clients.{index}.data.text: client {who} has no private text; name a file or a folder"


def _comparisons(config: Config) -> Iterator[str]:
    for name in config.evaluation.compare:
        if name not in algorithms.COMPARISONS:
            valid = ", ".join(algorithms.COMPARISONS)
            yield f"evaluation.compare: of {valid} (dense is always there); got {quoted(name)}"
            return
    apart = [name for name in comparisons(config) if algorithms.find(name).apart]
    partial, rounds = partial_clients(config), config.server_configs.num_global_epochs
    if apart and (partial or rounds > 1):
        yield (
            f"evaluation.compare: {apart[0]} needs every client to prune every block in one round, here are "
            f"{rounds} rounds and resource shares below 1 of {partial or 'no client'}; "
            "measure it in a run of its own with resource_share 1 and one round"
        )


def _algorithm(config: Config) -> Iterator[str]:
    """What does not go with the algorithm."""
    algorithm, name = algorithm_of(config), config.algorithm
    if config.gram != Gram() and not algorithm.gathers:
        yield f"gram: its keys are for algorithms that gather Gram matrices, got algorithm {name}"
    if algorithm.gathers or algorithm.pools_text:
        yield from _one_pruner(config)
    yield from _without_effect(config)
    keeping = [c.train_configs.pruner for c in config.clients if pruners.keeps_weights(c.train_configs)]
    if algorithm.changes_weights and keeping:
        yield (
            f"client_configs.train_configs.pruner: with {keeping[0]} no weight changes, so {name} has nothing to average; "
            "choose another pruner, refit, or algorithm fedprllm"
        )
    fixed = [c.train_configs.pruner for c in config.clients if not pruners.find(c.train_configs.pruner).compensates]
    if fixed and algorithm.changes_weights and not keeping:
        yield (
            f"client_configs.train_configs.pruner: {fixed[0]} cannot make up for a mask that others chose, as {name} asks; "
            "choose another pruner, or one that needs InputGram"
        )
    if not algorithm.federates:
        yield from _whole_model_once(config)
    if config.server_configs.secure_sums:
        yield from _secure_sums(config)
    yield from _identities(config)
    yield from _recovery(config)


def _averages(config: Config) -> bool:
    """Whether clients count in a mean."""
    return algorithm_of(config).averages or config.recovery.rounds > 0


def _secure_sums(config: Config) -> Iterator[str]:
    """What does not go with secure sums."""
    where, algorithm, gram = "server_configs.secure_sums", algorithm_of(config), config.gram
    if not algorithm.adds_up:
        yield (
            f"{where}: with {config.algorithm} each client keeps other weights, and hiding which takes dense words of "
            "several bytes a weight; choose algorithm gram, consensus or fedprllm"
        )
    number = len(config.clients)
    if number < LEAST_CLIENTS:
        yield f"{where}: of a sum of two each knows the other's part; list at least {LEAST_CLIENTS} clients, got {number}"
    if number > MOST_CLIENTS:
        yield f"{where}: the integers of more clients do not fit; list at most {MOST_CLIENTS} clients, got {number}"
    if config.server_configs.fold_ranks:
        yield f"{where}: the server adds up what is hidden itself; leave server_configs.fold_ranks at 0"
    if config.recovery.model:
        yield f"{where}: a model that was pruned before is recovered without them; leave secure_sums off"
    if algorithm.gathers and (gram.propagate != "dense" or gram.target != "own"):
        yield f"{where}: the sums of a sweep are not hidden yet; leave gram.propagate at dense"
    if _averages(config) and config.server_configs.aggregator_kwargs.weights != "equal":
        yield f"{where}: clients count equally in a mean that is hidden; leave aggregator_kwargs.weights at equal"
    if config.server_configs.aggregator_kwargs.fold == "cumulative":
        yield f"{where}: a round that is begun anew would be added twice; leave aggregator_kwargs.fold at latest"
    shared = alike(config.client_configs.train_configs)
    for client in config.clients:
        if other := [name for name, value in alike(client.train_configs).items() if value != shared[name]]:
            yield (
                f"{where}: all clients prune with the same settings, or the others' parts could be taken out of a sum; "
                f"client {client.client_id} has another {', '.join(other)}; put it into client_configs"
            )
    if problem := outweighs(tokens(config)):
        yield f"{where}: {problem}"
    if partial := partial_clients(config):
        yield f"{where}: all clients prune all blocks; leave resource_share at 1, got less of {partial}"


def _identities(config: Config) -> Iterator[str]:
    """Clients of secure sums sign all or none, with the keys of the roster."""
    server, where = config.server_configs, "server_configs.roster"
    named = [client.client_id for client in config.clients if client.identity]
    if not (server.secure_sums and server.roster):
        if server.roster:
            yield f"{where}: identities are for secure sums; set server_configs.secure_sums to true, or leave it out"
        elif named:
            yield f"{where}: {', '.join(named)} have an identity, and there is no roster; name the file of public keys"
        return
    try:
        roster = Roster.read(Path(server.roster).expanduser())
    except FedSpaLLMError as error:
        yield f"{where}: {error}"
        return
    found, wanted = roster.clients, {client.client_id for client in config.clients}
    if wanted != {*found}:
        listed, asked = ", ".join(found), ", ".join(sorted(wanted))
        yield f"{where}: it has the clients of `clients`, which are {asked}, got {listed}; make them equal"
    for index, client in enumerate(config.clients):
        path = f"clients.{index}.identity"
        if client.identity is None and not client.endpoint_id:
            yield f"{path}: client {quoted(client.client_id)} has none, and clients sign all or none; name its key file"
        if client.identity is not None and not Path(client.identity).expanduser().is_file():
            yield f"{path}: client {quoted(client.client_id)}: there is no file {client.identity}; {MAKE}"
        elif client.identity is not None and client.client_id in roster.keys:
            yield from _another_key(path, client.identity, roster.keys[client.client_id])


def _another_key(path: str, file: str, public: str) -> Iterator[str]:
    """What keeps a client from signing with a key file: it cannot be read, or the roster has another key of the client."""
    try:
        if Identity.load(Path(file).expanduser()).public != public:
            yield f"{path}: the roster has another key of this client; name its own key file, or correct the roster"
    except FedSpaLLMError as error:
        yield f"{path}: {error}"


def _recovery(config: Config) -> Iterator[str]:
    """What does not go with recovery."""
    recovery, name = config.recovery, config.algorithm
    if not recovery.rounds:
        if recovery != Recovery():
            yield "recovery: its keys are without effect while recovery.rounds is 0; set it to 1"
        return
    if not algorithm_of(config).federates:
        yield f"recovery.rounds: with {name} there is nobody to average changes with; leave it at 0"
    if recovery.model and config.server_configs.num_global_epochs > 1:
        yield "server_configs.num_global_epochs: nothing is pruned with recovery.model; set recovery.rounds instead"
    usual = Recovery()
    if config.server_configs.secure_sums and recovery.delta != usual.delta:
        yield f"recovery.delta: in secure sums changes have a precision of their own; leave it at {usual.delta}"
    if recovery.scope == "blockwise" and recovery.loss != usual.loss:
        yield f"recovery.loss: blocks are fitted to the dense block's output; leave it at {usual.loss}, or set scope to all"
    for index, client in enumerate(config.clients):
        if client.data.batch > recovery.batch:
            yield (
                f"recovery.batch: at least the data.batch of every client, got {recovery.batch} and "
                f"{client.data.batch} of clients.{index}"
            )
        if not needs_text(client) and not client.data.text and not client.endpoint_id:
            yield (
                f"clients.{index}.data.text: client {quoted(client.client_id)} has no private text, and recovery needs "
                "some; name a file or a folder"
            )


def _without_effect(config: Config) -> Iterator[str]:
    """What would be silently ignored."""
    algorithm, kwargs = algorithm_of(config), config.server_configs.aggregator_kwargs
    path, name, usual = "server_configs.aggregator_kwargs", config.algorithm, AggregatorKwargs()
    if kwargs.weights != usual.weights and not _averages(config):
        yield f"{path}.weights: nothing is averaged over clients with {name}; leave it at {usual.weights}"
    if kwargs.expansion != usual.expansion and not algorithm.expands:
        yield f"{path}.expansion: no mask is expanded with {name}; leave it at {usual.expansion}"
    if kwargs.fold != usual.fold and config.gram.propagate == "pruned":
        yield f"{path}.fold: statistics of a sweep hold for one pruned model and cannot be added up; leave it at latest"
    if kwargs.fold != usual.fold and not algorithm.accumulates:
        yield f"{path}.fold: values of a round belong to its masks, so {name} adds up nothing; leave it at latest"
    lengths = sorted({client.data.length for client in config.clients})
    if algorithm.pools_text and lengths != [config.client_configs.data.length]:
        yield f"client_configs.data.length: {name} puts all windows together, so one length for all; got {lengths}"


def _refits(config: Config) -> Iterator[str]:
    """Least squares that would be lost or are done anyway."""
    drops = algorithm_of(config).drops_values
    for train in {str(client.train_configs): client.train_configs for client in config.clients}.values():
        lost = f"with {config.algorithm} masks alone travel, and weights stay dense" if drops else None
        reason = pruners.find(train.pruner).why_no_refit() or lost
        if train.refit and reason:
            yield f"client_configs.train_configs.refit: {reason}; leave it at false"


def _one_pruner(config: Config) -> Iterator[str]:
    """The server, or the one that has all text, prunes for all."""
    shared = config.client_configs.train_configs
    for index, client in enumerate(config.clients):
        for key in ONE_PLACE:
            own, common = getattr(client.train_configs, key), getattr(shared, key)
            if own != common:
                yield (
                    f"clients.{index}.train_configs.{key}: {config.algorithm} prunes in one place, so the same for all; "
                    f"got {shown(own)} beside {shown(common)}"
                )
    if algorithm_of(config).gathers and pruners.find(shared.pruner).needs is None:
        yield (
            f"client_configs.train_configs.pruner: {shared.pruner} needs no statistics; choose another pruner for "
            f"{config.algorithm}"
        )


def _whole_model_once(config: Config) -> Iterator[str]:
    rounds, partial = config.server_configs.num_global_epochs, partial_clients(config)
    if rounds > 1 or partial:
        yield (
            f"algorithm: {config.algorithm} prunes every block once; set server_configs.num_global_epochs to 1 and "
            f"resource_share to 1, got {rounds} rounds and shares below 1 of {partial or 'no client'}"
        )


def prepared_for_globus(config: Config) -> Config:
    """The configuration as it is used over Globus Compute: with compression, and without paths that only sites know."""
    made = copy.deepcopy(config)
    groups: list[Any] = [made.client_configs, *made.clients]
    for client in made.clients:
        client.identity = None  # its site names it
    for group in groups:
        group.data.text = None
        comm = group.comm_configs
        comm.compression = "zstd" if comm.compression == "auto" else comm.compression
        if comm.store.connector == "redis":
            comm.max_message_bytes = min(comm.max_message_bytes, REDIS_LIMIT)
    return made


def check_for_globus(config: Config) -> Iterator[str]:
    """Problems of the values for a run over Globus Compute."""
    if config.algorithm in algorithms.names() and algorithm_of(config).pools_text:
        yield (
            f"algorithm: {config.algorithm} has the text of all clients in one place, which Globus Compute is there to "
            "avoid"
        )
    trainer = config.client_configs.train_configs.trainer
    if trainer != TrainConfigs.trainer:
        yield (
            f"client_configs.train_configs.trainer: a site runs no code of the server's, got {quoted(trainer)}; "
            f"over Globus Compute use {TrainConfigs.trainer}"
        )
    for index, client in enumerate(config.clients):
        if not client.endpoint_id:
            yield (
                f"clients.{index}.endpoint_id: client {quoted(client.client_id)} has no endpoint; give the UUID that "
                "globus-compute-endpoint list shows at its site"
            )


def check_on_this_machine(config: Config) -> Iterator[str]:
    """Problems of a configuration that is meant for Globus Compute when it runs here."""
    for index, client in enumerate(config.clients):
        known = client.train_configs.pruner in pruners.names()
        if client.endpoint_id and not client.data.text and known and needs_text(client):
            yield (
                f"clients.{index}.data.text: client {quoted(client.client_id)} has no private text here; name a file or a "
                "folder, or use fedspallm run --launcher globus, where its own site names it"
            )
