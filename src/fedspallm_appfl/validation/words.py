"""What a run will do, in words."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from fedspallm_appfl.aggregation.layer_sampling import expected_uncovered, to_text
from fedspallm_appfl.algorithms import registry
from fedspallm_appfl.devices import is_slow
from fedspallm_appfl.models.choice import by_kind, in_words, left_dense, together
from fedspallm_appfl.models.lazy_model import Skeleton, replaced_attention
from fedspallm_appfl.rounds.beginning import manifest_of
from fedspallm_appfl.rounds.participants import algorithm_of, comparisons, hidden, roster, uncovered
from fedspallm_appfl.settings.schema import Config
from fedspallm_appfl.tensors.target import NM
from fedspallm_appfl.tensors.targets import Targets
from fedspallm_appfl.texts.files import is_online, text_files


def forecast(config: Config) -> list[str]:
    """What a run will prune."""
    skeleton = Skeleton.of(config)
    blocks = skeleton.layout.blocks
    entries = sum(linear.entries for block in blocks for linear in block)
    does = "recovers" if config.recovery.model else "prunes"
    lines = [
        headline(config),
        *_notices(config),
        f"{does} {sum(map(len, blocks))} matrices with {entries:,} weights in {len(skeleton.layout.pruned)} blocks:",
        *_listed([(", ".join(together(linear.name for linear in linears)),) for linears in blocks]),
    ]
    if named := replaced_attention(skeleton.model):
        lines.append(attention_words(named))
    lines += _slow_words(config, skeleton.dtype)
    dense = left_dense(skeleton.model, skeleton.found, skeleton.layout)
    if any(dense):
        lines += ["leaves dense inside the blocks:", *_listed([in_words(of) for of in dense])]
    return [*lines, *left_out(config, list(skeleton.layout.pruned))]


def _listed(blocks: list[tuple[str, ...]]) -> Iterator[str]:
    """A line for each kind of block that has something to list."""
    for indices, parts in by_kind(blocks):
        if any(parts):
            yield f"  block{'s' * (len(indices) > 1)} {to_text(indices)}: {'; '.join(parts)}"


def attention_words(named: str) -> str:
    """That another attention runs than the model's configuration names."""
    return f"config.json names {named}, which cannot run here: sdpa takes its place, which computes the same"


def _slow_words(config: Config, dtype: torch.dtype) -> Iterator[str]:
    """That this CPU is slow in the arithmetic of the model, where clients may work on it."""
    asked = {place for client in config.clients for place in client.train_configs.places}
    maybe = not config.over_globus() and ("cpu" in asked or ("auto" in asked and not torch.cuda.device_count()))
    if maybe and is_slow(dtype):
        name = str(dtype).removeprefix("torch.")
        yield (
            f"this CPU has no fast arithmetic in {name}: where clients run on such CPUs, passes of the model take several "
            "times as long as with model.dtype=float32"
        )


def left_out(config: Config, blocks: Sequence[int]) -> Iterator[str]:
    """Which of the blocks that have something to prune stay dense because no client is assigned them."""
    missed = uncovered(config, blocks)
    if missed:
        yield (
            f"leaves dense the blocks that no client draws in {rounds_text(config)}: {to_text(missed)}; "
            "raise resource_share or num_global_epochs to reach them"
        )
    if config.client_configs.train_configs.layer_sampling == "uniform" and not config.recovery.model:
        expected = expected_uncovered(roster(config), len(blocks))
        if expected >= 0.005:
            yield f"on average {expected:.2f} blocks a round are drawn by no client and stay dense"


def _notices(config: Config) -> Iterator[str]:
    """What the algorithm means for the rest of the configuration, and what is not read."""
    texts = {f"client {client.client_id}": client.data.text for client in config.clients if client.data.text}
    texts |= {f"evaluation.texts.{name}": text for name, text in config.evaluation.texts.items()}
    for where, text in texts.items():
        if left := text_files(text).left_out_words():
            yield f"{where}: not text, left out: {left}"
    yield from shared_texts(config)
    yield from seen_words(config)
    yield from unallocated_words(config)
    if config.evaluation.compare and not comparisons(config):
        yield (
            f"evaluation.compare is left out: {', '.join(config.evaluation.compare)} cannot be made of the uploads of "
            f"{config.algorithm}"
        )
    if algorithm_of(config).gathers and not config.recovery.model:
        gram = config.gram
        bits = "16 bits" if hidden(config) else gram.precision
        yield f"clients send Gram matrices in {bits}, of inputs of the {gram.propagate} model"
        if gram.first_input == "private":
            yield "gram.first_input is private: the server can tell how often each token occurs in a client's text"


def shared_texts(config: Config) -> Iterator[str]:
    """Which files are texts of two clients, or of a client and of the evaluation."""
    owner: dict[str, str] = {}
    for client in config.clients:
        who = f"client {client.client_id}"
        for file in _files(client.data.text or []):
            if owner.setdefault(file, who) != who:
                yield f"note: {who} and {owner[file]} have the same text: {file}"
    for name, text in config.evaluation.texts.items():
        for file in _files(text):
            if file in owner:
                yield f"note: evaluation.texts.{name} is a text of {owner[file]} too, and so not held out: {file}"


def _files(text: str | Sequence[str]) -> list[str]:
    return [file if is_online(file) else str(Path(file).resolve()) for file in text_files(text).files]


def seen_words(config: Config) -> Iterator[str]:
    """What the server sees where sums are hidden."""
    if hidden(config):
        trust = "clients sign their keys" if config.server_configs.roster else "the server is trusted to relay keys"
        yield f"secure sums: the server sees sums over the clients, and no client's upload; {trust}"


def unallocated_words(config: Config) -> Iterator[str]:
    """That allocation was asked for, and the target leaves nothing to choose."""
    sparsity = config.client_configs.train_configs.sparsity
    if config.allocation.asked and isinstance(sparsity, NM):
        yield f"allocation: {sparsity} is the target of each group of entries, so there is nothing to choose"


def headline(config: Config) -> str:
    """Who prunes how, in a line."""
    clients = f"{len(config.clients)} client{'s' * (len(config.clients) != 1)}"
    sparsity: object = config.client_configs.train_configs.sparsity
    if config.recovery.model and isinstance(sparsity, Targets):  # of what lies on disk, to the last zero
        sparsity = f"{sparsity.default}, others for {len(sparsity.others)} matrices"
    together = " of all matrices together" if config.allocates else ""
    return f"{clients}, {rounds_text(config)}, {how(config)}, sparsity {sparsity}{together}"


def how(config: Config) -> str:
    """Algorithm, pruners, and what follows; of a model that was pruned before what is known of it."""
    if config.recovery.model:
        return f"recovery of a model{origin(config)}"
    after = " and recovery" if config.recovery.rounds else ""
    return f"{algorithm_of(config).title} with {config.pruners()}{after}"


def origin(config: Config) -> str:
    """How a model that is recovered was pruned; empty where nobody says so."""
    made = manifest_of(config.recovery.model)
    if not made:
        return ""
    known = made["algorithm"] in registry.names()
    return f" pruned by {registry.find(made['algorithm']).title if known else made['algorithm']} with {made['pruner']}"


def rounds_text(config: Config) -> str:
    """The number of rounds."""
    rounds = config.server_configs.num_global_epochs
    return f"{rounds} round{'s' * (rounds > 1)}"
