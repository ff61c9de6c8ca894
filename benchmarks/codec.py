"""Packing and unpacking one block, on one core, beside torch's own masked operations."""

import torch

from benchmarks.context import Context
from benchmarks.measure import interleave, seconds
from benchmarks.tables import Table, met
from benchmarks.uploads import SEVEN_B, SMALL, matrix
from fedspallm_appfl.wire.packed import pack
from fedspallm_appfl.wire.update import compress, make_update, read_matrices

MUST, AIM = 1.0, 4.0


def run(context: Context) -> Table:
    shapes = SMALL if context.quick else SEVEN_B
    pairs = [matrix(shape, seed) for seed, shape in enumerate(shapes.values())]
    packed = [pack(weight, mask, torch.float16) for weight, mask in pairs]
    update = make_update(0, {0: dict(zip(shapes, packed, strict=True))})
    compressed = compress(update)
    dense = sum(weight.numel() for weight, _ in pairs) * 2
    blank = [torch.zeros_like(weight) for weight, _ in pairs]
    ways = {
        "encode, torch weight[mask]": lambda: [weight[mask] for weight, mask in pairs],
        "encode, ours": lambda: [pack(weight, mask, torch.float16) for weight, mask in pairs],
        "decode, torch masked_scatter": lambda: [
            torch.zeros_like(weight).masked_scatter_(mask, one.values)
            for (weight, mask), one in zip(pairs, packed, strict=True)
        ],
        "decode, ours, into a block's weights": lambda: [
            one.unpack_weight(out=weight) for one, weight in zip(packed, blank, strict=True)
        ],
        "decode, ours, into new memory": lambda: [one.unpack_weight() for one in packed],
        "decode with mask, ours": lambda: [(one.unpack_weight(), one.unpack_mask()) for one in packed],
        "compress": lambda: compress(update),
        "decompress": lambda: read_matrices(compressed, torch.float16),
    }
    times = interleave(2 if context.quick else 3, *(lambda work=work: seconds(work) for work in ways.values()))
    columns = ("what", "GB/s", "range", "must", "aim", "met")
    table = Table(f"Codec, a block of {dense / 1e6:.1f} MB dense, 50 %", columns)
    for what, taken in zip(ways, times, strict=True):
        speed = dense / 1e9 / min(taken)
        targets = (f"{MUST:g}", f"{AIM:g}", met(speed, MUST, AIM)) if "ours" in what else ("", "", "")
        table.add(what, f"{speed:.2f}", f"{dense / 1e9 / max(taken):.2f} .. {speed:.2f}", *targets)
    table.notes.append(
        "Of dense float16 bytes. torch is given a mask of one byte an entry and neither packs nor unpacks its bits. "
        "Filling memory that is new to the process takes longer than decoding into it, on a virtual machine much longer. "
        "Compression comes on top of encoding, where it is asked for."
    )
    return table
