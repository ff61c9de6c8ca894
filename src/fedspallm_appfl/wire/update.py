"""What travels: one update, up or down, a plain dict of tensors, strings and integers.

    {"format": "fedspallm-update/2", "round": 0, "exchange": 0,
     "blocks": {"3": {"self_attn.q_proj": {"shape": [O, I], "mask": uint8, "values": float}}}}

An update that goes down may come in several pieces and then says which it is: `"piece": 0, "pieces": 2`. What stands under
the name of a matrix is described in `packed`, statistics of an input in `grams`, compressed parts in `compression`.

Nothing in it needs pickle: `torch.load(weights_only=True)` takes it, and every communicator carries it unchanged. Whoever
receives one checks it with `check_update` against what was asked for before looking at a value.

Legend: O out features, I in features.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedspallm_appfl.aggregation.l0_mean import largest_magnitude
from fedspallm_appfl.errors import quoted, shortened
from fedspallm_appfl.tensors import bitmask
from fedspallm_appfl.tensors.target import NM, Target
from fedspallm_appfl.wire.compression import Parts, deflated, inflated, is_plain, require
from fedspallm_appfl.wire.deltas import PackedDelta, parts_of_delta
from fedspallm_appfl.wire.grams import MOST_TOKENS, PackedGram
from fedspallm_appfl.wire.packed import Packed, Unreached

FORMAT = "fedspallm-update/2"

Unit = Packed | PackedGram | PackedDelta | Unreached  # what travels under one name
Units = tuple[tuple[int, str, Any], ...]  # (block, name, unit)
Check = Callable[[Any, str], Any]  # what arrived for a unit, and what to name in errors -> the unit


def make_update(round_index: int, blocks: Mapping[int, Mapping[str, Unit]], exchange: int = 0) -> dict[str, Any]:
    """Wrap packed units of some blocks for the wire."""
    packed = {str(block): {name: unit.to_dict() for name, unit in units.items()} for block, units in blocks.items()}
    return {"format": FORMAT, "round": round_index, "exchange": exchange, "blocks": packed}


def compress(update: Mapping[str, Any]) -> dict[str, Any]:
    """The same update with every part as a zstandard frame that is smaller so."""
    blocks = {
        block: {name: deflated(packed) for name, packed in linears.items()}
        for block, linears in update["blocks"].items()
    }
    return {**update, "blocks": blocks}


def without_tensors(update: Mapping[str, Any]) -> dict[str, Any]:
    """What an update is of."""
    return {**update, "blocks": {block: dict.fromkeys(linears) for block, linears in update["blocks"].items()}}


def units_of(update: Mapping[str, Any]) -> set[tuple[int, str]]:
    """Block and name of all that an update holds."""
    return {(int(block), name) for block, linears in update["blocks"].items() for name in linears}


def read_matrices(update: Mapping[str, Any], dtype: torch.dtype) -> dict[int, dict[str, Packed]]:
    """The matrices of an update that the server sent, compressed or not; `dtype` is that of the values.

    Raises:
        UpdateError: a part is not a frame of the right size.
    """
    return {
        int(block): {name: _read(packed, f"block {block}, {name}", dtype) for name, packed in linears.items()}
        for block, linears in update["blocks"].items()
    }


def _read(packed: Mapping[str, Any], where: str, dtype: torch.dtype) -> Packed:
    shape = _shape(packed["shape"])
    mask = _mask(packed, where, shape)
    values = inflated(packed, "values", where, bitmask.count(mask), dtype) if "values" in packed else None
    return Packed(shape, mask, values)


def _shape(sizes: list[int]) -> tuple[int, int]:
    rows, columns = sizes
    return rows, columns


def _mask(packed: Mapping[str, Any], where: str, shape: tuple[int, int]) -> Tensor:
    """The mask as it was before compression; nothing but the shape has been checked."""
    return inflated(packed, "mask", where, -(-shape[0] * shape[1] // 8), torch.uint8)


def update_nbytes(update: Mapping[str, Any]) -> int:
    """Bytes of all tensors of an update; the dict around them adds less than a kilobyte a matrix."""
    return sum(block_nbytes(update).values())


def block_nbytes(update: Mapping[str, Any]) -> dict[int, int]:
    """Bytes of the tensors of each block of an update, as they travel: compressed or not."""
    linears = update["blocks"].items() if update else ()
    return {int(block): sum(map(_nbytes, packed.values())) for block, packed in linears}


def _named(key: Any) -> str:
    return shortened(key) if type(key) is str else quoted(key)


def _nbytes(packed: Mapping[str, Any]) -> int:
    return sum(part.nbytes for part in packed.values() if isinstance(part, Tensor))


def check_update(
    update: Any, sender: str, round_index: int, exchange: int, expected: Mapping[int, Mapping[str, Check]]
) -> Units:
    """Refuse an update that is not what was asked for.

    Args:
        update: what arrived.
        sender: whom to name in the error.
        round_index: the round that is on.
        exchange: the exchange of the round that is on.
        expected: for each block that the sender may send, how each unit of it is checked.

    Returns:
        Its units, with nothing compressed in them.

    Raises:
        UpdateError: the first thing that is wrong, with sender, block and linear.
    """
    named = isinstance(update, Mapping) and type(update.get("format")) is str and update["format"] == FORMAT
    require(named, sender, f"the format must be {FORMAT}")
    keys = {"format", "round", "exchange", "blocks"}
    require(set(update) == keys, sender, f"the keys are {quoted(sorted(_named(key) for key in update))}")
    for key, now in (("round", round_index), ("exchange", exchange)):
        right = type(update[key]) is int and update[key] == now
        require(right, sender, f"it is for {key} {quoted(update[key])}, this is {key} {now}")
    require(isinstance(update["blocks"], Mapping), sender, "`blocks` is not a dict")
    assigned = {str(block): checks for block, checks in expected.items()}
    return tuple(_checked_units(update["blocks"], sender, assigned))


def _checked_units(
    blocks: Mapping[str, Any], sender: str, assigned: Mapping[str, Mapping[str, Check]]
) -> Iterator[tuple[int, str, Any]]:
    for key, units in blocks.items():
        known = type(key) is str and key in assigned
        require(
            known, sender, f"block {quoted(key)} was not assigned; assigned were {sorted(map(int, assigned))}, as text"
        )
        require(isinstance(units, Mapping), sender, f"block {key} is not a dict")
        for name, packed in units.items():
            where = f"{sender}, block {key}, {_named(name)}"
            known = type(name) is str and name in assigned[key]
            require(known, where, f"there is no such linear; there are {sorted(assigned[key])}")
            yield int(key), name, assigned[key][name](packed, where)


def check_expert(check: Check, statistics: bool) -> Check:
    """How a unit of an expert is checked: it may say that too few tokens reached it, and else says how many did.

    Args:
        check: how it would be checked otherwise.
        statistics: whether it is of statistics, which say so anyway.
    """

    def checked(packed: Any, where: str) -> Any:
        require(isinstance(packed, Mapping), where, "it is not a dict")
        if "unreached" in packed:
            require(set(packed) <= {"unreached", "zstd"} and not packed.get("zstd"), where, "it has nothing else")
            return Unreached(_tokens(packed, "unreached", 0, where))
        if statistics:
            return check(packed, where)
        made = check({name: part for name, part in packed.items() if name != "tokens"}, where)
        return replace(made, tokens=_tokens(packed, "tokens", 1, where))

    return checked


def _tokens(packed: Mapping[str, Any], key: str, least: int, where: str) -> int:
    tokens = packed.get(key)
    right = type(tokens) is int and least <= tokens <= MOST_TOKENS
    require(right, where, f"`{key}` is a number of tokens from {least} to {MOST_TOKENS}, got {quoted(tokens)}")
    return int(tokens or 0)


def check_matrix(
    packed: Any, where: str, shape: tuple[int, int], dtype: torch.dtype, target: Target, mask_only: bool = False
) -> Packed:
    """Refuse a packed matrix that has not this shape, dtype and sparsity; returns it with nothing compressed.

    Args:
        packed: what arrived.
        where: what to name in the error.
        shape: (O, I).
        dtype: dtype that the values must have.
        target: sparsity that the mask must have.
        mask_only: it comes without values.

    Raises:
        UpdateError: the first thing that is wrong.
    """
    _check_parts(packed, where, shape, ["mask"] if mask_only else ["mask", "values"])
    mask = _mask(packed, where, shape)
    _check_mask(mask, where, shape, target)
    if mask_only:
        return Packed(shape, mask)
    return _finite(Packed(shape, mask, inflated(packed, "values", where, bitmask.count(mask), dtype)), where)


def check_values(packed: Any, where: str, agreed: Packed, dtype: torch.dtype) -> Packed:
    """Refuse values that do not fit under an agreed mask; returns them with that mask and nothing compressed.

    Raises:
        UpdateError: the first thing that is wrong.
    """
    _check_parts(packed, where, agreed.shape, ["values"])
    return _finite(Packed(agreed.shape, agreed.bits, inflated(packed, "values", where, agreed.kept, dtype)), where)


def check_gram(packed: Any, where: str, parts: Parts) -> PackedGram:
    """Refuse statistics that are not what was asked for; returns them with nothing compressed.

    Args:
        packed: what arrived.
        where: what to name in the error.
        parts: as `grams.parts_of` says.

    Raises:
        UpdateError: the first thing that is wrong.
    """
    expected = {"tokens", *parts}
    complete = isinstance(packed, Mapping) and set(packed) - {"zstd"} == expected
    require(complete, where, f"statistics have the keys {', '.join(sorted(expected))}, and `zstd` if compressed")
    require(all(is_plain(packed[part]) for part in parts), where, f"{', '.join(parts)} must be tensors in memory")
    plain = {part: inflated(packed, part, where, *shape) for part, shape in parts.items()}
    made = PackedGram(packed["tokens"], **plain)
    problem = made.problem()
    require(problem is None, where, problem or "")
    return made


def check_delta(packed: Any, where: str, count: int, precision: str, largest: float) -> PackedDelta:
    """Refuse a change that is not one of so many entries; returns it with nothing compressed.

    Args:
        packed: what arrived.
        where: what to name in the error.
        count: entries that travel.
        precision: in which they do.
        largest: the largest magnitude that one may have.

    Raises:
        UpdateError: the first thing that is wrong.
    """
    parts = parts_of_delta(count, precision)
    complete = isinstance(packed, Mapping) and set(packed) - {"zstd"} == set(parts)
    require(complete, where, f"a change has the keys {', '.join(sorted(parts))}, and `zstd` if compressed")
    require(all(is_plain(packed[part]) for part in parts), where, f"{', '.join(parts)} must be tensors in memory")
    made = PackedDelta(**{part: inflated(packed, part, where, *shape) for part, shape in parts.items()})
    require(bool(made.scale.isfinite().all()), where, "a scale is finite")
    require(not bool((made.scale < 0).any()), where, "a scale is not negative")
    require(bool(made.levels.isfinite().all()), where, "levels are finite")
    changed = largest_magnitude(made.changes(count))
    require(
        changed <= largest,
        where,
        f"weights change by {changed:g}, and the largest of the matrix is {largest:g}: no honest client sends more",
    )
    return made


def _check_parts(packed: Any, where: str, shape: tuple[int, int], parts: list[str]) -> None:
    complete = isinstance(packed, Mapping) and set(packed) - {"zstd"} == {"shape", *parts}
    require(complete, where, f"a matrix has the keys shape, {', '.join(parts)}, and `zstd` if compressed")
    right_shape = type(packed["shape"]) is list and all(type(n) is int for n in packed["shape"])
    right_shape = right_shape and packed["shape"] == list(shape)
    require(right_shape, where, f"the shape is {quoted(packed['shape'])}, expected {list(shape)}")
    plain = all(is_plain(packed[part]) for part in parts)
    require(plain, where, f"{' and '.join(parts)} must be {'tensors' if len(parts) > 1 else 'a tensor'} in memory")


def _check_mask(mask: Tensor, where: str, shape: tuple[int, int], target: Target) -> None:
    entries = shape[0] * shape[1]
    beyond = int(mask[-1]) >> (entries % 8) if entries % 8 else 0
    require(beyond == 0, where, "bits beyond the last entry of the mask are set")
    kept, expected = bitmask.count(mask), entries - target.zeros(entries)
    require(kept == expected, where, f"the mask keeps {kept} entries, sparsity {target} keeps {expected}")
    if isinstance(target, NM):
        groups = bitmask.from_bits(mask, (entries // target.group, target.group)).sum(1)
        require(bool((groups == target.kept).all()), where, f"the mask does not keep {target} in every group")


def _finite(packed: Packed, where: str) -> Packed:
    require(packed.largest < float("inf"), where, "the values hold NaN or infinity")
    return packed


def checked_losses(client: str, losses: Any) -> dict[str, Any]:
    """Refuse what is not the measurement of a client.

    Args:
        client: who sent it.
        losses: what arrived; `{"tokens": number, "dense": sum of losses, "pruned": sum of losses}`.

    Raises:
        UpdateError: it has other keys or types.
    """
    sender = f"client {client}"
    require(isinstance(losses, Mapping) and set(losses) == {"tokens", "dense", "pruned"}, sender, "these are no losses")
    _tokens(losses, "tokens", 0, sender)
    for name in ("dense", "pruned"):
        right = type(losses[name]) is float and 0 <= losses[name] < float("inf")
        require(right, sender, f"`{name}` is a sum of losses, finite and not negative, got {quoted(losses[name])}")
    return dict(losses)
