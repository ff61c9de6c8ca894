"""The compiled loops: when they are used, what they must never touch, and the same bits without them."""

import ctypes
import hashlib
import mmap
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import traceback
from pathlib import Path

import pytest
import torch

from fedspallm_appfl.aggregation.l0_mean import L0Sums, l0_mean
from fedspallm_appfl.aggregation.mask_expansion import expand
from fedspallm_appfl.devices import threads
from fedspallm_appfl.pruning import column_block
from fedspallm_appfl.pruning.registry import new_statistic, prepare
from fedspallm_appfl.settings.schema import Pruning
from fedspallm_appfl.tensors import bitmask, native
from fedspallm_appfl.tensors.target import parse_target
from helpers.loops import use
from helpers.paths import TESTS

FUNCTIONS = ["count_bits", "sparsegpt_block", "gather_2", "gather_4", "scatter_2", "scatter_4"]
FUNCTIONS += ["fold_2_1", "fold_2_2", "fold_8_1", "fold_8_2", "mean_1", "mean_2", "mean_4", "add_exactly"]


@pytest.fixture
def compiled(monkeypatch):
    use("compiled", monkeypatch)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_mask(shape, share):
    return torch.rand(shape, generator=torch.Generator().manual_seed(len(shape) + shape[-1])) < share


def fingerprint():
    """A digest of what all loops make of matrices as large as those of the demo."""
    digest = hashlib.sha256()
    for text, shape in (("0.5", (344, 128)), ("0.7", (64, 128)), ("2:4", (128, 344)), ("4:8", (64, 128))):
        target, settings, pruned = parse_target(text), Pruning("sparsegpt", parse_target(text)), []
        for client in range(2):
            statistic = new_statistic(settings, shape[1], torch.device("cpu"))
            statistic.add(normal(400, shape[1], seed=client))
            pruned.append(prepare(settings, statistic).prune(normal(*shape, seed=7)))
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            counted = 300 if dtype is torch.float32 else 2  # votes of two bytes or one
            sums = L0Sums.empty(shape, dtype is torch.float16, counted)
            for client, (weight, mask) in enumerate(pruned):
                bits = bitmask.to_bits(mask)
                values = bitmask.gather(weight.to(dtype), bits)
                sums.add_packed(values, bits, 3 * client + 1 if dtype is torch.float16 else 1)
                digest.update(bitmask.scatter(values, bits, shape).view(torch.uint8).numpy().tobytes())
            kept = expand(sums.votes, 2, l0_mean(sums), target)
            digest.update(l0_mean(sums).numpy().tobytes() + bitmask.to_bits(kept).numpy().tobytes())
    return digest.hexdigest()


def in_another_process(switch):
    """Whether there are loops, how a report describes them, and the fingerprint, with FEDSPALLM_NATIVE as given."""
    code = "import test_native as t; print(t.native.LIBRARY, t.native.description(), t.fingerprint(), sep='|')"
    paths = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "FEDSPALLM_NATIVE": switch, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command, here = [sys.executable, "-c", code], Path(__file__).parent
    done = subprocess.run(command, env=environment, cwd=here, capture_output=True, text=True, check=True, timeout=240)
    return done.stdout.strip().split("|")


@pytest.mark.parametrize("count", [2, 3, 7])
def test_threads_share_the_loops_and_no_bit_changes(compiled, monkeypatch, count):
    alone = fingerprint()
    monkeypatch.setattr(native, "SHORT", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: count)
    assert len(native.ranges(1000, 8)) == count
    assert fingerprint() == alone


def test_the_switch_turns_the_loops_off_and_no_bit_changes():
    assert in_another_process("0") == ["None", "no compiled loops", fingerprint()]


def test_the_loops_are_there_where_there_is_a_compiler():
    if os.environ.get("FEDSPALLM_NATIVE") == "0":
        pytest.skip("FEDSPALLM_NATIVE=0 is set")
    if platform.system() != "Linux" or not shutil.which((sysconfig.get_config_var("CC") or "cc").split()[0]):
        pytest.skip("there is no C compiler")
    assert native.LIBRARY is not None, "install the package again: it was built without the loops"
    assert native.description() == "compiled loops"
    assert [name for name in FUNCTIONS if not hasattr(native.LIBRARY, name)] == []


def test_without_loops_nothing_is_served(monkeypatch):
    monkeypatch.setattr(native, "LIBRARY", None)
    assert not native.serves(torch.ones(3))
    assert native.description() == "no compiled loops"


