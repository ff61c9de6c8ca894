"""Packed blocks on disk."""

import pytest
import torch

from fedspallm_appfl.wire import store as packed_store
from fedspallm_appfl.wire.packed import pack
from fedspallm_appfl.wire.store import PackedStore


def linears(*names, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.rand(3, 5, generator=generator) for _ in names]
    return {name: pack(weight - 0.5, weight > 0.5, dtype) for name, weight in zip(names, draw, strict=True)}


def equal(one, other):
    """Whether two blocks hold the same linears, shapes and bits."""
    same_names = one.keys() == other.keys()
    return same_names and all(
        one[name].shape == other[name].shape
        and one[name].values.dtype == other[name].values.dtype
        and torch.equal(one[name].mask, other[name].mask)
        and torch.equal(one[name].values, other[name].values)
        for name in one
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_block_is_loaded_as_it_was_saved(tmp_path, dtype):
    block = linears("self_attn.q_proj", "mlp.up_proj", dtype=dtype)
    PackedStore(tmp_path / "new" / "folder").save(3, block)
    assert equal(PackedStore(tmp_path / "new" / "folder").get(3), block)


def test_a_block_that_is_not_stored_is_none(tmp_path):
    assert PackedStore(tmp_path / "nowhere").get(0) is None
    assert PackedStore(tmp_path / "nowhere").blocks() == []


def test_blocks_are_listed_by_number(tmp_path):
    store = PackedStore(tmp_path)
    for block in (10, 2, 12345, 0):
        store.save(block, linears("q"))
    assert store.blocks() == [0, 2, 10, 12345]


def test_saving_replaces_a_block_and_adding_keeps_its_other_linears(tmp_path):
    store = PackedStore(tmp_path)
    store.save(1, linears("q", "k"))
    store.save(1, linears("q", seed=1))
    assert equal(store.get(1), linears("q", seed=1))
    store.add(1, linears("up"))
    store.add(1, linears("up", seed=2))
    assert equal(store.get(1), linears("q", seed=1) | linears("up", seed=2))


def test_the_same_block_is_the_same_file_in_the_same_order(tmp_path):
    block = linears(*"abcdefgh")
    files, orders = [], []
    for number in range(4):
        store = PackedStore(tmp_path / str(number))
        store.save(0, dict(sorted(block.items(), reverse=number % 2 == 1)))
        files += [file.read_bytes() for file in store.folder.iterdir()]
        orders.append(list(store.get(0)))
    assert len(files) == 4
    assert len(set(files)) == 1
    assert all(order == orders[0] for order in orders)


def test_a_run_that_is_killed_while_it_saves_leaves_what_was_there(tmp_path, monkeypatch):
    def half_a_file(tensors, file, metadata):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    store = PackedStore(tmp_path)
    store.save(0, linears("q"))
    monkeypatch.setattr(packed_store, "save_file", half_a_file)
    for block in (0, 1):
        with pytest.raises(KeyboardInterrupt):
            store.save(block, linears("q", seed=1))
    assert store.blocks() == [0]
    assert store.get(1) is None
    assert equal(store.get(0), linears("q"))
