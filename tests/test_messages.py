"""How an upload is cut into messages."""

import random

import pytest

from fedspallm_appfl.errors import ConfigError
from fedspallm_appfl.messages import plan


def random_sizes(seed):
    """Sizes of up to 8 blocks with up to 5 linears of 1 to 20 bytes."""
    rng = random.Random(seed)
    return [{f"l{j}": rng.randint(1, 20) for j in range(rng.randint(1, 5))} for _ in range(rng.randint(1, 8))]


@pytest.mark.parametrize("blocks_per_message", [1, 2, 3, 100])
@pytest.mark.parametrize("limit", [20, 35, 60, 1000])
def test_every_linear_is_sent_once_in_order_and_within_the_limits(limit, blocks_per_message):
    for seed in range(40):
        sizes = random_sizes(seed)
        messages = plan(sizes, blocks_per_message, limit)
        assert sum(messages, []) == [(block, name) for block, linears in enumerate(sizes) for name in linears]
        for message in messages:
            assert 0 < sum(sizes[block][name] for block, name in message) <= limit
            assert len({block for block, _ in message}) <= blocks_per_message
        for block, linears in enumerate(sizes):
            parts = sum(any(unit[0] == block for unit in message) for message in messages)
            assert (parts > 1) == (sum(linears.values()) > limit)


@pytest.mark.parametrize(
    ("blocks_per_message", "limit", "blocks"),
    [
        (1, 100, [[0], [1], [2], [3], [4]]),
        (2, 100, [[0, 1], [2, 3], [4]]),
        (5, 100, [[0, 1, 2, 3, 4]]),
        (5, 20, [[0, 1], [2, 3], [4]]),
        (5, 19, [[0], [1], [2], [3], [4]]),
    ],
)
def test_five_blocks_of_ten_bytes(blocks_per_message, limit, blocks):
    messages = plan([{"q": 4, "up": 6}] * 5, blocks_per_message, limit)
    assert [list(dict.fromkeys(block for block, _ in message)) for message in messages] == blocks


def test_only_a_block_that_is_too_large_alone_is_split():
    messages = plan([{"a": 3}, {"a": 5, "b": 5, "c": 5}, {"a": 3}], 10, 10)
    assert messages == [[(0, "a")], [(1, "a"), (1, "b")], [(1, "c"), (2, "a")]]


def test_a_matrix_of_exactly_the_limit_fits():
    assert plan([{"a": 10, "b": 10}], 1, 10) == [[(0, "a")], [(0, "b")]]


def test_a_matrix_above_the_limit_is_refused_with_what_to_change():
    with pytest.raises(
        ConfigError, match="block 1, up takes 11 bytes packed, a message may have 10; raise comm_configs"
    ):
        plan([{"q": 1}, {"q": 1, "up": 11}], 1, 10)
