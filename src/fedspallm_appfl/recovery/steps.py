"""Steps of AdamW on kept entries: which windows each of them sees, and how far it goes.

The learning rate is a share of a matrix's own magnitude, so that one number serves models whose weights differ in size, and
goes down in a line to zero. Weight decay is none: it would shrink what pruning has left.

Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fedspallm_appfl.errors import PruningError
from fedspallm_appfl.recovery.kept import Kept
from fedspallm_appfl.settings.schema import Recovery
from fedspallm_appfl.tensors import seeds

BETAS = (0.9, 0.95)


def generator(*names: object) -> torch.Generator:
    """Random numbers of recovery (see `seeds`)."""
    return seeds.generator("recovery", *names)


def order(batches: int, steps: int, each: int, random: torch.Generator) -> Iterator[list[int]]:
    """The batches of each step: all of them in a random order, then in another, as long as there are steps."""
    waiting: list[int] = []
    for _ in range(steps):
        while len(waiting) < each:
            waiting += torch.randperm(batches, generator=random).tolist()
        yield waiting[:each]
        del waiting[:each]


def train(
    kept: Sequence[Kept],
    settings: Recovery,
    steps: Sequence[list[int]],
    loss_of: Callable[[int], Tensor],
    where: str,
) -> None:
    """Change kept entries so that the loss falls.

    Args:
        kept: what is changed, in place; the blocks compute with it afterwards.
        settings: the learning rate.
        steps: the batches of each step.
        loss_of: batch -> its mean loss, with a graph.
        where: whom to name in errors.

    Raises:
        PruningError: the loss is not finite.
    """
    groups = [{"params": [one.values], "lr": settings.reach * one.magnitude} for one in kept if len(one.values)]
    if not groups:
        return
    optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0, foreach=False)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(steps))
    for batches in steps:
        for number in batches:
            with torch.enable_grad():
                loss = loss_of(number) / len(batches)
                if not bool(loss.isfinite()):
                    raise PruningError(f"{where}: the loss of recovery is {float(loss.detach())}; lower recovery.lr")
                loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        for one in kept:
            one.put_back()
