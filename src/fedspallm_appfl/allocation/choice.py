"""The targets of all matrices: made of a public text, at the widths that are asked for, and the best of these.

A function of the dense model, the public text, the target of the run and the settings. The server calls it before anything
is sent, and puts the result in the place of `sparsity`; nobody else has to know.
"""

import dataclasses
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from fedspallm_appfl.allocation.curves import Key, look
from fedspallm_appfl.allocation.fisher import sensitivities
from fedspallm_appfl.allocation.shares import Curve, counts
from fedspallm_appfl.allocation.text import public_windows
from fedspallm_appfl.devices import choose_device, threads
from fedspallm_appfl.events import OnEvent, ignore
from fedspallm_appfl.models.lazy_model import LazyModel
from fedspallm_appfl.models.perplexity import losses
from fedspallm_appfl.rounds.pruning import prune_blocks
from fedspallm_appfl.rounds.source import Source
from fedspallm_appfl.settings.schema import ClientSettings, Config, OwnData
from fedspallm_appfl.tensors.patterns import full_name
from fedspallm_appfl.tensors.target import Target, share_of
from fedspallm_appfl.tensors.targets import Sparsity, Targets
from fedspallm_appfl.wire.packed import Unreached, pack
from fedspallm_appfl.wire.store import PackedStore

WIDTHS = (0.0, 0.08, 0.15, 0.25)  # that `auto` tries
LEVELS = 5  # at which the loss of a matrix is known
MOST = Fraction(98, 100)  # of a matrix that is pruned, but where all are pruned more
LEAST = Fraction(1, 8)  # of the target of all; where almost nothing is pruned, the logarithm of the loss says nothing
JUDGE = "sparsegpt"  # the pruner of the models that widths are judged by, whatever that of the run
NAME = "of the public text"  # what errors call the client that prunes on it


@dataclass(frozen=True)
class Allocation:
    """What was chosen.

    Attributes:
        sparsity: the target of each matrix.
        width: how far targets may be from that of the run.
        losses: width -> mean loss of a token on other windows of the text; empty if the width was given.
        shares: `blocks.N.NAME` -> share, of matrices with a target of their own, in the order of the model.
    """

    sparsity: Sparsity
    width: float
    losses: dict[float, float]
    shares: dict[str, float]


def allocated(config: Config, on_event: OnEvent = ignore) -> Config:
    """The configuration with the targets in it that its `allocation` asks for.

    Args:
        config: without problems; one that was allocated before, or asks for nothing, is returned as it is.
        on_event: called with a dict for each event.

    Raises:
        DataError: the public text cannot be read or is too short.
        ModelError: the model cannot be read, or its experts lie in one tensor.
        PruningError: a matrix cannot be pruned.
    """
    sparsity = config.client_configs.train_configs.sparsity
    if not config.allocates or isinstance(sparsity, Targets):
        return config
    chosen = allocate(config, on_event)
    losses_of = {f"{width:g}": loss for width, loss in chosen.losses.items()}
    on_event({"event": "allocation", "width": chosen.width, "losses": losses_of, "targets": chosen.shares})
    if chosen.losses and not chosen.width:
        on_event(
            {"event": "notice", "text": "allocation: the uniform target lost least on the public text, so it holds"}
        )
    return config.with_sparsity(chosen.sparsity)


def allocate(config: Config, on_event: OnEvent = ignore) -> Allocation:
    """Choose the targets (see `allocated`)."""
    train, settings = config.client_configs.train_configs, config.allocation
    base = train.sparsity.default
    widths = WIDTHS if settings.width == "auto" else (float(settings.width),)
    with threads(train.threads):  # so that the bits do not depend on where the server runs
        model = _opened(config)
        mine, others = public_windows(config, model.skeleton)
        curves = _curves(config, model, mine, max(widths))
        on_event({"event": "allocating", "what": f"{len(curves)} loss curves"})
        made = {width: targets(curves, base, width) for width in widths}
        found: dict[float, float] = {}
        for width in widths if len(widths) > 1 else ():
            found[width] = _loss(config, model, mine, others, made[width])
            on_event({"event": "allocating", "what": f"width {width:g}, loss {found[width]:.4f}"})
    best = min(found, key=lambda width: (found[width], width)) if found else widths[0]
    shares = {full_name(*key): float(made[best].of(*key).share) for key in curves if best}
    return Allocation(made[best], best, found, shares)


def targets(curves: Mapping[Key, Curve], base: Target, width: float) -> Sparsity:
    """The targets within a width of `base`, with as many zeros together as `base` asks for.

    Matrices without a curve keep `base`: nothing is known of them.
    """
    if not width or not curves:
        return base
    total = sum(base.zeros(curve.entries) for curve in curves.values())
    zeros = dict(zip(curves, counts(list(curves.values()), [bounds(base, width)] * len(curves), total), strict=True))
    found = {full_name(*key): share_of(count, curves[key].entries) for key, count in zeros.items()}
    # A pattern means longer names that end with it too; the last one decides, so longer ones come later.
    return Targets(base, tuple(sorted(found.items(), key=lambda one: len(one[0]))))


def bounds(base: Target, width: float) -> tuple[Fraction, Fraction]:
    """The least and the largest share of a matrix."""
    share, wide = base.share, Fraction(str(width))
    return max(share - wide, share * LEAST), min(share + wide, max(share, MOST))


def _curves(config: Config, model: LazyModel, windows: Tensor, width: float) -> dict[Key, Curve]:
    """The loss of each matrix for which it depends on the level."""
    if not width:
        return {}
    train, batch = config.client_configs.train_configs, config.allocation.batch
    least, most = bounds(train.sparsity.default, width)
    levels = [least + (most - least) * step / (LEVELS - 1) for step in range(LEVELS)]
    passed = look(model, windows, levels, train, batch)
    found = sensitivities(model, windows, passed, config.seed, batch)
    made = {
        key: Curve(lost.entries, [float(level) for level in levels], (lost.rows @ found[key]).tolist())
        for key, lost in passed.lost.items()
    }
    return {key: curve for key, curve in made.items() if curve.known()}


def _loss(config: Config, model: LazyModel, mine: Tensor, others: Tensor, sparsity: Sparsity) -> float:
    """The mean loss of a token on other windows, of the model that SparseGPT prunes on some."""
    batch, train = config.allocation.batch, config.client_configs.train_configs
    settings = ClientSettings(
        pruner=JUDGE,
        sparsity=sparsity,
        damping=train.damping,
        damping_retries=train.damping_retries,
        min_tokens=train.min_tokens,
        prune=config.prune,
        data=OwnData(batch=batch),
        client_id=NAME,
    )
    blocks = model.layout.pruned
    with tempfile.TemporaryDirectory(prefix="fedspallm-") as folder:
        store = PackedStore(Path(folder))
        for block, pruned in prune_blocks(Source(model, mine, settings), set(blocks)):
            done = {
                name: pack(one.weight, one.mask, model.skeleton.stored_dtype)
                for name, one in pruned.items()
                if not isinstance(one, Unreached)
            }
            store.save(block, done)
        loss = losses(model, {NAME: others}, store.get, batch)[NAME]
    return loss.total / loss.tokens


def _opened(config: Config) -> LazyModel:
    """The dense model, in arithmetic in which squared gradients do not vanish, as they do in float16."""
    device = choose_device(config.server_configs.device, 0)
    model = LazyModel.of(config, device)
    if model.dtype != torch.float16:
        return model
    return LazyModel.of(dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="float32")), device)
