"""Sums at rest: what comes back, rounds on top of each other, damaged files."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedspallm_appfl.errors import ModelError
from fedspallm_appfl.pruning.from_sums import Sums
from fedspallm_appfl.wire import store as on_disk
from fedspallm_appfl.wire.store import GramStore

NAMES = ("self_attn.q_proj", "self_attn.k_proj")


def sums(side=6, seed=0, tokens=20):
    inputs = torch.randn(tokens, side, generator=torch.Generator().manual_seed(seed))
    return Sums((inputs.T @ inputs).triu(), tokens)


@pytest.fixture
def store(tmp_path):
    return GramStore(tmp_path / "deep" / "statistics")


@pytest.mark.parametrize("side", [1, 2, 6, 300])
@pytest.mark.parametrize("rounded", [False, True])
def test_what_is_stored_comes_back_bit_for_bit(store, side, rounded):
    store.save(3, NAMES, sums(side), rounded)
    names, back, was_rounded = store.load(3, NAMES[0])
    assert names == NAMES
    assert was_rounded is rounded
    assert torch.equal(back.upper, sums(side).upper)
    assert (back.tokens, back.drift) == (20, None)


def test_half_of_the_matrix_takes_half_of_the_room(store):
    store.save(0, NAMES, sums(300), False)
    [file] = store.folder.iterdir()
    assert file.stat().st_size < 4 * 300 * 301 // 2 + 1000


def test_the_sums_are_not_shared_with_what_was_given(store):
    given = sums()
    store.save(0, NAMES, given, False)
    given.upper.zero_()
    assert torch.equal(store.load(0, NAMES[0])[1].upper, sums().upper)


def test_what_is_not_there_is_none(store):
    assert store.load(0, NAMES[0]) is None
    assert store.units() == []
    store.save(0, NAMES, sums(), False)
    assert store.load(0, NAMES[1]) is None
    assert store.load(1, NAMES[0]) is None


def test_units_are_in_order_of_blocks_also_beyond_nine(store):
    for block in (10, 2, 0):
        for name in ("up-down.proj", "a"):
            store.save(block, (name,), sums(), False)
    (store.folder / "0001-b.partial").write_bytes(b"half of one")
    expected = [(block, name) for block in (0, 2, 10) for name in ("a", "up-down.proj")]
    assert store.units() == expected
    assert all(store.load(*unit) for unit in expected)


def test_a_new_round_replaces_or_adds(store):
    def added(new):
        total = store.added(0, NAMES[0], new)
        store.save(0, NAMES, total, True)
        return total

    first, second = sums(seed=1, tokens=20), sums(seed=2, tokens=30)
    assert added(sums(seed=1, tokens=20)).tokens == 20
    total = added(sums(seed=2, tokens=30))
    names, stored, rounded = store.load(0, NAMES[0])
    assert (names, stored.tokens, total.tokens, rounded) == (NAMES, 50, 50, True)
    assert torch.equal(stored.upper, first.upper + second.upper)
    assert torch.equal(total.upper, stored.upper)
    assert added(sums()).tokens == 70
    store.save(0, NAMES, sums(), False)
    assert (store.load(0, NAMES[0])[1].tokens, store.load(0, NAMES[0])[2]) == (20, False)


def rewritten(file, change):
    tensors, facts = load_file(file), {"linears": json.dumps(NAMES), "tokens": "20", "rounded": "false"}
    tensors, facts = change(tensors, facts)
    save_file(tensors, file, metadata=facts)


DAMAGE = {
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:-5]),
    "empty": lambda file: file.write_bytes(b""),
    "rubbish": lambda file: file.write_bytes(b"\xff" * 100),
    "no facts": lambda file: rewritten(file, lambda tensors, facts: (tensors, None)),
    "no tokens": lambda file: rewritten(
        file, lambda tensors, facts: (tensors, {k: v for k, v in facts.items() if k != "tokens"})
    ),
    "tokens in words": lambda file: rewritten(file, lambda tensors, facts: (tensors, facts | {"tokens": "many"})),
    "linears no list": lambda file: rewritten(file, lambda tensors, facts: (tensors, facts | {"linears": "["})),
    "no diagonal": lambda file: rewritten(file, lambda tensors, facts: ({"upper": tensors["upper"]}, facts)),
    "too few": lambda file: rewritten(file, lambda t, facts: (t | {"upper": t["upper"][:-1].clone()}, facts)),
    "too many": lambda file: rewritten(file, lambda t, facts: (t | {"upper": torch.cat([t["upper"]] * 2)}, facts)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_file_is_named(store, damage):
    store.save(0, NAMES, sums(), False)
    [file] = store.folder.iterdir()
    damage(file)
    with pytest.raises(ModelError, match="0000-self_attn.q_proj.safetensors is damaged: .*run the experiment again"):
        store.load(0, NAMES[0])


def test_a_disk_that_is_full_is_said_and_leaves_what_was_there(store, monkeypatch):
    store.save(0, NAMES, sums(), False)

    def full(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(on_disk, "save_file", full)
    with pytest.raises(ModelError, match="the sums of block 0, self_attn.q_proj cannot be stored in .* No space left"):
        store.save(0, NAMES, sums(seed=3), True)
    assert torch.equal(store.load(0, NAMES[0])[1].upper, sums().upper)
    assert store.units() == [(0, NAMES[0])]
