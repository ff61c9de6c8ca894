"""What has come from whom is kept in bits, and is the set that it stands for."""

import itertools
import random

from fedspallm_appfl.rounds.folds.received import Received


def test_bits_of_clients_and_units_are_a_set():
    dice, bits, plain = random.Random(0), Received(), set()
    every = list(itertools.product("abc", (0, 7), ("q", "k")))
    for count in (1, 1, 2, 1, 3, 0):
        come = dice.sample(every, count)
        for of in (bits, plain):
            of.update(come)
        assert [one in bits for one in every] == [one in plain for one in every]
        assert bits.blocks_of("b") == {block for client, block, _ in plain if client == "b"}
    bits.clear()
    assert not any(one in bits for one in every)