def test_only_contiguous_tensors_on_the_cpu_are_served(compiled):
    matrix = torch.ones(3, 4)
    assert native.serves(matrix, matrix[1:], matrix.view(-1)[2:])
    assert not native.serves(matrix, matrix.T)
    assert not native.serves(matrix[:, 1:])
    assert not native.serves(matrix, matrix.to("meta"))


def ends_at_a_wall(tensor):
    """A copy of a contiguous tensor right before a page that may be neither read nor written."""
    page, size = mmap.PAGESIZE, tensor.numel() * tensor.element_size()
    room = -(-max(size, 1) // page) * page
    memory = mmap.mmap(-1, room + page)
    wall = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + room
    assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(wall), page, 0) == 0
    if not size:
        return tensor.clone()
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=room - size).view(tensor.shape)
    return copy.copy_(tensor)


def codec_at_the_wall(monkeypatch):
    def walled(*shape, **kwargs):
        return ends_at_a_wall(torch.zeros(*shape, **kwargs))

    for dtype in (torch.float16, torch.float32):
        for entries in [*range(1, 41), 128]:
            dense = ends_at_a_wall(normal(entries).to(dtype))
            for share in (0.0, 0.3, 1.0):
                bits = ends_at_a_wall(bitmask.to_bits(random_mask((entries,), share)))
                with monkeypatch.context() as patch:
                    patch.setattr(torch, "empty", walled)
                    values = ends_at_a_wall(bitmask.gather(dense, bits))
                    bitmask.scatter(values, bits, (entries,))


def folds_at_the_wall(monkeypatch):
    for dtype in (torch.float16, torch.float32):
        for clients in (1, 300):
            for entries in range(1, 41):
                for share in (0.0, 0.4, 1.0):
                    mask = random_mask((1, entries), share)
                    values = ends_at_a_wall(normal(int(mask.sum())).to(dtype))
                    empty = L0Sums.empty((1, entries), True, clients)
                    sums = L0Sums(*map(ends_at_a_wall, (empty.total, empty.votes, empty.kept)))
                    sums.add_packed(values, ends_at_a_wall(bitmask.to_bits(mask)), 2)


def column_blocks_at_the_wall(monkeypatch):
    for text, widths in (("0.5", (1, 3, 8, 17, 256)), ("2:4", (4, 12, 256)), ("3:6", (6, 18)), ("8:16", (16, 64))):
        for width in widths:
            for rows in (1, 31, 32, 33, 70):
                parts = (
                    normal(width, rows),
                    random_mask((width, rows), 0.5),
                    normal(width, width).triu(),
                    torch.ones(width),
                )
                column_block.solve(*map(ends_at_a_wall, parts), parse_target(text))


@pytest.mark.skipif(platform.system() != "Linux", reason="walls are made with mprotect")
@pytest.mark.parametrize("work", [codec_at_the_wall, folds_at_the_wall, column_blocks_at_the_wall])
def test_nothing_is_read_or_written_behind_the_end_of_a_tensor(compiled, monkeypatch, work):
    child = os.fork()  # whoever touches a wall dies
    if not child:
        try:
            work(monkeypatch)
            os._exit(0)
        finally:
            traceback.print_exc()
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot copy a process")
def test_a_copy_of_the_process_has_threads_of_its_own(compiled):
    """Those of the parent, which have run before, are not in it."""
    dense, counted = normal(2**18), torch.ones(2**15, dtype=torch.uint8)
    with threads(2):
        expected = bitmask.gather(dense, counted)
        child = os.fork()
        if not child:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(60)  # ends it if it waits for threads that are not there
            os._exit(not torch.equal(bitmask.gather(dense, counted), expected))
    assert os.waitpid(child, 0)[1] == 0


def test_parts_run_at_the_same_time_and_all_are_done_when_one_fails(compiled, monkeypatch):
    meet, done = threading.Barrier(2, timeout=60), []  # there are as many threads as cores

    def loop(function, number):
        meet.wait()
        if number == 0:
            raise ZeroDivisionError
        time.sleep(0.1)
        done.append(number)

    monkeypatch.setattr(native, "call", loop)
    with pytest.raises(ZeroDivisionError):
        native.call_in_parts("any", [(0,), (1,)])
    assert done == [1]


def surrounded(tensor, canary):
    """A contiguous copy of a tensor in the middle of a larger one, and that larger one."""
    around = torch.full((tensor.numel() + 64,), canary, dtype=tensor.dtype)
    middle = around[32:-32].view(tensor.shape)
    middle.copy_(tensor)
    return middle, around


