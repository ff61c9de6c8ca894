"""Predictions of memory: by hand on four small matrices, in the right direction on every setting, beside measurements."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

from fedspallm_appfl.aggregation.l0_mean import L0Sums
from fedspallm_appfl.estimates import memory as estimate_memory
from fedspallm_appfl.estimates.job import Job
from fedspallm_appfl.estimates.memory import HEAP_SHARE
from fedspallm_appfl.estimates.tables import LOWER, NO_SETTING, lower
from fedspallm_appfl.models.layout import Linear
from fedspallm_appfl.pruning.registry import find
from fedspallm_appfl.settings.reading import load_config
from fedspallm_appfl.settings.schema import TrainConfigs
from fedspallm_appfl.tensors.target import parse_target
from helpers.experiments import small_config
from helpers.measured import FREED_AT_ONCE, save_measured
from helpers.outlines import LINEARS, MODEL, PACKED, client, experiment, job, outline


def of_client(config=None, model=MODEL, **changes):
    """Memory of a client with these settings."""
    return estimate_memory.client_memory(job(config or experiment(), model), client(**changes))


def parts(memory):
    return {name: size for name, size in memory.parts.items() if size}


def test_a_client_by_hand():
    memory = of_client()
    assert parts(memory) == {
        "outer parts": 400,
        "activations": 6 * 8 * (4 * 4 + 8),
        "one block": 416,
        # Gram matrices of three inputs of 4 and one of 8, and 16 tokens with 2 x 8 + 4 x 4 floats each, and what went into
        # the block and came out of it
        "forward passes": 4 * (3 * 16 + 64) + 16 * 4 * (2 * 8 + 4 * 4 + 2 * 4),
        "heap": int(HEAP_SHARE * (400 + 1152 + 416 + 2496 + 512)),
    }
    assert memory.mapped == 104 * 2  # a block is larger than the outer parts
    assert memory.resident == memory.needed + memory.mapped == sum(memory.parts.values()) + 208


def test_pruning_by_hand():
    # at `mlp.down`: its Gram matrix and its corners, 3 bytes for each of 64 entries that are done, 15 for each of its own
    expected = 256 + 512 + 3 * 64 + 15 * 32
    assert estimate_memory.pruning_bytes(MODEL, TrainConfigs("sparsegpt"), 0, 3) == expected
    # float32 is read in place
    for stored, held, entry in ((torch.float16, 3, 15), (torch.float32, 1, 11)):
        pair = outline(LINEARS[:2], together=True, stored=stored)
        assert estimate_memory.pruning_bytes(pair, TrainConfigs("magnitude"), 0, held) == held * 16 + entry * 16


def test_pruning_is_what_counts_where_few_tokens_run():
    memory = of_client(windows=1, length=2)
    assert (
        parts(memory)["pruning a block"] == 256 + 512 + 3 * 64 + 15 * 32 + 2 * 2 * 4 * 4
    )  # two tokens before and after


def test_a_server_by_hand():
    memory = estimate_memory.server_memory(job(experiment()))
    assert parts(memory) == {
        "other open blocks": 9 * 96,
        "block to close": 9 * 96 + 6 * 16,  # its first matrix
        "uploads": PACKED,
        "heap": int(HEAP_SHARE * (864 + 960 + PACKED)),
    }


def test_an_open_entry_takes_a_sum_votes_and_weights():
    assert L0Sums.entry_bytes(weighted=False, clients=255) == 9
    assert L0Sums.entry_bytes(weighted=False, clients=256) == 10
    assert L0Sums.entry_bytes(weighted=True, clients=2) == 13


def test_matrices_of_one_client_are_closed_one_by_one():
    fold = job(experiment()).fold(0)
    one = estimate_memory.closing_bytes([fold.bytes_of(0, linear.name, 1) for linear in LINEARS], 1)
    assert one == PACKED - 36 + (9 + 6) * 32  # the others packed, and the last
    memory = estimate_memory.server_memory(job(experiment(1)))
    assert memory.parts["other open blocks"] == 0


def test_the_evaluation_by_hand():
    config = experiment()
    config.evaluation.texts, config.evaluation.length, config.evaluation.batch = {"x": "x.txt"}, 8, 4
    memory = estimate_memory.evaluation_memory(job(config), {"x": 3, "y": 2})
    assert parts(memory)["windows of all texts"] == 5 * 8 * 24
    assert parts(memory)["a block, or logits"] == max(3 * 8 * 10 * 12, 416 + 24 * 96)
    config.evaluation.batch = 1
    small = estimate_memory.evaluation_memory(job(config), {"x": 3, "y": 2})
    assert small.parts["a block, or logits"] == 416 + 8 * 96


def test_clients_of_one_process_share_the_outer_parts_only():
    two, three = (estimate_memory.serial_memory(job(experiment(count))).parts for count in (2, 3))
    alone = of_client().parts
    assert two["outer parts"] == three["outer parts"] == alone["outer parts"]
    assert three["activations"] == 3 * alone["activations"]
    assert three["a client at work"] == alone["one block"] + alone["forward passes"]
    assert three["open blocks"] == two["open blocks"] == 9 * 96


def test_an_mpi_rank_holds_the_message_on_its_way_too():
    alone, rank = of_client().parts, estimate_memory.rank_memory(job(experiment()), client()).parts
    assert rank["message on its way"] == PACKED
    assert {**rank, "message on its way": 0, "heap": 0} == {**alone, "message on its way": 0, "heap": 0}
    whole = client(blocks_per_message=2)  # the model in one message: nothing is made meanwhile
    assert estimate_memory.rank_memory(job(experiment()), whole).parts["message on its way"] == 0


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"windows": 6}, {"windows": 7}),
        ({"length": 8}, {"length": 9}),
        ({"batch": 1}, {"batch": 2}),
        ({"activations": "file"}, {"activations": "memory"}),
        ({"pruner": "wanda"}, {"pruner": "sparsegpt"}),
        ({"blocks_per_message": 1}, {"blocks_per_message": 2}),
        ({"pruner": "magnitude", "text": None}, {"pruner": "magnitude"}),
    ],
)
def test_a_client_takes_more_with_more_of_it(less, more):
    assert of_client(**less).needed < of_client(**more).needed


def test_a_batch_is_no_larger_than_all_windows():
    a, b = (of_client(batch=batch) for batch in (6, 600))
    assert a == b


def test_hidden_states_in_a_file_are_mapped():
    memory, file = (of_client(activations=where) for where in ("memory", "file"))
    assert file.mapped - memory.mapped == memory.parts["activations"]


@pytest.mark.parametrize(
    "change",
    [
        lambda config: setattr(config.server_configs.aggregator_kwargs, "weights", "sample_size"),
        lambda config: config.evaluation.compare.append("fedavg"),
        lambda config: setattr(config.client_configs.train_configs, "sparsity", parse_target("0.25")),
    ],
)
def test_a_server_takes_more_with_more_to_do(change):
    config = experiment()
    before = estimate_memory.server_memory(job(config)).needed
    change(config)
    assert estimate_memory.server_memory(job(config)).needed > before


def test_a_server_takes_less_with_fewer_open_blocks_and_uploads():
    config = experiment()
    some = estimate_memory.server_memory(job(config)).needed
    assert some < estimate_memory.server_memory(job(config), together=2).needed
    config.server_configs.scheduler_kwargs.max_open_blocks = 0
    assert some > estimate_memory.server_memory(job(config)).needed


SWEPT = {"propagate": "pruned"}


def gathering(**settings):
    """A configuration of `gram` whose first input is the client's own unless it is said."""
    return experiment(algorithm="gram", **{"first_input": "private"} | settings)


