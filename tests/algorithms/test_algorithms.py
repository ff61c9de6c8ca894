"""Whole runs of every algorithm on a tiny model: what each promises, against the pieces it is made of."""

import json
from functools import partial
from itertools import cycle

import pytest
import torch
from safetensors.torch import load_file

from fedspallm_appfl.aggregation.layer_sampling import from_text
from fedspallm_appfl.aggregation.mask_expansion import Votes
from fedspallm_appfl.algorithms import consensus
from fedspallm_appfl.algorithms.algorithm import Matrix
from fedspallm_appfl.cli import main
from fedspallm_appfl.models.inputs import shared_inputs
from fedspallm_appfl.models.lazy_model import LazyModel
from fedspallm_appfl.pruning.registry import find
from fedspallm_appfl.rounds.client import LocalClient
from fedspallm_appfl.rounds.participants import comparisons
from fedspallm_appfl.settings.reading import load_config
from fedspallm_appfl.settings.schema import ClientSettings, Gram, HashedModel, OwnData, Pooled, Pruning
from fedspallm_appfl.tensors.bitmask import to_bits
from fedspallm_appfl.tensors.target import parse_target
from fedspallm_appfl.texts.drawing import draw
from fedspallm_appfl.texts.tokenizer import load_tokenizer
from fedspallm_appfl.texts.windows import Cut
from fedspallm_appfl.validation.rules import check
from fedspallm_appfl.validation.words import forecast
from fedspallm_appfl.wire.packed import pack_mask
from fedspallm_appfl.wire.store import GramStore
from helpers.experiments import DOMAINS, first_pages
from helpers.packed import unpack
from helpers.paths import DEMO
from helpers.rounds import global_model, prune_blocks, server_settings
from helpers.tiny import BLOCKS, events, linears, run, save_tiny, tiny_config, weights

