"""What is known of an experiment before it runs: its configuration, the shapes of its model, and what follows from both.

Linears that share an input are found as a run finds them, by a pass without weights. All sizes are bytes unless they are
called entries.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from fedspallm_appfl.algorithms.algorithm import Algorithm, Exchange, Groups, of_round
from fedspallm_appfl.allocation.text import window_length
from fedspallm_appfl.errors import ConfigError, ModelError
from fedspallm_appfl.models.choice import choose
from fedspallm_appfl.models.inputs import shared_inputs
from fedspallm_appfl.models.layout import Layout, Linear, find_layout
from fedspallm_appfl.models.lazy_model import Skeleton, known_layout, longest_window, without_weights
from fedspallm_appfl.models.storage.checkpoint import DTYPES, CheckpointFiles, allow_code_of, resolve_model
from fedspallm_appfl.pruning import registry as pruners
from fedspallm_appfl.pruning.pruner import Pruner
from fedspallm_appfl.rounds.folds.context import Context, Fold
from fedspallm_appfl.rounds.folds.registry import folds
from fedspallm_appfl.rounds.participants import (
    Draws,
    algorithm_of,
    comparisons,
    draws,
    exchanges,
    needs_text,
    participants,
    server_settings,
)
from fedspallm_appfl.rounds.uploads import down_sizes, sizes
from fedspallm_appfl.settings.schema import Client, Config, Model, Prune, ServerSettings, TrainConfigs
from fedspallm_appfl.tensors.targets import Sparsity
from fedspallm_appfl.validation.files import unfit
from fedspallm_appfl.wire.packed import Shapes, packed_sizes

Sizes = dict[int, dict[str, int]]  # block -> unit -> bytes


@dataclass(frozen=True)
class Outline:
    """What there is to know of a model without its weights.

    Attributes:
        layout: its blocks, with the linears that are pruned.
        groups: for each block which linears share an input.
        outer: entries outside the blocks; what is tied counts once.
        blocks: entries of all parameters of each block.
        vocabulary: token ids.
        stored: dtype of the checkpoint.
        arithmetic: dtype of forward passes.
        folder: its folder, maybe without weights.
        assumed: there are no weights to see the dtype of, so that it is the one in `config.json`.
        found: its blocks, with the linears that stay dense too; None where there are none.
        longest: tokens that it takes at most; None if it has no limit.
    """

    layout: Layout
    groups: Groups
    outer: int
    blocks: tuple[int, ...]
    vocabulary: int
    stored: torch.dtype
    arithmetic: torch.dtype
    folder: Path = Path()
    assumed: bool = False
    found: Layout | None = None
    longest: int | None = None

    @property
    def hidden(self) -> int:
        """H: what the first linear of a block takes."""
        return self.linears[0][0].shape[1]

    @property
    def linears(self) -> tuple[tuple[Linear, ...], ...]:
        """The linears of each block, pruned or not."""
        return (self.found or self.layout).blocks

    @cached_property
    def shapes(self) -> dict[int, Shapes]:
        """For each block (O, I) of each linear that is pruned."""
        return {block: self.layout.shapes(block) for block in range(len(self.layout.blocks))}

    def entries(self, block: int) -> int:
        """Prunable entries of a block."""
        return sum(linear.entries for linear in self.layout.blocks[block])


def open_outline(settings: Model, prune: Prune | None = None) -> Outline:
    """Look at a model; of one on the hub that is not here, only the small files are fetched.

    Raises:
        ModelError: the model cannot be opened.
    """
    allow_code_of(settings)
    folder = resolve_model(settings.path, weights=False)
    try:
        CheckpointFiles(folder)
    except ModelError:
        model = without_weights(folder, "auto")
        found = known_layout(folder, find_layout(model, settings.blocks))
        layout = choose(found, prune or Prune(), model)
        return _outline(folder, model, layout, found, next(model.parameters()).dtype, settings, True)
    skeleton = Skeleton(str(folder), settings.blocks, settings.dtype, prune)
    return _outline(folder, skeleton.model, skeleton.layout, skeleton.found, skeleton.stored_dtype, settings, False)


def _outline(
    folder: Path,
    model: PreTrainedModel,
    layout: Layout,
    found: Layout,
    stored: torch.dtype,
    settings: Model,
    assumed: bool,
) -> Outline:
    outer, blocks = 0, [0] * len(layout.blocks)
    for name, parameter in model.named_parameters():
        if name.startswith(f"{layout.path}."):
            blocks[int(name.removeprefix(f"{layout.path}.").split(".")[0])] += parameter.numel()
        else:
            outer += parameter.numel()
    vocabulary: int = model.get_input_embeddings().num_embeddings  # type: ignore[assignment]
    arithmetic = stored if settings.dtype == "auto" else DTYPES[settings.dtype]
    groups = shared_inputs(folder, layout)
    longest = longest_window(model)
    return Outline(
        layout, groups, outer, tuple(blocks), vocabulary, stored, arithmetic, folder, assumed, found, longest
    )


@dataclass(frozen=True)
class Job:
    """An experiment on a model.

    Attributes:
        config: the experiment, without problems.
        model: its model.
    """

    config: Config
    model: Outline

    @classmethod
    def of(cls, config: Config) -> "Job":
        """Open the model of an experiment.

        Raises:
            ModelError: the model cannot be opened.
            ConfigError: a pattern n:m does not fit the rows of some matrix.
        """
        made = cls(config, open_outline(config.model, config.prune))
        for problem in unfit(made.model.layout, made.sparsity):
            raise ConfigError(problem)
        return made

    @property
    def sparsity(self) -> Sparsity:
        """The target of each matrix, the same for all clients."""
        return self.config.client_configs.train_configs.sparsity

    @property
    def algorithm(self) -> Algorithm:
        """The algorithm."""
        return algorithm_of(self.config)

    @property
    def comparisons(self) -> list[str]:
        """What is made beside the global model."""
        return comparisons(self.config)

    @cached_property
    def clients(self) -> list[Client]:
        """Those who take part."""
        return participants(self.config)

    @cached_property
    def exchanges(self) -> tuple[Exchange, ...]:
        """The exchanges of the last round."""
        return exchanges(self.config, self.model.groups)

    @cached_property
    def draws(self) -> Draws:
        """The blocks of each participant in each round."""
        return draws(self.config, list(self.model.layout.pruned))

    @cached_property
    def covered(self) -> list[int]:
        """Blocks that some client prunes in some round; all clients recover all of them."""
        if self.config.recovery.model:
            return list(self.model.layout.pruned)
        return sorted({block for assigned in self.draws for mine in assigned.values() for block in mine})

    def assigned(self, number: int, exchange: Exchange) -> Mapping[str, list[int]]:
        """The blocks of each participant in an exchange of a round; of a model that was pruned before, all."""
        drawn = self.draws[number]
        return dict.fromkeys(drawn, self.covered) if exchange.recovers or exchange.begins else drawn

    def of_round(self, number: int) -> tuple[Exchange, ...]:
        """The exchanges of a round, from 0."""
        return of_round(self.exchanges, number + 1 == self.rounds)

    @property
    def rounds(self) -> int:
        """Number of rounds."""
        return self.config.server_configs.num_global_epochs

    @property
    def allocation_length(self) -> int:
        """Tokens in a window of the public text that targets are chosen on."""
        return window_length(self.config.allocation, self.model.longest)

    @property
    def hidden_copies(self) -> int:
        """Hidden states that a client keeps: its own, and those of the dense model, or ahead of what is pruned."""
        gram = self.config.gram
        return 1 + (self.algorithm.gathers and (gram.drift or gram.stride > 1))

    @cached_property
    def told(self) -> ServerSettings:
        """What the server is told."""
        return server_settings(self.config, Path())

    @cached_property
    def folds(self) -> tuple[Fold, ...]:
        """What the server makes of each exchange; asked for its memory, it needs no weights."""
        layout, groups = self.model.layout, self.model.groups
        context = Context(layout, self.model.stored, self.told, Path(), "cpu", _no_weights, groups)
        return folds(context, self.exchanges)

    def fold(self, number: int) -> Fold:
        """The fold of an exchange."""
        return self.folds[number]

    def up(self, exchange: Exchange, mask_only: bool = False) -> Sizes:
        """Bytes of each unit that goes up in an exchange, by block.

        Args:
            exchange: the exchange.
            mask_only: of a client whose pruner leaves kept weights as they are, so that they need not travel.
        """
        if mask_only and exchange.up == "weights":
            exchange = dataclasses.replace(exchange, up="masks")
        model = self.model
        return sizes(exchange, model.layout.pruned, self.sparsity, model.stored, model.groups, self.config.gram)

    def down(self, exchange: Exchange) -> Sizes:
        """Bytes of each matrix that an exchange sends down, by block."""
        model = self.model
        packed = down_sizes(exchange, model.layout.pruned, self.sparsity, model.stored, model.groups)
        if exchange.only is None or not packed:
            return packed
        takers = {block: {names[0]: names for names in self.model.groups[block]} for block in packed}
        return {
            block: {name: packed[block][name] for unit in exchange.units_of(block, list(of)) for name in of[unit]}
            for block, of in takers.items()
        }

    def packed(self, block: int, parts: str = "weights") -> dict[str, int]:
        """Bytes of each matrix of a block once packed: `weights` with masks, `masks`, or `values`."""
        return packed_sizes(self.model.shapes[block], self.sparsity, self.model.stored, parts, block)


def _no_weights(block: int, name: str) -> Any:
    raise AssertionError("nothing is folded here")


def pruner_of(train: TrainConfigs) -> Pruner:
    """The pruner of a client."""
    return pruners.find(train.pruner)


def mask_only(client: Client) -> bool:
    """Whether a client sends masks without values."""
    return pruners.keeps_weights(client.train_configs)


def takes_no_text(client: Client) -> bool:
    """Whether a client has no text and needs none: it runs one short window (see `rounds.client`)."""
    return client.data.text is None and not needs_text(client)


def windows_of(job: Job, client: Client) -> tuple[int, int]:
    """Calibration windows and their length; a client without text takes one short window."""
    without = takes_no_text(client) and not job.algorithm.pools_text
    return (1, 2) if without else (client.data.windows, client.data.length)