def test_a_client_that_sends_statistics_by_hand():
    alone = {"outer parts": 400, "activations": 1152, "one block": 416, "Gram matrices": 4 * (3 * 16 + 64)}
    memory = of_client(gathering())
    assert parts(memory) == alone | {"forward passes": 16 * 4 * (2 * 8 + 4 * 4), "heap": memory.parts["heap"]}
    random = of_client(gathering(first_input="public"))  # whose Gram matrix waits for the first block
    assert random.parts["activations"] == alone["activations"]
    assert random.parts["Gram matrices"] == alone["Gram matrices"] + 4 * 16


def test_a_client_in_a_sweep_by_hand():
    own, dense = (parts(of_client(gathering(propagate="pruned", target=target))) for target in ("own", "dense"))
    assert own["Gram matrices"] == 4 * 64  # of the widest input alone
    assert own["forward passes"] == 16 * 4 * (2 * 8 + 2 * 4)
    assert dense["activations"] == 6 * 8 * (2 * 4 * 4 + 8)
    assert (dense["one block"], dense["Gram matrices"]) == (2 * 416, 2 * 4 * 64)
    assert dense["forward passes"] == own["forward passes"] + 16 * 4 * 8  # the other's input is kept


def test_a_client_in_a_sweep_by_block_takes_what_one_pass_does_and_more_blocks_a_second_copy_of_the_states():
    once, one, two = (of_client(gathering(**more)).parts for more in ({}, SWEPT | {"stride": 1}, SWEPT | {"stride": 2}))
    assert one == once
    assert two["activations"] == 6 * 8 * (2 * 4 * 4 + 8)
    assert {part: size for part, size in two.items() if part not in ("activations", "heap")} == {
        part: size for part, size in once.items() if part not in ("activations", "heap")
    }