def assert_untouched(around, canary):
    assert around[:32].tolist() == around[-32:].tolist() == [canary] * 32


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("entries", [1, 7, 8, 9, 39, 40, 129])
def test_what_lies_around_the_result_of_a_codec_stays_as_it_was(compiled, entries, dtype):
    dense, mask = normal(entries).to(dtype), normal(entries, seed=1) < 0.4
    bits, size = bitmask.to_bits(mask), dense.element_size()
    values, around = surrounded(torch.zeros(int(mask.sum()), dtype=dtype), 9.0)
    native.call(f"gather_{size}", dense, bits, entries, len(values), values)
    assert values.tolist() == dense[mask].tolist()
    assert_untouched(around, 9.0)
    result, around = surrounded(torch.full((entries,), 5.0, dtype=dtype), 9.0)
    native.call(f"scatter_{size}", values, bits, entries, int(mask.sum()), result)
    assert result.tolist() == (dense * mask).tolist()
    assert_untouched(around, 9.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("clients", [1, 300])
@pytest.mark.parametrize("entries", [1, 7, 8, 9, 40, 129])
def test_what_lies_around_sums_and_votes_stays_as_it_was(compiled, entries, clients, dtype):
    mask = normal(1, entries) < 0.4
    empty = L0Sums.empty((1, entries), True, clients)
    parts = [surrounded(tensor, 77) for tensor in (empty.total, empty.votes, empty.kept)]
    sums = L0Sums(*(middle for middle, _ in parts))
    sums.add(torch.ones(1, entries, dtype=dtype), mask, 3)
    assert sums.total.tolist() == (mask.long() * 3 * 2**40).tolist()
    assert sums.votes.tolist() == (~mask).long().tolist()
    assert sums.kept.tolist() == (mask.long() * 3).tolist()
    for _, around in parts:
        assert_untouched(around, 77)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("clients", [2, 300])
def test_compiled_means_are_those_of_torch_and_what_lies_around_stays(compiled, monkeypatch, weighted, clients):
    random = torch.Generator().manual_seed(clients)
    totals = torch.randint(-(2**62), 2**62, (8, 5), generator=random) >> torch.arange(40).view(8, 5)
    votes = torch.randint(0, 3, (8, 5), generator=random)
    sums = L0Sums.empty((8, 5), weighted, clients)
    sums.total.copy_(totals), sums.votes.copy_(votes)
    sums.clients = 2
    if weighted:
        sums.kept.copy_(5 * (2 - votes))
    mean = l0_mean(sums)
    result, around = surrounded(torch.zeros(40), 9.0)
    by = sums.votes if sums.kept is None else sums.kept
    native.call(f"mean_{by.element_size()}", sums.total, by, 40, 40, 2, result)
    assert torch.equal(result.view(8, 5), mean)
    assert_untouched(around, 9.0)
    use("torch", monkeypatch)
    assert torch.equal(l0_mean(sums), mean)


@pytest.mark.parametrize(("text", "width"), [("0.5", 1), ("0.5", 19), ("2:4", 20), ("8:16", 32), ("0.5", 256)])
@pytest.mark.parametrize("rows", [1, 31, 32, 33])
def test_what_lies_around_a_column_block_stays_as_it_was(compiled, text, width, rows):
    columns, around = surrounded(normal(width, rows), 9.0)
    kept, flags = surrounded(normal(width, rows, seed=1) < 0, True)
    column_block.solve(columns, kept, normal(width, width).triu(), torch.ones(width), parse_target(text))
    assert_untouched(around, 9.0)
    assert_untouched(flags, True)


def test_every_random_codec_is_the_same_without_the_loops(compiled, monkeypatch):
    chance = random.Random(0)
    for _ in range(60):
        shape = chance.randint(1, 70), chance.randint(1, 70)
        dtype = chance.choice([torch.float16, torch.bfloat16, torch.float32])
        dense, mask = normal(*shape, seed=chance.randrange(1000)).to(dtype), random_mask(shape, chance.random())
        results = []
        for library in (native.LIBRARY, None):
            with monkeypatch.context() as patch:
                patch.setattr(native, "LIBRARY", library)
                bits = bitmask.to_bits(mask)
                values = bitmask.gather(dense, bits)
                results.append((bitmask.count(bits), values, bitmask.scatter(values, bits, shape)))
        assert results[0][0] == results[1][0] == len(results[0][1])
        for one, other in zip(results[0][1:], results[1][1:], strict=True):
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
