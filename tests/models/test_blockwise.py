"""The sweep over the blocks: activations in a file give the same bits, and nothing is kept that is not needed."""

import gc
import os
import resource
import stat
import tempfile
import weakref
from collections import deque
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fedspallm_appfl.adaptors.registration import register
from fedspallm_appfl.errors import ConfigError, ModelError
from fedspallm_appfl.models.activations import ALIGNMENT, HiddenStatesFile, hidden_states
from fedspallm_appfl.models.blockwise import Activations, Call, advance, embed, finish
from fedspallm_appfl.models.inputs import inputs_of
from fedspallm_appfl.models.layout import Layout, Linear
from fedspallm_appfl.models.lazy_model import LazyModel
from fedspallm_appfl.rounds import pruning
from fedspallm_appfl.rounds.participants import client_settings
from fedspallm_appfl.settings.reading import load_config
from fedspallm_appfl.settings.schema import Pruning
from fedspallm_appfl.tensors.target import parse_target
from helpers.experiments import small_config
from helpers.families import save_family, windows
from helpers.rounds import prune_blocks

WANDA, SPARSEGPT = Pruning("wanda", parse_target(0.5)), Pruning("sparsegpt", parse_target(0.5))


@pytest.fixture
def llama(tmp_path):
    return LazyModel(str(save_family("llama", tmp_path / "llama")))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where temporary files go."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary"


def mapped_in(folder):
    """Lines of this process's memory map about files in a folder, with a name or without one."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if f"{folder}/" in line]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gpt2", "gpt-neox"])
def test_activations_in_a_file_give_the_same_bits(family, dtype, folder, tmp_path, monkeypatch):
    """Five windows of an odd length in batches of two, so that the last batch is smaller and none fills whole pages."""
    model = LazyModel(str(save_family(family, tmp_path / "model", dtype)))
    made = {}
    allocated, allocate = [], os.posix_fallocate
    monkeypatch.setattr(
        os, "posix_fallocate", lambda fd, start, size: (allocated.append(size), allocate(fd, start, size))
    )
    for where in ("memory", "file"):
        sweep = prune_blocks(model, windows(5, 23), {0, 2}, SPARSEGPT, batch=2, activations=where)
        made[where] = {(b, n): linear for b, linears in sweep for n, linear in linears.items()}
        assert len(allocated) == (where == "file")
    assert made["file"].keys() == made["memory"].keys()
    for key, expected in made["memory"].items():
        assert torch.equal(made["file"][key].mask, expected.mask), key
        assert torch.equal(made["file"][key].weight, expected.weight), key


def test_the_whole_sweep_gives_the_same_logits_with_a_file(llama, folder):
    logits = []
    for where in ("memory", "file"):
        state = embed(llama, windows(5, 23), 2, where)
        for index in range(3):
            with llama.block(index) as block:
                advance(block, index, state)
        logits.append(torch.cat([logits for _, logits in finish(llama, windows(5, 23), state, 2)]))
    assert torch.equal(*logits)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_activations_in_a_file_give_the_same_bits_on_a_gpu(tmp_path):
    model = LazyModel(str(save_family("llama", tmp_path)), device="cuda")
    memory, file = (
        dict(prune_blocks(model, windows(5), {2}, WANDA, batch=2, activations=where))[2] for where in ("memory", "file")
    )
    assert all(torch.equal(memory[name].weight, file[name].weight) for name in memory)
    assert all(hidden.is_cuda for hidden in embed(model, windows(5), 2, "file").hidden)


def test_a_file_is_used_like_a_list(folder):
    batches = [torch.randn(size, 3, 5, generator=torch.Generator().manual_seed(size)) for size in (4, 4, 2)]
    states = HiddenStatesFile(10, "ward")
    for batch in batches:
        states.append(batch)
    assert len(states) == 3
    assert all(map(torch.equal, states, batches))
    assert all(hidden.data_ptr() % ALIGNMENT == 0 for hidden in states)
    states[1] = batches[1] + 1
    batches[1] += 1
    assert all(map(torch.equal, states, batches))
    states[1].zero_()  # a view
    assert not states[1].any()


def test_the_file_has_no_name_is_private_and_goes_with_the_sweep(llama, folder, monkeypatch):
    modes, allocate = [], os.posix_fallocate
    monkeypatch.setattr(
        os, "posix_fallocate", lambda fd, *size: (modes.append(os.fstat(fd).st_mode), allocate(fd, *size))
    )
    sweep = prune_blocks(llama, windows(), {0, 1, 2}, WANDA, batch=4, activations="file")
    next(sweep)
    [line] = mapped_in(folder)
    assert "(deleted)" in line
    assert "rw-s" in line
    assert list(folder.iterdir()) == []
    assert [stat.S_IMODE(mode) for mode in modes] == [0o600]
    sweep.close()
    gc.collect()
    assert mapped_in(folder) == []


@contextmanager
def no_large_files():
    """Around no more than needs it: what pytest writes meanwhile may be a large file, too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_room_for_the_file_is_an_error_before_anything_is_pruned(llama, folder):
    size = 2 * 4 * 24 * 32 * 4  # two batches of four windows, float32
    message = (
        rf"client ward: `data.activations` is file, but {folder} has no room for {size:,} bytes of hidden states: "
        "File too large; free some disk space, name another folder in the environment variable TMPDIR, or set it to memory"
    )
    with pytest.raises(ConfigError, match=message), no_large_files():
        next(prune_blocks(llama, windows(), {0}, WANDA, batch=4, client="ward", activations="file"))


