"""What a client does in a round of recovery: it fits the kept weights to its text, and says by how much they changed.

`scope: all` holds the whole pruned model and trains it on the loss at its end. What the dense model gives for each window
is computed once, block by block, before the pruned model is built; of it the hidden states in front of the final norm are
kept, in memory or in a file like others, from which its logits are made when they are wanted. Blocks run again in the
backward pass, so that of their activations one block's are in memory.

`scope: blockwise` holds one block: it fits each to what the dense block gives on the dense model's way, beginning with what
the blocks before it give after their own steps. Source of the idea: Guo et al., "EBFT: Effective and Block-Wise
Fine-Tuning for Sparse LLMs", arXiv 2402.12419.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from fedspallm_appfl.devices import give_back
from fedspallm_appfl.errors import PruningError, UpdateError
from fedspallm_appfl.events import OnEvent, ignore
from fedspallm_appfl.models.blockwise import Activations, advance, embed, logits, output_of
from fedspallm_appfl.models.layout import Linear
from fedspallm_appfl.models.lazy_model import LazyModel
from fedspallm_appfl.recovery.kept import Kept
from fedspallm_appfl.recovery.losses import LOSSES, output_error
from fedspallm_appfl.recovery.low_rank import Basis, LowRank
from fedspallm_appfl.recovery.rounding import rounded
from fedspallm_appfl.recovery.steps import batches_of_step, generator, order, train
from fedspallm_appfl.recovery.trained import Trained
from fedspallm_appfl.settings.schema import ClientSettings
from fedspallm_appfl.wire.deltas import PackedDelta
from fedspallm_appfl.wire.packed import Packed

NEWS = 10  # seconds between two events of steps
Changes = Iterator[tuple[int, dict[str, PackedDelta]]]  # (block, linear -> its change)


@dataclass(frozen=True)
class Learner:
    """A client in a round of recovery.

    Attributes:
        model: the dense model, in an arithmetic whose gradients do not vanish.
        pruned: block -> its matrices as the round begins; None for a dense block.
        windows: (n, T) int64 tokens.
        settings: what the client was told.
        turn: the round of recovery, from 0.
        on_event: hears how many steps are done, if they take long.
    """

    model: LazyModel
    pruned: Callable[[int], Mapping[str, Packed] | None]
    windows: Tensor
    settings: ClientSettings
    turn: int
    on_event: OnEvent = ignore

    @property
    def where(self) -> str:
        """What errors name."""
        return f"client {self.settings.client_id}, round {self.turn + 1} of recovery"

    def embedded(self) -> Activations:
        """Activations in front of the first block."""
        data = self.settings.data
        return embed(self.model, self.windows, data.batch, data.activations, self.settings.client_id)

    def steps(self) -> list[list[int]]:
        """The batches of each step."""
        recovery, batch = self.settings.recovery, self.settings.data.batch
        batches = -(-len(self.windows) // batch)
        random = generator(self.settings.seed, self.turn, self.settings.client_id)
        return list(order(batches, recovery.steps, batches_of_step(recovery, batch), random))

    def news(self) -> Callable[[int], None]:
        """Takes the number of steps that are done, and says it where nothing was said for a while."""
        said = time.monotonic()

        def stepped(done: int) -> None:
            nonlocal said
            if time.monotonic() - said >= NEWS:
                said = time.monotonic()
                here = {"client": self.settings.client_id, "turn": self.turn}
                self.on_event({"event": "step", **here, "step": done, "of": self.settings.recovery.steps})

        return stepped

    def trained(self, block: int, module: nn.Module) -> list[Trained]:
        """What is trained of a block's pruned matrices."""
        pruned, rank, inside = self.pruned(block) or {}, self.settings.recovery.rank, dict[str, list[Linear]]()
        for linear in self.model.layout.blocks[block]:
            if linear.name in pruned:
                inside.setdefault(linear.parameter, []).append(linear)
        made: list[Trained] = []
        for name, linears in inside.items():
            parameter = module.get_parameter(name)
            mask = torch.zeros(parameter.shape, dtype=torch.bool, device=parameter.device)
            for linear in linears:
                linear.view(mask).copy_(pruned[linear.name].unpack_mask())
            if rank:
                made.append(LowRank(parameter, linears, mask, Basis(rank, self.settings.seed, self.turn), block))
            else:
                made.append(Kept(parameter, linears, mask))
        return made

    def packed(self, block: int, trained: list[Trained]) -> dict[str, PackedDelta]:
        """The changes of a block, rounded; for secure sums finely, as they are rounded again.

        Raises:
            PruningError: one is not finite; names client and matrix.
        """
        pruned, settings = self.pruned(block) or {}, self.settings
        precision = "fp16" if settings.secure_sums else settings.recovery.delta
        return {
            name: rounded(
                self._finite(change, block, name),
                precision,
                generator(settings.seed, self.turn, settings.client_id, block, name),
            )
            for one in trained
            for name, change in one.changes(pruned)
        }

    def _finite(self, change: Tensor, block: int, name: str) -> Tensor:
        if not bool(change.isfinite().all()):
            raise PruningError(
                f"{self.where}, block {block}, {name}: weights are not finite after training; lower recovery.lr"
            )
        return change


