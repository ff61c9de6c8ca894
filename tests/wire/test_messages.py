"""How what travels is cut into messages."""

import random

import pytest

from fedspallm_appfl.errors import ConfigError
from fedspallm_appfl.wire.messages import plan


def random_sizes(seed):
    """Sizes of up to 8 blocks with up to 5 linears of 1 to 20 bytes."""
    rng = random.Random(seed)
    blocks = sorted(rng.sample(range(40), rng.randint(1, 8)))
    return {block: {f"l{j}": rng.randint(1, 20) for j in range(rng.randint(1, 5))} for block in blocks}


@pytest.mark.parametrize("blocks_per_message", [1, 2, 3, 100])
@pytest.mark.parametrize("limit", [20, 35, 60, 1000])
def test_every_linear_is_sent_once_in_order_and_within_the_limits(limit, blocks_per_message):
    for seed in range(40):
        sizes = random_sizes(seed)
        messages = plan(sizes, blocks_per_message, limit)
        assert sum(messages, []) == [(block, name) for block, linears in sizes.items() for name in linears]
        for message in messages:
            assert 0 < sum(sizes[block][name] for block, name in message) <= limit
            assert len({block for block, _ in message}) <= blocks_per_message
        for block, linears in sizes.items():
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
    messages = plan(dict.fromkeys(range(5), {"q": 4, "up": 6}), blocks_per_message, limit)
    assert [list(dict.fromkeys(block for block, _ in message)) for message in messages] == blocks


def test_only_a_block_that_is_too_large_alone_is_split():
    messages = plan({0: {"a": 3}, 1: {"a": 5, "b": 5, "c": 5}, 2: {"a": 3}}, 10, 10)
    assert messages == [[(0, "a")], [(1, "a"), (1, "b")], [(1, "c"), (2, "a")]]


def test_a_matrix_of_exactly_the_limit_fits():
    assert plan({7: {"a": 10, "b": 10}}, 1, 10) == [[(7, "a")], [(7, "b")]]


def test_no_blocks_take_no_messages():
    assert plan({}, 1, 10) == []


def test_a_matrix_above_the_limit_is_refused_with_what_to_change():
    with pytest.raises(
        ConfigError, match="block 1, up takes 11 bytes packed, a message may have at most 10; raise comm_configs"
    ):
        plan({0: {"q": 1}, 1: {"q": 1, "up": 11}}, 1, 10)
