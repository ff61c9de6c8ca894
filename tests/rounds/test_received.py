"""What has come from whom is kept in bits, and is the set that it stands for."""

import itertools
import random

from fedspallm_appfl.rounds.received import Received


def test_bits_of_clients_and_units_are_a_set():
    dice, bits, plain = random.Random(0), Received(), set()
    every = list(itertools.product("abc", (0, 7), ("q", "k")))
    for _ in range(300):
        one = dice.choice(every)
        change = "discard" if one in plain and dice.random() < 0.7 else "add"
        for of in (bits, plain):
            getattr(of, change)(one)
        assert [one in bits for one in every] == [one in plain for one in every]
        assert (set(bits), len(bits)) == (plain, len(plain))
        assert bits.blocks_of("b") == {block for client, block, _ in plain if client == "b"}
    bits.clear()
    assert not bits and ("a", 0, "q") not in bits