TRAINED = {  # algorithm and its settings
    "fedspallm": {},
    "fedprllm": {},
    "fedavg": {},
    "consensus": {},
    "gram": {},
    "gram sweep": {"gram": {"propagate": "pruned", "target": "dense"}},
    "gram blocks": {"gram": {"propagate": "pruned", "stride": 2}},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def train(**settings):
    return {"client_configs": {"train_configs": settings}}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def zeros_of(folder):
    """Checkpoint name -> zeros of its mask, from the manifest."""
    return {one["name"]: one["zeros"] for one in json.loads((folder / "manifest.json").read_text())["matrices"]}


def own_windows(model, client, count, length=24):
    """The calibration windows of a client of `tiny_config`."""
    return draw(str(first_pages(client)), Cut(length), load_tokenizer(model), count, 0, client)


@pytest.mark.parametrize(("name", "sparsity"), list(zip(TRAINED, cycle(("0.7", "2:4")), strict=False)))
def test_two_rounds_of_some_blocks_give_exactly_the_target_and_leave_the_others_dense(tmp_path, model, name, sparsity):
    sampling = {"layer_sampling": "uniform", "resource_share": 0.34, "sparsity": sparsity}
    changes = train(**sampling) | {"server_configs": {"num_global_epochs": 2}, "seed": 4} | TRAINED[name]
    folder = run(tiny_config(tmp_path, model, name.split()[0], 2, **changes))
    drawn = {block for event in events(folder, "round") for block in from_text(event["blocks"])}
    assert 0 < len(drawn) < BLOCKS
    assert len(events(folder, "round")) == 2
    dense, made = load_file(model / "model.safetensors"), weights(folder)
    assert dense.keys() == made.keys()
    for matrix, tensor in dense.items():
        pruned = matrix in linears(dense) and int(matrix.split(".")[2]) in drawn
        assert torch.equal(made[matrix], tensor) is not pruned
        if pruned:
            zeros = parse_target(sparsity).zeros(tensor.numel())
            assert zeros_of(folder)[matrix] == zeros
            assert int((made[matrix] == 0).sum()) >= zeros
            if sparsity == "2:4":
                assert int((made[matrix].view(-1, 4) != 0).sum(1).max()) == 2


@pytest.mark.parametrize("name", TRAINED)
def test_neither_compression_nor_small_messages_nor_the_order_of_clients_change_a_bit(tmp_path, model, name):
    changes = {"server_configs": {"num_global_epochs": 2}, **train(layer_sampling="sweep", pruner="admm", iterations=3)}
    changes |= TRAINED[name]
    plain = tiny_config(tmp_path / "plain", model, name.split()[0], **changes)
    other = tiny_config(tmp_path / "other", model, name.split()[0], **changes)
    first = run(plain)
    limit = 9000 if name == "gram sweep" else 3000
    comm = f"client_configs.comm_configs={{compression: zstd, max_message_bytes: {limit}}}"
    clients = load_config(other)[0].clients
    names = [client.client_id for client in clients]
    turned = [
        {"client_id": c.client_id, "data": {"text": c.data.text, "windows": c.data.windows}} for c in reversed(clients)
    ]
    second = run(other, comm, f"clients={json.dumps(turned)}", "server_configs.scheduler_kwargs.max_open_blocks=1")
    assert same(weights(first), weights(second))
    assert events(second, "upload")[0]["client"] == names[-1]
    if name not in ("fedprllm", "gram sweep"):  # what they send of a block takes less than the smallest limit
        messages = [max(event["messages"] for event in events(folder, "upload")) for folder in (first, second)]
        assert messages[1] > messages[0]


@pytest.mark.parametrize(
    ("dtype", "pruner"), [(torch.float16, "admm"), (torch.bfloat16, "sparsegpt"), (torch.float32, "wanda")]
)
def test_fedprllm_leaves_what_it_keeps_bit_for_bit(tmp_path, dtype, pruner):
    folder = save_tiny(tmp_path / "model", dtype)
    done = run(tiny_config(tmp_path, folder, "fedprllm", **train(pruner=pruner)))
    dense, made = load_file(folder / "model.safetensors"), weights(done)
    for name in linears(dense):
        kept = made[name] != 0
        assert torch.equal(made[name][kept], dense[name][kept])
        assert made[name].dtype is dtype
        assert int(kept.sum()) == kept.numel() // 2


def test_fedprllm_sends_masks_alone(tmp_path, model):
    folder = run(tiny_config(tmp_path, model, "fedprllm"))
    entries = sum(tensor.numel() for name, tensor in linears(load_file(model / "model.safetensors")).items())
    assert sum(event["bytes"] for event in events(folder, "upload")) == 3 * entries // 8


def test_with_wanda_fedspallm_is_fedprllm(tmp_path, model):
    """In float16 the mean of equal weights is exact, so the two decide by the same numbers."""
    made = [
        weights(run(tiny_config(tmp_path / name, model, name, **train(pruner="wanda"))))
        for name in ("fedspallm", "fedprllm")
    ]
    assert same(*made)


def test_fedavg_is_what_fedspallm_compares_with(tmp_path, model):
    text = {"texts": {"jargon": str(first_pages("jargon"))}, "length": 24, "windows": 4}
    rows = []
    for algorithm, compare in (("fedavg", []), ("fedspallm", ["fedavg"])):
        evaluation = {**text, "compare": compare}
        folder = run(tiny_config(tmp_path / algorithm, model, algorithm, evaluation=evaluation))
        rows.append({event["method"]: event["perplexity"] for event in events(folder, "evaluation")})
    assert rows[0] == {name: rows[1][name] for name in ("dense", "fedavg")}
    assert rows[1]["fedavg"] != rows[1]["fedspallm"]


@pytest.mark.parametrize("pruner", ["sparsegpt", "admm"])
def test_consensus_is_the_mean_of_what_clients_make_under_the_mask_of_all(tmp_path, model, pruner):
    folder = run(tiny_config(tmp_path, model, "consensus", **train(pruner=pruner)))
    lazy, settings = LazyModel(str(model), None, "float32"), Pruning(pruner, parse_target(0.5))
    texts = [own_windows(model, client, 6 + number) for number, client in enumerate(DOMAINS[:3])]
    everything, agreed = set(range(BLOCKS)), {}
    chosen = [dict(prune_blocks(lazy, text, everything, settings, batch=4)) for text in texts]
    for block in everything:
        for name, shape in lazy.layout.shapes(block).items():
            votes = Votes.empty(shape, 3)
            for one in chosen:
                votes.add(to_bits(one[block][name].mask))
            dense = partial(lazy.skeleton.dense_matrix, block, name)
            mask = consensus.agree(votes, Matrix(settings.sparsity, "matrix", lambda dense=dense: dense().float()))
            agreed.setdefault(block, {})[name] = mask
    packed = {block: {name: pack_mask(mask) for name, mask in found.items()} for block, found in agreed.items()}
    solved = [dict(prune_blocks(lazy, text, everything, settings, batch=4, masks=packed)) for text in texts]
    made = weights(folder)
    differs = 0
    for block in everything:
        for name, mask in agreed[block].items():
            got = made[f"model.layers.{block}.{name}.weight"]
            values = torch.stack([one[block][name].weight.double() for one in solved])
            expected = (values.sum(0) / 3).float().half()
            assert torch.equal(got, expected)
            assert not got[~mask].any()
            differs += sum(int((one[block][name].mask != mask).sum()) for one in chosen)
    assert differs > 0  # or there was nothing to agree on


def test_both_exchanges_of_consensus_are_counted(tmp_path, model):
    folder = run(tiny_config(tmp_path, model, "consensus", 2))
    entries = sum(tensor.numel() for name, tensor in linears(load_file(model / "model.safetensors")).items())
    for exchange, expected in ((0, entries // 8), (1, entries)):
        sent = [event for event in events(folder, "upload") if event["exchange"] == exchange]
        assert len(sent) == 2 * BLOCKS
        assert sum(event["bytes"] for event in sent) == 2 * expected
    [done] = events(folder, "round")
    assert done["bytes_down"] == entries // 8


def serve(folder, settings, aggregation, model):
    """One round of some clients and the server, without any framework; (weight, mask) by block and linear."""
    lazy = LazyModel(str(model), None, "float32")
    skeleton = lazy.skeleton
    groups = shared_inputs(skeleton.folder, skeleton.layout)
    server = global_model(
        skeleton.layout, skeleton.stored_dtype, aggregation, folder, skeleton.dense_matrix, groups=groups
    )
    everything = list(range(len(skeleton.layout.blocks)))
    server.begin_round(0, {one.client_id: everything for one in settings})
    clients = [LocalClient(one) for one in settings]
    for number in range(len(server.exchanges)):
        for client in clients:
            client.start_exchange(0, number, everything)
            while client.in_exchange:
                server.receive(client.settings.client_id, client.next_message().update, client.samples)
        for piece in server.changes(10**9):
            for client in clients:
                client.take(server.pieces.load(piece))
        server.next_exchange()
    return {(b, name): unpack(packed) for b in everything for name, packed in server.done.get(b).items()}


@pytest.mark.parametrize(
    "gram",
    [Gram("fp32", first_input="private"), Gram("fp32", "pruned", "dense", "private")],
    ids=["dense", "sweep"],
)
@pytest.mark.parametrize("pruner", ["sparsegpt", "wanda", "admm"])
def test_four_clients_are_as_good_as_one_with_all_the_text(tmp_path, gram, pruner):
    """Windows are drawn for the id of each client, so that the one has those of the four."""
    folder = save_tiny(tmp_path / "model", torch.float32, blocks=2)
    pruning = Pruning(pruner, parse_target(0.5))
    texts = [Pooled(name, str(first_pages(name, 10_000)), 7 + number) for number, name in enumerate(DOMAINS)]

    def told(client, **data):
        shared = {"model": HashedModel(str(folder), "float32"), "device": "cpu", "threads": 1}
        algorithm = {"algorithm": "gram", "gram": gram}
        return ClientSettings(**vars(pruning), client_id=client, data=OwnData(length=24, **data), **shared, **algorithm)

    four = [told(one.client_id, text=one.text, windows=one.windows, batch=4) for one in texts]
    one = [told("all", windows=1, batch=5, pool=texts)]
    aggregation = server_settings(pruning, "gram", gram=gram)
    apart, together = (serve(tmp_path / str(len(of)), of, aggregation, folder) for of in (four, one))
    assert apart.keys() == together.keys()
    of_mask, of_weights = (0.05, 0.3) if gram.propagate == "pruned" else (0.0, 0.01)  # shares; a sweep adds them up
    for (block, name), (weight, mask) in together.items():
        got, same = apart[block, name]
        if block and find(pruner).fits:  # many weights fit inputs that hardly differ; rounding decides which
            assert (same != mask).float().mean() <= of_mask, (block, name)
            assert (got - weight).norm() <= of_weights * weight.norm(), (block, name)
        else:
            assert torch.equal(same, mask), (block, name)
            assert torch.allclose(got, weight, rtol=1e-4, atol=2e-3 if find(pruner).fits else 1e-5), (block, name)


BY_BLOCK = {"precision": "fp32", "first_input": "private", "propagate": "pruned", "stride": 1}


def test_block_by_block_gram_is_centralized(tmp_path):
    folder = save_tiny(tmp_path / "model", torch.float32)
    made = {}
    for algorithm in ("gram", "centralized"):
        extra = {"gram": BY_BLOCK} if algorithm == "gram" else {}
        made[algorithm] = weights(run(tiny_config(tmp_path / algorithm, folder, algorithm, 4, **extra)))
    for name, central in linears(made["centralized"]).items():
        assert torch.equal(made["gram"][name] != 0, central != 0)
        assert torch.allclose(made["gram"][name], central, rtol=1e-4, atol=1e-5)


def test_a_client_of_gram_may_be_alone(tmp_path):
    folder = save_tiny(tmp_path / "model", torch.float32)
    one = weights(run(tiny_config(tmp_path / "one", folder, "gram", 1, gram=BY_BLOCK)))
    other = weights(run(tiny_config(tmp_path / "other", folder, "standalone", 1)) / "models" / "austen")
    assert same(one, other)


@pytest.mark.parametrize("pruner", ["sparsegpt", "wanda"])
def test_standalone_writes_for_each_client_what_it_would_have_alone(tmp_path, model, pruner):
    config = tiny_config(tmp_path / "all", model, "standalone", 2, **train(pruner=pruner))
    together = run(config)
    assert {path.name for path in (together / "models").iterdir()} == set(DOMAINS[:2])
    assert not (together / "model").exists()
    made = []
    for client in load_config(config)[0].clients:
        data = {"text": client.data.text, "windows": client.data.windows}
        alone = tiny_config(tmp_path / client.client_id, model, "fedspallm", 1, **train(pruner=pruner))
        made.append(weights(run(alone, f"clients={json.dumps([{'client_id': client.client_id, 'data': data}])}")))
        assert same(weights(together / "models" / client.client_id), made[-1])
    assert not same(made[0], made[1])


@pytest.mark.parametrize("pruner", ["sparsegpt", "wanda", "magnitude"])
def test_centralized_prunes_once_with_the_windows_of_all(tmp_path, model, pruner):
    done = run(tiny_config(tmp_path, model, "centralized", 3, **train(pruner=pruner)))
    lazy, settings = LazyModel(str(model), None, "float32"), Pruning(pruner, parse_target(0.5))
    text = torch.cat([own_windows(model, client, 6 + number) for number, client in enumerate(DOMAINS[:3])])
    made = weights(done)
    for block, found in prune_blocks(lazy, text, set(range(BLOCKS)), settings, batch=4):
        for name, one in found.items():
            assert torch.equal(made[f"model.layers.{block}.{name}.weight"], one.weight)
    assert {event["client"] for event in events(done, "upload")} == {"pooled"}


@pytest.mark.parametrize("algorithm", ["fedprllm", "gram"])
def test_two_equal_rounds_add_up_to_the_same_model(tmp_path, model, algorithm):
    """Votes count double, and sums are of every token twice; each round draws the same windows."""
    made = []
    for rounds, fold in ((1, "latest"), (2, "cumulative")):
        server = {"num_global_epochs": rounds, "aggregator_kwargs": {"fold": fold}}
        changes = {"gram": {"precision": "fp32"}} if algorithm == "gram" else {}
        folder = tmp_path / f"{rounds}-{fold}"
        made.append(weights(run(tiny_config(folder, model, algorithm, 2, server_configs=server, **changes))))
    for name, expected in linears(made[0]).items():
        if algorithm == "gram":
            assert torch.equal(made[1][name] != 0, expected != 0)
            assert torch.allclose(made[1][name], expected, rtol=2e-3, atol=1e-4)
        else:
            assert torch.equal(made[1][name], expected)


def test_tokens_of_rounds_of_different_clients_are_added(tmp_path, model):
    server = {"num_global_epochs": 3, "aggregator_kwargs": {"fold": "cumulative"}}
    changes = {"server_configs": server, **train(resource_share=0.67, layer_sampling="uniform")}
    folder = run(tiny_config(tmp_path, model, "gram", 3, **changes))
    expected = {}
    for event in events(folder, "block"):
        tokens = sum(24 * (6 + DOMAINS.index(client)) for client in event["clients"])
        expected[event["block"]] = expected.get(event["block"], 0) + tokens
    store = GramStore(folder / "statistics")
    assert len(store.units()) == 4 * len(expected)
    assert {(b, store.load(b, unit)[1].tokens) for b, unit in store.units()} == set(expected.items())


def test_what_a_sweep_prunes_later_knows_what_it_pruned_before(tmp_path, model):
    """The first input of the first block is the same with and without a sweep; from then on they part."""
    dense = weights(run(tiny_config(tmp_path / "plain", model, "gram", gram={"precision": "fp32"})))
    swept = {}
    for target in ("own", "dense"):
        gram = {"precision": "fp32", "propagate": "pruned", "target": target}
        swept[target] = weights(run(tiny_config(tmp_path / target, model, "gram", gram=gram)))
    first, later = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"
    for made in swept.values():
        assert torch.equal(made[first], dense[first])
        assert not torch.equal(made[later], dense[later])
    assert not torch.equal(swept["own"][later], swept["dense"][later])


def test_a_sweep_in_one_part_is_one_pass_of_the_dense_model_and_one_by_block_is_not(tmp_path, model):
    dense = weights(run(tiny_config(tmp_path / "plain", model, "gram")))
    strides = {}
    for stride in (1, BLOCKS):
        gram = {"propagate": "pruned", "stride": stride}
        strides[stride] = weights(run(tiny_config(tmp_path / str(stride), model, "gram", gram=gram)))
    assert same(strides[BLOCKS], dense)
    parted = {name for name in dense if not torch.equal(strides[1][name], dense[name])}
    assert parted == {name for name in linears(dense) if not name.startswith("model.layers.0.")}


def test_statistics_that_would_not_be_sent_are_an_error_that_names_them(tmp_path, model, capsys):
    config = tiny_config(tmp_path, model, "gram", 2, gram={"min_tokens": 145})
    assert main(["run", str(config)]) == 2
    said = "client austen: 6 windows of 24 are 144 tokens, but statistics of fewer than 145 are not sent"
    assert said in " ".join(capsys.readouterr().err.split())
    assert main(["run", str(config), "--overwrite", "gram.min_tokens=144"]) == 0


def wrong(tmp_path, algorithm, *overrides, **changes):
    config, problems = load_config(tiny_config(tmp_path, DEMO / "model", algorithm, **changes), overrides)
    return problems or check(config)


TRAIN, KWARGS = "client_configs.train_configs", "server_configs.aggregator_kwargs"


@pytest.mark.parametrize(
    ("algorithm", "override", "words"),
    [
        ("gram", "algorithm=fedsgd", "algorithm: one of fedspallm, fedprllm, fedavg, consensus, gram, standalone"),
        ("gram", "gram.precision=fp16", "gram.precision: one of fp32, bf16, int8; got 'fp16'"),
        ("gram", "gram.propagate=both", "gram.propagate: one of dense, pruned; got 'both'"),
        ("gram", "gram={propagate: pruned, target: all}", "gram.target: one of own, dense; got 'all'"),
        ("gram", "gram.min_tokens=0", "gram.min_tokens: at least 1, got 0"),
        (
            "gram",
            "gram.target=dense",
            "gram.target: dense outputs are a target in a sweep; set gram.propagate to pruned",
        ),
        (
            "gram",
            "gram.stride=2",
            "gram.stride: one pass of the dense model has no parts; set gram.propagate to pruned",
        ),
        (
            "gram",
            "gram={propagate: pruned, stride: 2, target: dense}",
            "gram.target: dense outputs are matched input by input; set gram.stride to 0",
        ),
        ("gram", f"{TRAIN}.pruner=magnitude", f"{TRAIN}.pruner: magnitude needs no statistics; choose another"),
        ("gram", "clients.1.train_configs.pruner=wanda", "clients.1.train_configs.pruner: gram prunes in one place"),
        ("gram", "clients.0.train_configs.damping=0.1", "clients.0.train_configs.damping: gram prunes in one place"),
        ("gram", f"{KWARGS}.weights=sample_size", f"{KWARGS}.weights: nothing is averaged over clients with gram"),
        (
            "fedavg",
            "gram.precision=fp32",
            "gram: its keys are for algorithms that gather Gram matrices, got algorithm fedavg",
        ),
        (
            "consensus",
            f"{TRAIN}.pruner=wanda",
            f"{TRAIN}.pruner: with wanda no weight changes, so consensus has nothing to average",
        ),
        ("consensus", f"{TRAIN}.pruner=magnitude", f"{TRAIN}.pruner: with magnitude no weight changes"),
        ("standalone", "server_configs.num_global_epochs=2", "algorithm: standalone prunes every block once; set"),
        ("standalone", f"{TRAIN}.resource_share=0.5", "algorithm: standalone prunes every block once; set"),
        ("centralized", "server_configs.num_global_epochs=2", "algorithm: centralized prunes every block once; set"),
        (
            "centralized",
            "clients.1.train_configs.refit=true",
            "clients.1.train_configs.refit: centralized prunes in one",
        ),
        ("fedspallm", f"{TRAIN}={{pruner: magnitude, refit: true}}", f"{TRAIN}.refit: magnitude knows no inputs"),
        ("fedspallm", f"{TRAIN}.iterations=0", f"{TRAIN}.iterations: at least 1, got 0"),
    ],
)
def test_what_does_not_go_with_an_algorithm_is_said_once(tmp_path, algorithm, override, words):
    problems = wrong(tmp_path, algorithm, override)
    assert [problem for problem in problems if words in problem] == problems
    assert len(problems) == 1


@pytest.mark.parametrize("algorithm", ["fedprllm", "fedavg", "consensus", "gram", "standalone", "centralized"])
def test_comparisons_are_made_from_uploads_of_fedspallm(tmp_path, algorithm):
    evaluation = {"texts": {"a": str(DEMO / "text/jargon/test.txt")}, "compare": ["fedavg"]}
    assert wrong(tmp_path, algorithm, evaluation=evaluation) == []
    file = tiny_config(tmp_path, DEMO / "model", algorithm, evaluation=evaluation)
    config, _ = load_config(file)
    assert comparisons(config) == []
    assert any("evaluation.compare is left out" in line for line in forecast(config))


@pytest.mark.parametrize(
    ("algorithm", "overrides"),
    [
        ("gram", ["gram={propagate: pruned, target: dense, precision: bf16, min_tokens: 1}"]),
        ("gram", [f"{TRAIN}.pruner=admm"]),
        ("gram", [f"{TRAIN}={{pruner: wanda, refit: true}}"]),
        ("consensus", [f"{TRAIN}={{pruner: wanda, refit: true}}"]),
        ("consensus", [f"{TRAIN}.resource_share=0.5", f"{KWARGS}={{fold: latest, weights: sample_size}}"]),
        ("fedprllm", ["clients.0.train_configs.pruner=wanda", "clients.1.train_configs.pruner=magnitude"]),
        ("standalone", ["clients.0.train_configs.pruner=wanda"]),
        ("centralized", [f"{TRAIN}.pruner=magnitude"]),
    ],
)
def test_what_goes_with_an_algorithm_is_no_problem(tmp_path, algorithm, overrides):
    assert wrong(tmp_path, algorithm, *overrides) == []
