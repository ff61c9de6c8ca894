"""Steps of AdamW on what is trained: which windows each of them sees, and how far it goes.

The learning rate is a share of a matrix's own magnitude, so that one number serves models whose weights differ in size, and
goes down in a line to zero. How large it may be differs by model and sparsity nevertheless: unless it is given, each client
tries the first step with smaller and smaller ones, and begins with the one that lowers the loss most. Weight decay is none:
it would shrink what pruning has left.

Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fedspallm_appfl.errors import PruningError
from fedspallm_appfl.recovery.trained import Trained
from fedspallm_appfl.settings.schema import Recovery
from fedspallm_appfl.tensors import seeds

BETAS = (0.9, 0.95)
TRIES = 8  # of learning rates, each half of the one before


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


def batches_of_step(recovery: Recovery, batch: int) -> int:
    """How many batches a step takes, if a batch has so many windows."""
    return max(1, recovery.batch // batch)


def fewest_windows(windows: int, batch: int, batches: int) -> int:
    """How many windows lie in so many batches at least, in an order as of `order`: the last of a text may be small."""
    of_text = -(-windows // batch)
    passes, rest = divmod(batches, of_text)
    last = windows - (of_text - 1) * batch
    return passes * windows + (last + (rest - 1) * batch if rest else 0)


def train(
    trained: Sequence[Trained],
    settings: Recovery,
    steps: Sequence[list[int]],
    loss_of: Callable[[int], Tensor],
    where: str,
    stepped: Callable[[int], None] = lambda done: None,
) -> None:
    """Change what is trained so that the loss falls.

    Args:
        trained: what is changed, in place; the blocks compute with it afterwards.
        settings: the learning rate.
        steps: the batches of each step.
        loss_of: batch -> its mean loss, with a graph.
        where: whom to name in errors.
        stepped: hears how many steps are done, before each of them.

    Raises:
        PruningError: the loss is not finite.
    """
    trained = [one for one in trained if len(one.values)]
    if not trained:
        return
    reach = settings.reach if settings.lr is not None else found(trained, settings.reach, steps[0], loss_of, where)
    groups = [{"params": [one.values], "lr": reach * one.magnitude} for one in trained]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0, foreach=False)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(steps))
    for number, batches in enumerate(steps):
        stepped(number)
        _differentiate(batches, loss_of, where)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        for one in trained:
            one.put_back()


def _differentiate(batches: Sequence[int], loss_of: Callable[[int], Tensor], where: str) -> float:
    """Make the gradients of a step; returns its loss."""
    total = 0.0
    for number in batches:
        with torch.enable_grad():
            loss = loss_of(number) / len(batches)
            if not bool(loss.isfinite()):
                raise PruningError(f"{where}: the loss of recovery is {float(loss.detach())}; lower recovery.lr")
            loss.backward()
        total += float(loss.detach())
    return total


@torch.no_grad()
def found(
    trained: Sequence[Trained], reach: float, batches: Sequence[int], loss_of: Callable[[int], Tensor], where: str
) -> float:
    """The learning rate with which the first step of AdamW lowers the loss of its own batches most.

    Halves of `reach` are tried as long as each is better than the one before. Values are left as they were.

    Args:
        trained: what would be changed.
        reach: the largest to try, as a share of a matrix's magnitude.
        batches: of the first step.
        loss_of: batch -> its mean loss.
        where: whom to name in errors.

    Raises:
        PruningError: the loss is not finite before anything was changed.
    """
    best = _differentiate(batches, loss_of, where), reach / 2**TRIES
    before = [one.values.detach().clone() for one in trained]
    signs = [torch.zeros_like(one.values) if one.values.grad is None else one.values.grad.sign() for one in trained]
    for one in trained:
        one.values.grad = None
    for tried in (reach / 2**number for number in range(TRIES)):
        for one, old, sign in zip(trained, before, signs, strict=True):
            one.values.copy_(old).sub_(sign, alpha=tried * one.magnitude)
            one.put_back()
        loss = sum(float(loss_of(number)) for number in batches) / len(batches)
        if loss < best[0]:
            best = loss, tried
        elif best[1] > tried:  # the one before was better
            break
    for one, old in zip(trained, before, strict=True):
        one.values.copy_(old)
        one.put_back()
    return best[1]
