"""Split the uploads of a round into messages: groups of blocks, each below a size limit.

APPFL sends one buffer per message, and MPI allows 2^31 - 1 bytes. Every client sends the same number of messages in the
same order. A message covers the same blocks for all clients and is empty if none is assigned. The server thus has few open
blocks, and batched clients of one MPI rank never wait for each other across ranks.
"""

from collections.abc import Mapping

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
