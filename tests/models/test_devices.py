"""Batches of a client dealt among devices: the statistics of one, the same bits each time, and errors that surface."""

import threading
import time
from typing import NamedTuple

import pytest
import torch
from torch import nn

from fedspallm_appfl.devices import side_by_side, threads
from fedspallm_appfl.errors import ModelError
from fedspallm_appfl.models import activations, blockwise
from fedspallm_appfl.models.blockwise import Activations, Call, advance
from fedspallm_appfl.models.inputs import SharedInputs, collected
from fedspallm_appfl.models.layout import Linear
from fedspallm_appfl.models.lazy_model import LazyModel
from fedspallm_appfl.pruning.statistics import InputGram, InputNorms
from fedspallm_appfl.settings.schema import Pruning
from fedspallm_appfl.tensors.target import parse_target
from helpers.families import save_family, windows
from helpers.rounds import prune_blocks

CPU = torch.device("cpu")
LINEARS = tuple(Linear(name, (4, 4), False, expert=name == "odd") for name in ("first", "second", "odd"))


class Rotary(NamedTuple):
    cosine: torch.Tensor
    sine: torch.Tensor


class Block(nn.Module):
    """`first` and `second` share an input; only batches that begin with an odd number reach `odd`."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.odd = (nn.Linear(4, 4, bias=False) for _ in LINEARS)
        for linear in (self.first, self.second, self.odd):
            nn.init.constant_(linear.weight, 1.0)
        self.register_buffer("shift", torch.ones(4))

    def forward(self, hidden, scale):
        assert float(hidden.flatten()[0]) != 13.0
        odd = self.odd(hidden + self.shift) if hidden.flatten()[0] % 2 else 0
        return (self.first(hidden) - self.second(hidden)) * scale + odd + hidden


def state(devices, begin=(0, 2, 3, 4, 5)):
    """Batches of small integers, of which all sums are exact; the last one is smaller."""
    drawn = torch.Generator().manual_seed(0)
    hidden = [torch.randint(-4, 5, (2 - (one == 5), 3, 4), generator=drawn).float() for one in begin]
    for batch, one in zip(hidden, begin, strict=True):
        batch[0, 0, 0] = one
    return Activations(hidden, [[Call((None, torch.ones(1)), {}, 7)]] * len(begin), (CPU,) * devices)


@pytest.mark.parametrize("kind", [InputGram, InputNorms])
@pytest.mark.parametrize("devices", [2, 3, 7])
def test_exact_sums_are_those_of_one_device(kind, devices):
    """With two and more, the first device sees no odd batch before another one does, or none at all."""
    found = {}
    for number in (1, devices):
        block, came = Block(), state(number)
        with torch.no_grad():
            seen = collected(
                block, 0, came, lambda on: SharedInputs(LINEARS, kind, on), came.take_output, stop=False
            ).groups()
        sums = {tuple(names): (one.tokens, one.upper if kind is InputGram else one.squares) for names, one in seen}
        found[number] = sums, list(came.hidden)
    (expected, outputs), (got, same) = found[1], found[devices]
    assert got.keys() == expected.keys() == {("first", "second"), ("odd",)}
    for names, (tokens, sums) in expected.items():
        assert got[names][0] == tokens
        assert torch.equal(got[names][1], sums)
    assert all(map(torch.equal, same, outputs))


def test_batches_are_dealt_in_turn_to_a_block_for_each_device(monkeypatch):
    block, came, ran, dealt = Block(), state(2), [], {}
    call = Call.__call__
    monkeypatch.setattr(Call, "__call__", lambda self, one, hidden: (ran.append(one), call(self, one, hidden))[1])
    blockwise.each_batch(block, 0, came, lambda number, place, out: dealt.__setitem__(number, place))
    assert dealt == {0: 0, 1: 1, 2: 0, 3: 1, 4: 0}
    assert sum(one is block for one in ran) == 3
    [copy] = {one for one in ran if one is not block}
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(block.parameters(), copy.parameters(), strict=True))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_pieces_are_done_side_by_side_with_a_thread_each_and_come_in_order(count):
    meet = threading.Barrier(count, timeout=60)

    def work(piece):
        meet.wait()  # each thread has a piece at the same time
        return piece, torch.get_num_threads()

    with threads(count):
        assert side_by_side(work, range(2 * count)) == [(piece, 1) for piece in range(2 * count)]
        assert side_by_side(work, []) == []
        assert torch.get_num_threads() == count
        with pytest.raises(ZeroDivisionError):
            side_by_side(lambda piece: 1 // piece, [1, 0])


def test_block_and_arguments_are_moved_as_wholes():
    """To a device that every torch has; what lies there has no values."""
    block, meta = Block(), torch.device("meta")
    block.plain, block.among = torch.ones(3), {"others": [torch.ones(3)]}  # neither parameters nor buffers
    copy, one = blockwise._copy_on(meta, block, 3, "ann"), torch.ones(1)
    for made, device in ((copy, meta), (block, CPU)):
        held = *made.parameters(), *made.buffers(), made.plain, *made.among["others"]
        assert {tensor.device for tensor in held} == {device}
    call = Call((None, (one, [one]), Rotary(one, one)), {"masks": {"full": one}, "use_cache": False}, 4).on(meta)
    (none, (first, [second]), rotary), masks = call.args, call.kwargs["masks"]
    assert (none, call.kwargs["use_cache"], call.index) == (None, False, 4)
    assert first.device == second.device == masks["full"].device == rotary.sine.device == meta
    with pytest.raises(ModelError, match="block 4: an argument of it, object cannot be moved to meta; use one device"):
        Call((None,), {"cache": object()}, 4).on(meta)


def test_arguments_that_batches_share_are_moved_once():
    call, there = Call((None, torch.ones(1)), {}, 0), blockwise._Moved(torch.device("meta"))
    assert there.of(call) is there.of(call)
    assert there.of(Call((None, torch.ones(2)), {}, 0)).args[1].shape == (2,)


def test_linears_that_share_an_input_on_one_device_only_are_refused():
    class Sometimes(Block):
        def forward(self, hidden, scale):
            return self.first(hidden) + self.second(hidden if hidden.flatten()[0] % 2 else hidden + 0)

    with pytest.raises(ModelError, match="second shares an input with first in some batches, with second in others"):
        collected(Sometimes(), 0, state(2, (0, 1)), lambda on: SharedInputs(LINEARS[:2], InputGram, on))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("activations", ["memory", "file"])
def test_a_sweep_prunes_the_same_but_for_rounding_and_twice_the_same(family, activations, tmp_path):
    folder, settings = str(save_family(family, tmp_path)), Pruning("sparsegpt", parse_target(0.5), min_tokens=1)
    runs = []
    for further in ((), ("cpu",), ("cpu",)):
        model = LazyModel(folder, dtype="float32", further=further)
        swept = prune_blocks(model, windows(5, 23), {0, 2}, settings, batch=2, activations=activations)
        runs.append({(block, name): one for block, made in swept for name, one in made.items()})
    one, two, again = runs
    assert one.keys() == two.keys()
    for where, expected in one.items():
        torch.testing.assert_close(two[where].weight, expected.weight, atol=1e-3, rtol=1e-2)
        assert (two[where].mask == expected.mask).float().mean() > 0.99
        assert two[where].tokens == expected.tokens
        assert torch.equal(two[where].weight, again[where].weight)


def test_an_error_on_a_further_device_ends_the_pass_and_names_the_block():
    begun = []

    class Waits(Block):
        def forward(self, hidden, scale):
            begun.append(float(hidden.flatten()[0]))
            if begun[-1] == 0.0:
                time.sleep(0.5)
            return super().forward(hidden, scale)

    with pytest.raises(ModelError, match=r"block 7 \(Waits\) fails: AssertionError"):
        advance(Waits(), 0, state(2, (0, 13, *[2] * 50)))
    assert len(begun) < 5


def test_a_block_that_a_device_has_no_room_for_is_named(monkeypatch):
    came = state(2)
    came.client = "ann"

    def full(*_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(blockwise.copy, "deepcopy", full)
    with pytest.raises(
        ModelError, match="client ann: cpu has no room for a copy of block 3, 208 bytes; leave it out of"
    ):
        advance(Block(), 3, came)


def test_a_batch_that_a_device_has_no_room_for_is_named():
    class Full(Block):
        def forward(self, hidden, scale):
            raise torch.OutOfMemoryError("full")

    came = state(2, (0,))
    came.client = "ann"
    says = r"client ann: cpu has no room for block 0 with its statistics and a batch; lower data.batch$"
    with pytest.raises(ModelError, match=says):
        advance(Full(), 0, came)


def test_what_went_into_experts_takes_a_file_of_its_share_on_each_device(tmp_path, monkeypatch):
    """Files for all batches on each device would take the disk once for each."""
    sizes, made = [], activations._mapped_file
    monkeypatch.setattr(activations, "_mapped_file", lambda size, client: (sizes.append(size), made(size, client))[1])
    folder, settings = str(save_family("mixtral", tmp_path)), Pruning("wanda", parse_target(0.5), min_tokens=1)
    kept = {}
    for devices in (1, 2, 4):
        sizes.clear()
        model = LazyModel(folder, dtype="float32", further=("cpu",) * (devices - 1))
        list(prune_blocks(model, windows(8, 16), {0}, settings, batch=2, activations="file"))
        states, *routed = sizes
        kept[devices] = len(routed), sum(routed)
        assert sum(routed) == states
    assert [files for files, _ in kept.values()] == [1, 2, 4]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_two_gpus_prune_as_one_does(family, tmp_path):
    folder, settings = str(save_family(family, tmp_path)), Pruning("sparsegpt", parse_target(0.5), min_tokens=1)
    one, two = (
        dict(prune_blocks(LazyModel(folder, device="cuda:0", further=more), windows(5, 23), {0, 2}, settings, batch=2))
        for more in ((), ("cuda:1",))
    )
    for block, made in one.items():
        for name, expected in made.items():
            got = two[block][name]
            assert got.weight.device == expected.weight.device
            assert (got.mask == expected.mask).float().mean() > 0.99