def test_no_folder_for_the_file_is_an_error(llama, folder, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "none"))
    with pytest.raises(
        ConfigError, match=r"client ward: .*/temporary/none has no room for .* hidden states: No such file or dir"
    ):
        next(prune_blocks(llama, windows(), {0}, WANDA, client="ward", activations="file"))


@pytest.mark.parametrize("made", [torch.zeros(2, 3, 4, dtype=torch.float64), torch.zeros(2, 3, 5)])
def test_a_file_keeps_hidden_states_in_their_dtype_and_shape_or_refuses(made, folder):
    states = HiddenStatesFile(2, "ward")
    states.append(torch.ones(2, 3, 4))
    with pytest.raises(ModelError, match=r"client ward: a block turns .*float32 \[2, 3, 4\] into .* to memory"):
        states[0] = made
    assert states[0].all()


def test_a_place_that_is_misspelt_is_not_memory():
    with pytest.raises(ConfigError, match="client ward: `data.activations` is one of memory, file; got 'disk'"):
        hidden_states("disk", 1, "ward")


def test_the_setting_reaches_the_client(tmp_path):
    register()
    from fedspallm_appfl.adaptors.agents import client_agent_config
    from fedspallm_appfl.adaptors.trainer import FedSpaLLMTrainer

    changes = {"client_configs": {"data": {"activations": "file"}}}
    config, problems = load_config(small_config(tmp_path, **changes))
    assert problems == []
    made = client_agent_config(client_settings(config, config.clients[0], ["cpu"], 2**20))
    assert FedSpaLLMTrainer(made.train_configs).settings.data.activations == "file"


class Doubling(nn.Module):
    """A block that notes which of its inputs are still there when the next comes."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.alive = []

    def forward(self, hidden):
        self.alive.append(sum(ref() is not None for ref in self.seen))
        self.seen.append(weakref.ref(hidden))
        return 2 * hidden


def test_a_batch_of_hidden_states_is_freed_as_it_is_replaced():
    state = Activations([torch.ones(2, 3, 4) for _ in range(5)], [[Call((None,), {})]] * 5)
    block = Doubling()
    advance(block, 0, state)
    assert block.alive == [0] * 5
    assert all(ref() is None for ref in block.seen)
    assert all(bool((hidden == 2).all()) for hidden in state.hidden)


def test_a_pruned_block_is_not_kept_while_the_next_is_pruned(llama, monkeypatch):
    alive, refs, prune = [], [], pruning._prune_block

    def watched(*args):
        alive.append(sum(ref() is not None for ref in refs))
        done = prune(*args)
        refs.extend(weakref.ref(linear) for linear in done.values())
        return done

    monkeypatch.setattr(pruning, "_prune_block", watched)
    deque(prune_blocks(llama, windows(), {0, 1, 2}, WANDA), maxlen=0)  # a loop would hold the last one itself
    assert len(refs) == 3 * 7
    assert alive == [0, 0, 0]


def test_a_statistic_is_dropped_once_it_was_used(llama, monkeypatch):
    alive, refs, prepare = [], [], pruning.prepare

    def watched(settings, statistic):
        alive.append(sum(ref() is not None for ref in refs))
        refs.append(weakref.ref(statistic))
        return prepare(settings, statistic)

    monkeypatch.setattr(pruning, "prepare", watched)
    list(prune_blocks(llama, windows(), {1}, SPARSEGPT))
    assert alive == [0] * 4  # q k v, o, gate up, down


def test_from_the_second_batch_on_the_first_pass_stops_at_the_last_input(llama):
    ran = []
    for name in ("self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        llama.blocks[0].get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    list(prune_blocks(llama, windows(6), {0}, WANDA, batch=2))
    assert [ran.count(name) for name in ("self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")] == [4, 4, 2]
    # and after the last block one batch again, to see how far its outputs have moved


class Branching(nn.Module):
    """A block whose linears are called only for some inputs, as experts are."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, hidden, called):
        for number, name in enumerate(called):
            getattr(self, name)(hidden + number)
        return hidden


@pytest.mark.parametrize("calls", [["ac", "ab", "abc", "abc"], ["abc", "ab", "c", "abc"], ["b", "a", "c", "cab"]])
def test_a_linear_that_only_some_batches_call_sees_all_its_tokens(calls):
    linears = tuple(Linear(name, (4, 4), False) for name in "abc")
    model = SimpleNamespace(layout=Layout("", (linears,)), device=torch.device("cpu"), skeleton=None)
    state = Activations([torch.ones(1, 5, 4)] * len(calls), [[Call((None, called), {})] for called in calls])
    source = SimpleNamespace(model=model, settings=WANDA, kept=list, where="{} {}".format)
    found = pruning.collect(source, Branching(), 0, state)
    expected = {name: 5 * sum(name in called for called in calls) for name in "abc"}
    assert {name: statistic.tokens for names, statistic in found for name in names} == expected


def test_a_block_that_fails_leaves_nothing_behind_for_who_uses_the_model_next(llama, monkeypatch):
    """Others share the model: a client after one that is left out, the next task of a worker."""
    state, first = embed(llama, windows(2, 8), 1), llama.layout.blocks[0][0]
    with monkeypatch.context() as patch:
        patch.setattr(llama, "_put_packed", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError), llama.block(0, {first.name: None}):
            pass
    assert all(one.is_meta for one in llama.blocks[0].parameters())
    state.calls = [[lambda block, hidden: 1 / 0]]
    with llama.block(0) as block, pytest.raises(ZeroDivisionError):
        inputs_of(block, first, state, 0, 0, state.hidden[0])
    assert not any(module._forward_pre_hooks for module in llama.blocks[0].modules())
