"""Bytes that travel for one matrix, against the dense float16 weight."""

import torch

from benchmarks.context import Context
from benchmarks.models import random_mask
from benchmarks.tables import Table, met
from fedspallm_appfl.wire.packed import pack, pack_mask
from fedspallm_appfl.wire.update import compress, make_update, update_nbytes

TARGETS = {50: (1.75, 2.0), 70: (2.7, 3.2)}  # percent -> (packed, compressed)


def run(context: Context) -> Table:
    side = 128 if context.quick else 4096
    weight = (0.02 * torch.randn(side, side, generator=torch.Generator().manual_seed(0))).half()
    table = Table(f"Payload, {side} x {side}, float16", ("what", "dense MB", "MB", "ratio", "must", "met"))
    for percent, musts in TARGETS.items():
        mask = random_mask(tuple(weight.shape), weight.numel() * percent // 100, seed=percent)
        whole = make_update(0, {0: {"linear": pack(weight, mask, torch.float16)}})
        masks = make_update(0, {0: {"linear": pack_mask(mask)}})
        for what, update, must in zip(
            ("packed", "compressed", "mask alone"), (whole, compress(whole), masks), (*musts, None), strict=True
        ):
            _row(table, f"{percent} %, {what}", weight.nbytes, update_nbytes(update), must)
    table.notes.append(
        "Normally distributed weights and a random mask, which compress less than what a pruner leaves. A mask takes one "
        "bit an entry, so that packed values and mask can give 1.78x at 50 % and 2.76x at 70 %. Clients whose pruner "
        "leaves kept weights as they are send the mask alone."
    )
    return table


def _row(table: Table, what: str, dense: int, size: int, must: float | None) -> None:
    targets = ("", "") if must is None else (f"{must:g}x", met(dense / size, must))
    table.add(what, f"{dense / 1e6:.2f}", f"{size / 1e6:.2f}", f"{dense / size:.2f}x", *targets)
