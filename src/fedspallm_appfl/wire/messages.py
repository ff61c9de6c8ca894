"""Split the uploads of a round into messages: groups of blocks, each below a size limit.

APPFL sends one buffer per message, and MPI allows 2^31 - 1 bytes. Every client sends the same number of messages in the
same order. A message covers the same blocks for all clients and is empty if none is assigned. The server thus has few open
blocks, and batched clients of one MPI rank never wait for each other across ranks.
"""

from collections.abc import Mapping
from typing import Any

from fedspallm_appfl.errors import ConfigError

Unit = tuple[int, str]


def plan(sizes: Mapping[int, Mapping[str, int]], blocks_per_message: int, limit: int) -> list[list[Unit]]:
    """Group the linears of some blocks into messages.

    Args:
        sizes: block -> linear -> bytes that its packed matrix takes.
        blocks_per_message: blocks in a message; fewer if they exceed the limit.
        limit: bytes of a message.

    Returns:
        For each message its (block, linear) pairs. A block is split only if it exceeds the limit alone.

    Raises:
        ConfigError: one matrix exceeds the limit.
    """
    messages: list[list[Unit]] = []
    taken, blocks_in = 0, 0
    for block, linears in sizes.items():
        whole = sum(linears.values())
        if not messages or blocks_in == blocks_per_message or taken + whole > limit:
            messages.append([])
            taken, blocks_in = 0, 0
        for name, size in linears.items():
            if size > limit:
                raise ConfigError(
                    f"block {block}, {name} takes {size} bytes packed, a message may have at most {limit}; raise "
                    "comm_configs.max_message_bytes, or put fewer clients on an MPI rank"
                )
            if taken + size > limit:
                messages.append([])
                taken, blocks_in = 0, 0
            messages[-1].append((block, name))
            taken += size
        blocks_in += 1
    return messages


def owners(shapes: Mapping[int, Mapping[str, tuple[int, int]]], ranks: int, whole: bool) -> dict[Unit, int]:
    """Deal matrices to ranks 1, 2, ... so that all get about as many entries, also of every few blocks.

    Args:
        shapes: for each block (O, I) of each linear.
        ranks: how many ranks there are.
        whole: matrices of a block stay together.
    """
    loads, owner = [0] * ranks, dict[Unit, int]()
    for block, linears in sorted(shapes.items()):
        sizes = {name: rows * columns for name, (rows, columns) in linears.items()}
        together = [list(sizes)] if whole else [[name] for name in sorted(sizes, key=lambda name: -sizes[name])]
        for names in together:
            least = loads.index(min(loads))
            loads[least] += sum(sizes[name] for name in names)
            owner |= {(block, name): 1 + least for name in names}
    return owner


def shares(updates: Mapping[str, Any], owner: Mapping[Unit, int]) -> dict[int, dict[str, Any]]:
    """What each fold rank gets of the messages of some clients: rank -> client -> a part of its message.

    What belongs to no rank goes to the first, which says what is wrong with it.
    """
    owners_of = {(str(block), name): rank for (block, name), rank in owner.items()}
    parts: dict[int, dict[str, Any]] = {}
    for client, update in updates.items():
        for block, units in update.get("blocks", {}).items():
            for name, packed in units.items():
                part = parts.setdefault(owners_of.get((block, name), 1), {}).setdefault(
                    client, {**update, "blocks": {}}
                )
                part["blocks"].setdefault(block, {})[name] = packed
    return parts
