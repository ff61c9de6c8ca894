"""Predictions of memory: by hand on four small matrices, in the right direction on every setting, beside measurements."""

import pytest
import torch

from fedspallm_appfl import estimate, estimate_memory
from fedspallm_appfl.pruning import Settings
from fedspallm_appfl.sparsity import parse_target
from outlines import LINEARS, MODEL, PACKED, client, experiment


def of_client(config=None, model=MODEL, **changes):
    """Memory of a client with these settings."""
    return estimate_memory.client_memory(config or experiment(), model, client(**changes))


def settings(pruner, **changes):
    return Settings(pruner, parse_target("0.5"), **changes)


def parts(memory):
    return {name: size for name, size in memory.parts.items() if size}


def test_a_client_by_hand():
    memory = of_client()
    assert parts(memory) == {
        "outer parts": 400,
        "activations": 6 * 8 * (4 * 4 + 8),
        "one block": 416,
        # Gram matrices of three inputs of 4 and one of 8, and 16 tokens with 2 x 8 + 4 x 4 floats each
        "forward passes": 4 * (3 * 16 + 64) + 16 * 4 * (2 * 8 + 4 * 4),
        "heap": int(HEAP_SHARE * (400 + 1152 + 416 + 2496)),
    }
    assert memory.mapped == 104 * 2  # a block is larger than the outer parts
    assert memory.resident == memory.needed + memory.mapped == sum(memory.parts.values()) + 208


def test_pruning_by_hand():
    groups = [([linear], 4 * linear.shape[1] ** 2) for linear in LINEARS]
    # at `mlp.down`: its Gram matrix and its corners, 3 bytes for each of 64 entries that are done, 15 for each of its own
    assert (
        estimate_memory.pruning_bytes(groups, torch.float16, settings("sparsegpt"), 3) == 256 + 512 + 3 * 64 + 15 * 32
    )
    # float32 is read in place
    pair = [([LINEARS[0], LINEARS[1]], 0)]
    assert estimate_memory.pruning_bytes(pair, torch.float16, settings("magnitude"), 3) == 3 * 16 + 15 * 16
    assert estimate_memory.pruning_bytes(pair, torch.float32, settings("magnitude"), 1) == 1 * 16 + 11 * 16


def test_pruning_is_what_counts_where_few_tokens_run():
    memory = of_client(windows=1, length=2)
    assert parts(memory)["pruning a block"] == 256 + 512 + 3 * 64 + 15 * 32


def test_a_server_by_hand():
    memory = estimate_memory.server_memory(experiment(), MODEL)
    assert parts(memory) == {
        "other open blocks": 9 * 96,
        "block to close": 9 * 96 + 6 * 16,  # its first matrix
        "uploads": PACKED,
        "heap": int(HEAP_SHARE * (864 + 960 + PACKED)),
    }


def test_an_open_entry_takes_a_sum_votes_and_weights():
    assert estimate.sums_bytes(255, weighted=False) == 9
    assert estimate.sums_bytes(256, weighted=False) == 10
    assert estimate.sums_bytes(2, weighted=True) == 13


def test_matrices_of_one_client_are_closed_one_by_one():
    aggregation = estimate_memory.aggregation_of(experiment())
    one = estimate_memory.closing_bytes(LINEARS, torch.float16, 1, aggregation)
    assert one == PACKED - 36 + (9 + 6) * 32  # the others packed, and the last
    memory = estimate_memory.server_memory(experiment(1), MODEL)
    assert memory.parts["other open blocks"] == 0


def test_the_evaluation_by_hand():
    config = experiment()
    config.evaluation.texts, config.evaluation.length, config.evaluation.batch = {"x": "x.txt"}, 8, 4
    memory = estimate_memory.evaluation_memory(config, MODEL, {"x": 3, "y": 2})
    assert parts(memory)["windows of all texts"] == 5 * 8 * 24
    assert parts(memory)["a block, or logits"] == max(3 * 8 * 10 * 12, 416 + 24 * 96)
    config.evaluation.batch = 1
    small = estimate_memory.evaluation_memory(config, MODEL, {"x": 3, "y": 2})
    assert small.parts["a block, or logits"] == 416 + 8 * 96


def test_clients_of_one_process_share_the_outer_parts_only():
    two, three = (estimate_memory.serial_memory(experiment(count), MODEL).parts for count in (2, 3))
    alone = of_client().parts
    assert two["outer parts"] == three["outer parts"] == alone["outer parts"]
    assert three["activations"] == 3 * alone["activations"]
    assert three["a client at work"] == alone["one block"] + alone["forward passes"]
    assert three["open blocks"] == two["open blocks"] == 9 * 96


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
        lambda config: setattr(config.client_configs.train_configs, "sparsity", "0.25"),
    ],
)
def test_a_server_takes_more_with_more_to_do(change):
    config = experiment()
    before = estimate_memory.server_memory(config, MODEL).needed
    change(config)
    assert estimate_memory.server_memory(config, MODEL).needed > before


def test_a_server_takes_less_with_fewer_open_blocks_and_uploads():
    config = experiment()
    some = estimate_memory.server_memory(config, MODEL).needed
    assert some < estimate_memory.server_memory(config, MODEL, together=2).needed
    config.server_configs.scheduler_kwargs.max_open_blocks = 0
    assert some > estimate_memory.server_memory(config, MODEL).needed