def _require_sent(learner: Learner, blocks: set[int]) -> None:
    """Refuse to begin with matrices that did not come down whole."""
    for block in sorted(blocks):
        sent = learner.pruned(block) or {}
        for linear in learner.model.layout.blocks[block]:
            if linear.name not in sent or sent[linear.name].values is None:
                raise UpdateError(
                    f"{learner.where}, block {block}, {linear.name}: the server asks for its recovery and has not sent its "
                    "mask and weights; nothing is trained"
                )


def recovered(learner: Learner, blocks: set[int]) -> Changes:
    """Train, and give the changes of some blocks.

    Raises:
        UpdateError: the server has not sent a matrix of these blocks; names client and block.
        PruningError: the loss is not finite; names the client.
    """
    _require_sent(learner, blocks)
    return _SCOPES[learner.settings.recovery.scope](learner, blocks)


def _all(learner: Learner, blocks: set[int]) -> Changes:
    changes = _trained_whole(learner, blocks)  # the model is dropped before anything leaves: others share it
    give_back()
    for block in sorted(changes):
        yield block, changes.pop(block)


def _trained_whole(learner: Learner, blocks: set[int]) -> dict[int, dict[str, PackedDelta]]:
    model, state, stepped = learner.model, learner.embedded(), learner.news()
    dense = _dense_ends(learner) if learner.settings.recovery.loss == "kl" else None
    loss, ids = LOSSES[learner.settings.recovery.loss], learner.windows.split(learner.settings.data.batch)
    with ExitStack() as stack:
        modules = [stack.enter_context(model.block(index, learner.pruned(index))) for index in range(len(model.blocks))]
        trained = {index: learner.trained(index, modules[index]) for index in sorted(blocks)}

        def loss_of(number: int) -> Tensor:
            hidden = state.hidden[number]
            for index, module in enumerate(modules):
                hidden = _run_twice(module, state.calls[number][index], hidden)
            tokens = ids[number].to(model.device)
            with torch.no_grad():
                wanted = None if dense is None else logits(model, tokens, dense.hidden[number])
            return loss(logits(model, tokens, hidden), tokens, wanted)

        every = [one for mine in trained.values() for one in mine]
        train(every, learner.settings.recovery, learner.steps(), loss_of, learner.where, stepped)
        return {index: learner.packed(index, mine) for index, mine in trained.items()}


def _run(module: nn.Module, call: Any, hidden: Tensor) -> Tensor:
    return output_of(call(module, hidden))


def _run_twice(module: nn.Module, call: Any, hidden: Tensor) -> Tensor:
    """Run a block, and again in the backward pass: nothing in it is kept until then."""
    with set_checkpoint_early_stop(False):  # it stops by an error, which the call would take for the block's own
        made: Tensor = checkpoint(_run, module, call, hidden, use_reentrant=False, preserve_rng_state=False)
    return made


def _dense_ends(learner: Learner) -> Activations:
    """What the dense model's last block gives for each batch."""
    state = learner.embedded()
    for index in range(len(learner.model.blocks)):
        with learner.model.block(index) as module:
            advance(module, index, state)
    return state


def _blockwise(learner: Learner, blocks: set[int]) -> Changes:
    model, mine, dense, steps = learner.model, learner.embedded(), learner.embedded(), learner.steps()
    last = max(blocks, default=-1)
    for index in range(last + 1):
        with model.block(index) as module:
            advance(module, index, dense)
        with model.block(index, learner.pruned(index)) as module:
            done = [_fitted(learner, module, index, (mine, dense), steps)] if index in blocks else []
            if index < last:
                advance(module, index, mine)
        give_back()
        if done:
            yield index, done.pop()


def _fitted(
    learner: Learner, module: nn.Module, index: int, states: tuple[Activations, Activations], steps: list[list[int]]
) -> dict[str, PackedDelta]:
    """Fit one block; the changes of its matrices."""
    mine, dense = states
    trained = learner.trained(index, module)

    def loss_of(number: int) -> Tensor:
        made = _run(module, mine.calls[number][index], mine.hidden[number])
        return output_error(made, dense.hidden[number])

    train(trained, learner.settings.recovery, steps, loss_of, f"{learner.where}, block {index}")
    return learner.packed(index, trained)


_SCOPES: dict[str, Callable[[Learner, set[int]], Changes]] = {"all": _all, "blockwise": _blockwise}