def test_statistics_are_packed_one_after_the_other():
    """Where few tokens run, that is the worst moment."""
    small = dataclasses.replace(MODEL, blocks=(1, 1))
    made = parts(of_client(gathering(), small, windows=1, length=2))
    packed = sum(4 * side + side * (side - 1) // 2 + 4 for side in (4, 4, 4, 8))
    assert made["packed statistics"] == packed + 64 + 4 * 4 * 8 * 8
    assert "one block" not in made


@pytest.mark.parametrize(
    ("pruner", "refit", "bytes_"),
    [
        ("admm", False, 20 * 32 + 4 * 64),
        ("wanda", False, 14 * 32),
        ("wanda", True, 9 * 32 + 5 * 4 * 32),
        ("sparsegpt", True, 9 * 32 + 5 * 4 * 32),
    ],
)
def test_a_matrix_by_hand(pruner, refit, bytes_):
    assert find(pruner).solving_bytes(4, 8, refit) == bytes_


@pytest.mark.parametrize(
    ("algorithm", "unit"),
    [
        ("fedspallm", (9 * 32, 6 * 32, 36)),
        ("fedavg", (9 * 32, 18 * 32, 36)),
        ("fedprllm", (32, 6 * 32, 36)),
        ("consensus", (32, 6 * 32, 4)),
        ("standalone", (0, 0, 36)),
    ],
)
def test_a_matrix_on_the_server_by_hand(algorithm, unit):
    fold = job(experiment(algorithm=algorithm)).fold(0)
    assert dataclasses.astuple(fold.bytes_of(0, "mlp.down", 2)) == unit


def test_values_on_the_server_are_of_kept_entries_alone():
    fold = job(experiment(algorithm="consensus")).fold(1)
    assert dataclasses.astuple(fold.bytes_of(0, "mlp.down", 2)) == (9 * 16, 6 * 16, 36)


@pytest.mark.parametrize("target", ["own", "dense"])
def test_statistics_on_the_server_by_hand(target):
    config = experiment(algorithm="gram", propagate="pruned", target=target)
    unit, drift = job(config).fold(0).bytes_of(0, "mlp.down", 2), 64 * (target == "dense")
    assert unit.sums == 16 * (8 + 28 + drift)
    summing = 4 * 28 + 4 * 64 + 4 * 4 * 8 * 8
    # pruning with SparseGPT: the Gram matrix, or with drift and what it comes to; corners; dense weight and copies of it
    pruning = 4 * (64 + 2 * drift) + 2 * 4 * 8 * 8 + (4 + 11) * 32 + 4 * 32 * (target == "dense")
    assert (unit.closing, unit.made) == (max(summing, 4 * 64 + 12 * drift, pruning - unit.sums), 36)


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({}, {"propagate": "pruned", "target": "dense"}),
        ({"pruner": "sparsegpt"}, {"pruner": "sparsegpt", "refit": True}),
        ({"pruner": "wanda"}, {"pruner": "admm"}),
    ],
)
def test_a_server_that_prunes_takes_more_with_more_of_it(less, more):
    wide = outline(*((Linear("a", (512, 256), False),),) * 2)
    a, b = (
        estimate_memory.server_memory(job(experiment(1, algorithm="gram", **changes), wide)) for changes in (less, more)
    )
    assert a.needed < b.needed


def test_a_server_reads_the_model_only_to_see_how_large_inputs_are():
    config, large = experiment(algorithm="gram"), dataclasses.replace(MODEL, outer=10**6)
    looking = parts(estimate_memory.server_memory(job(config, large)))
    assert looking["outer parts"] == 4 * 10**6 and looking["activations"] == 4 * 64 * (4 * 4 + 8)
    config.server_configs.aggregator_kwargs.screening = "off"
    assert estimate_memory.server_memory(job(config, large)) == estimate_memory.server_memory(job(config))


