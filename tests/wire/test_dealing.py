"""Matrices are dealt to ranks, and messages cut accordingly: nothing is lost, nothing goes twice."""

import pytest

from fedspallm_appfl.wire.messages import owners, shares

BLOCK = {
    "q": (64, 64),
    "k": (16, 64),
    "v": (16, 64),
    "o": (64, 64),
    "gate": (160, 64),
    "up": (160, 64),
    "down": (64, 160),
}
SHAPES = dict.fromkeys(range(6), BLOCK)
ENTRIES = {name: rows * columns for name, (rows, columns) in BLOCK.items()}


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_ranks_get_about_as_many_entries(ranks):
    owner = owners(SHAPES, ranks, whole=False)
    assert owner.keys() == {(block, name) for block in SHAPES for name in BLOCK}
    loads = [sum(ENTRIES[name] for (_, name), rank in owner.items() if rank == 1 + number) for number in range(ranks)]
    assert max(loads) - min(loads) <= max(ENTRIES.values())


def test_more_ranks_than_matrices_leave_some_without():
    assert set(owners({0: {"a": (1, 1), "b": (2, 1)}}, 3, whole=False).values()) == {1, 2}


def test_a_block_stays_together_where_it_has_to():
    owner = owners(SHAPES, 4, whole=True)
    assert all(len({owner[block, name] for name in BLOCK}) == 1 for block in SHAPES)
    assert set(owner.values()) == {1, 2, 3, 4}


def test_what_belongs_to_no_rank_goes_to_the_first():
    """Which refuses it by name."""
    update = {"blocks": {"0": {"foo": 1}, "x": {"q": 2}}}
    assert shares({"a": update}, owners(SHAPES, 3, whole=False)) == {1: {"a": update}}


def test_parts_of_messages_are_messages_and_make_up_the_whole():
    updates = {
        "a": {"format": "f", "round": 1, "exchange": 0, "blocks": {"0": {"q": 1, "k": 2}, "3": {"up": 3}}},
        "b": {"format": "f", "round": 1, "exchange": 0, "blocks": {"0": {"q": 4}}},
        "c": {},
    }
    owner = owners(SHAPES, 2, whole=False)
    parts, found = shares(updates, owner), {}
    for rank, clients in parts.items():
        for client, part in clients.items():
            assert {key: value for key, value in part.items() if key != "blocks"} == {
                "format": "f",
                "round": 1,
                "exchange": 0,
            }
            for block, units in part["blocks"].items():
                for name, value in units.items():
                    assert owner[int(block), name] == rank
                    assert found.setdefault((client, block, name), value) is value
    assert found == {("a", "0", "q"): 1, ("a", "0", "k"): 2, ("a", "3", "up"): 3, ("b", "0", "q"): 4}
    assert list(updates["a"]["blocks"]["0"]) == ["q", "k"]  # what was sent is as it was