@pytest.mark.parametrize("algorithm", ["fedspallm", "fedprllm", "fedavg", "consensus", "gram", "standalone"])
@pytest.mark.parametrize("settings", [{}, {"propagate": "pruned", "target": "dense"}, {"windows": 1, "length": 2}])
def test_every_part_has_its_line_in_the_table(algorithm, settings):
    config = experiment(algorithm=algorithm, **settings)
    memories = [of_client(config, **settings), estimate_memory.server_memory(job(config))]
    for memory in [*memories, estimate_memory.serial_memory(job(config))]:
        assert memory.parts.keys() <= LOWER.keys()
    assert all(LOWER.values())


def test_no_setting_is_advised_that_all_clients_have():
    sparse, wanda = (job(experiment(pruner=pruner)) for pruner in ("sparsegpt", "wanda"))
    assert lower(sparse, "pruning a block") == "train_configs.pruner: wanda"
    assert lower(wanda, "pruning a block") == lower(wanda, "one block") == NO_SETTING
    assert lower(wanda, "forward passes") == "data.batch"


MEASURE = """
import copy, gc, sys
from pathlib import Path
import torch
from transformers.models.llama import modeling_llama
from fedspallm_appfl.adaptors import registration
registration.register()
from fedspallm_appfl.adaptors import trainer
from fedspallm_appfl.rounds import participants
from fedspallm_appfl.settings.reading import load_config
from fedspallm_appfl.devices import give_back
from fedspallm_appfl.runs import serial

def field(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name + ":")).split()[1])

def run_client(config):
    client = trainer.LocalClient(participants.client_settings(config, config.clients[0], ["cpu"], 2**29))
    last = len(client.model.blocks) - 1
    grams = client.exchanges[0].up == "grams"  # those of the first block are the most; else it takes no more, and as long
    client.start_exchange(0, 0, list(range(last + 1)) if grams else [last])
    while client.in_exchange:
        client.next_message()

def run(file, folder):
    config = load_config(file)[0]
    serial.run(config, folder, lambda event: None) if what == "serial" else run_client(config)

what, file, folder, small = sys.argv[1:]
torch.set_num_threads(1)
run(small, Path(folder).with_name("first"))  # code that is loaded late is not what is measured
gc.collect()
give_back()  # so that nothing that is freed already is used again
before = field("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
run(file, Path(folder))
print(field("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "algorithm", "pruner", "count", "length"),
    [
        ("client", "fedspallm", "sparsegpt", 1, 128),
        ("client", "fedspallm", "wanda", 1, 128),
        ("client", "fedspallm", "admm", 1, 128),
        ("client", "gram", "sparsegpt", 1, 256),
        ("serial", "fedspallm", "sparsegpt", 2, 128),
        ("serial", "consensus", "sparsegpt", 2, 64),
    ],
)
def test_memory_is_within_a_tenth_of_what_is_measured(what, algorithm, pruner, count, length, tmp_path):
    """Of what is asked for: how much of it the C library keeps afterwards differs from run to run by a third."""
    save_measured(tmp_path / "model")
    (tmp_path / "small").mkdir()
    statistics = {"gram": {"min_tokens": 1}} if algorithm == "gram" else {}
    small = small_config(tmp_path / "small", count, algorithm=algorithm, **statistics)
    changes = {
        "algorithm": algorithm,
        **statistics,
        "model": {"path": str(tmp_path / "model")},
        "client_configs": {
            "train_configs": {"pruner": pruner, "iterations": 3},
            "data": {"windows": 8, "length": length, "batch": 4},
        },
    }
    file = small_config(tmp_path, count, **changes)
    config, _ = load_config(file)
    opened = Job.of(config)
    predicted = (
        estimate_memory.serial_memory(opened)
        if what == "serial"
        else estimate_memory.client_memory(opened, config.clients[0])
    )
    command = [sys.executable, "-c", MEASURE, what, str(file), str(tmp_path / "state"), str(small)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, **FREED_AT_ONCE})
    assert done.returncode == 0, done.stderr[-2000:]
    measured, asked = int(done.stdout.splitlines()[-1]), predicted.resident - predicted.parts["heap"]
    print(f"{what} {algorithm} {pruner}: predicted {asked / 1e6:.0f}, measured {measured / 1e6:.0f} MB")
    assert asked == pytest.approx(measured, rel=0.1)
