"""The server's side of every algorithm: against plain loops over the uploads, in any order, and what it refuses."""

import itertools
import random
from fractions import Fraction

import pytest
import torch

from fedspallm_appfl.algorithms import registry
from fedspallm_appfl.algorithms.algorithm import Algorithm, Exchange
from fedspallm_appfl.algorithms.registry import BUILT_IN
from fedspallm_appfl.errors import PruningError, UpdateError
from fedspallm_appfl.models.layout import Layout, Linear
from fedspallm_appfl.pruning.from_sums import Sums, prune
from fedspallm_appfl.rounds.folds.context import STATISTICS
from fedspallm_appfl.rounds.folds.statistics import prune_input
from fedspallm_appfl.settings.schema import Gram, Pruning
from fedspallm_appfl.tensors.target import parse_target
from fedspallm_appfl.wire.grams import MOST_SQUARES, pack_gram
from fedspallm_appfl.wire.packed import Packed, pack, pack_mask, pack_values
from fedspallm_appfl.wire.store import GramStore
from fedspallm_appfl.wire.update import compress, make_update
from helpers.packed import unpack, unpack_mask
from helpers.rounds import global_model, server_settings

SHAPES = {"q": (4, 6), "k": (2, 6), "up": (6, 8)}
GROUPS = ((("q", "k"), ("up",)),) * 3
LAYOUT = Layout("layers", (tuple(Linear(name, shape, False) for name, shape in SHAPES.items()),) * 3)
HALF = parse_target(0.5)
SAMPLES = {"ann": 3, "bob": 1, "cy": 8}
EVERYTHING = {client: [0, 1, 2] for client in SAMPLES}


def seeded(*words):
    return torch.Generator().manual_seed(random.Random("/".join(map(str, words))).randrange(2**31))


def dense(block, name, dtype=torch.float16):
    """Dense weights with ties in magnitude, zeros and negative zeros."""
    weight = torch.randint(-6, 7, SHAPES[name], generator=seeded("dense", block, name)).to(dtype) / 4
    weight[0, 0] = -0.0
    return weight


def mask_of(client, block, name, t=0):
    """A client's mask, exactly half of it kept."""
    shape = SHAPES[name]
    entries = shape[0] * shape[1]
    return (torch.randperm(entries, generator=seeded(client, block, name, t)) >= HALF.zeros(entries)).view(shape)


def server(folder, algorithm, assigned=EVERYTHING, dtype=torch.float16, pruner="wanda", on_event=None, **settings):
    model = global_model(
        LAYOUT,
        dtype,
        server_settings(Pruning(pruner, HALF), algorithm, **settings),
        folder,
        lambda block, name: dense(block, name, dtype),
        on_event=on_event or (lambda event: None),
        groups=GROUPS if algorithm == "gram" else (),
    )
    model.begin_round(0, assigned)
    return model


def masks(client, blocks, t=0, names=tuple(SHAPES)):
    return make_update(t, {b: {n: pack_mask(mask_of(client, b, n, t)) for n in names} for b in blocks})


def send(model, uploads):
    for client, update in uploads:
        model.receive(client, update, SAMPLES[client])


def most_voted(senders, block, name):
    """Oracle: the half that goes is first by votes, then by the dense weight's magnitude, then by index."""
    size = dense(block, name).float().abs().flatten().tolist()
    votes = [0] * len(size)
    for client, t in senders:
        for i, kept in enumerate(mask_of(client, block, name, t).flatten().tolist()):
            votes[i] += not kept
    pruned = sorted(range(len(size)), key=lambda i: (-votes[i], size[i], i))[: len(size) // 2]
    return [i not in pruned for i in range(len(size))]


def bits(tensor):
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()]).tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_fedprllm_keeps_dense_weights_bit_for_bit_under_the_most_voted_mask(tmp_path, dtype):
    model = server(tmp_path, "fedprllm", {"ann": [0, 1, 2], "bob": [0, 1], "cy": [0]}, dtype)
    senders = {0: ["ann", "bob", "cy"], 1: ["ann", "bob"], 2: ["ann"]}
    send(model, [(client, masks(client, blocks)) for client, blocks in model.round.assigned.items()])
    for block, clients in senders.items():
        for name, packed in model.done.get(block).items():
            weight, mask = unpack(packed)
            assert mask.flatten().tolist() == most_voted([(client, 0) for client in clients], block, name)
            assert weight.dtype is dtype
            expected = torch.where(mask, dense(block, name, dtype), torch.zeros((), dtype=dtype))
            assert bits(weight) == bits(expected)
    assert not model.next_exchange()


@pytest.mark.parametrize("fold", ["latest", "cumulative"])
@pytest.mark.parametrize("algorithm", ["fedprllm", "consensus"])
def test_votes_of_a_later_round_replace_or_add(tmp_path, algorithm, fold):
    model = server(tmp_path, algorithm, {"ann": [0, 1], "bob": [0]}, fold=fold)
    send(model, [("ann", masks("ann", [0, 1])), ("bob", masks("bob", [0]))])
    if algorithm == "consensus":
        give_values(model)
    model.begin_round(1, {"ann": [0], "cy": [0, 2]})
    send(model, [("ann", masks("ann", [0], 1)), ("cy", masks("cy", [0, 2], 1))])
    model.end_exchange()
    earlier = [("ann", 0), ("bob", 0)] if fold == "cumulative" else []
    store = model.store("masks" if algorithm == "consensus" else "global")
    assert store.blocks() == [0, 1, 2]
    for block, senders in {0: [*earlier, ("ann", 1), ("cy", 1)], 1: [("ann", 0)], 2: [("cy", 1)]}.items():
        for name, packed in store.get(block).items():
            assert unpack_mask(packed).flatten().tolist() == most_voted(senders, block, name)


def values_of(client, block, name, agreed, t=0):
    """A client's weights under an agreed mask, on a grid with kept zeros."""
    weight = torch.randint(-20, 21, SHAPES[name], generator=seeded("values", client, block, name, t)) / 8
    return pack_values(weight, agreed.mask, torch.float16)


def give_values(model, clients=None):
    """The second exchange of `consensus`."""
    assert model.next_exchange()
    for client in clients or model.round.assigned:
        model.receive(client, values(model, client), SAMPLES[client])


def values(model, client, names=tuple(SHAPES)):
    made = {
        block: {name: values_of(client, block, name, model.store("masks").get(block)[name]) for name in names}
        for block in model.round.assigned[client]
    }
    return make_update(model.round.index, made, 1)


def test_counts_of_a_block_that_nobody_could_complete_do_not_go_into_the_next_round(tmp_path):
    """All masks came, and then the only client with values of block 2 was given up."""
    events, assigned = [], {"ann": [0, 1], "cy": [2]}
    model = server(tmp_path, "consensus", assigned, on_event=events.append)
    send(model, [(client, masks(client, blocks)) for client, blocks in assigned.items()])
    assert model.next_exchange()
    model.give_up("cy")
    model.receive("ann", values(model, "ann"), SAMPLES["ann"])
    model.begin_round(1, assigned)
    send(model, [(client, masks(client, blocks, 1)) for client, blocks in assigned.items()])
    give_values(model)
    assert [(event["round"], event["block"]) for event in events] == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    assert {(event["zeros"], event["zeros_before_expansion"]) for event in events} == {(42, 42)}


@pytest.mark.parametrize("weights", ["equal", "sample_size"])
def test_consensus_is_the_mean_of_all_values_under_the_mask_of_all(tmp_path, weights):
    events = []
    assigned = {"ann": [0, 1, 2], "bob": [0, 1], "cy": [0]}
    model = server(tmp_path, "consensus", assigned, weights=weights, on_event=events.append)
    send(model, [(client, masks(client, blocks)) for client, blocks in assigned.items()])
    assert model.done.blocks() == []
    assert events == []
    [piece] = model.changes(10**6)
    down = model.pieces.load(piece)
    assert (down["exchange"], list(down["blocks"])) == (0, ["0", "1", "2"])
    give_values(model)
    for block in range(3):
        clients = [client for client, blocks in assigned.items() if block in blocks]
        for name, packed in model.done.get(block).items():
            weight, mask = unpack(packed)
            assert mask.flatten().tolist() == most_voted([(client, 0) for client in clients], block, name)
            assert torch.equal(unpack_mask(down["blocks"][str(block)][name]), mask)
            assert set(down["blocks"][str(block)][name]) == {"shape", "mask"}
            share = {client: SAMPLES[client] if weights == "sample_size" else 1 for client in clients}
            terms = [values_of(c, block, name, packed).values.tolist() for c in clients]
            for i, got in enumerate(packed.values.tolist()):
                total = sum(share[c] * Fraction(term[i]) for c, term in zip(clients, terms, strict=True))
                mean = torch.tensor(float(total / sum(share.values()))).float().half()
                assert got == float(mean)
            assert not weight[~mask].any()
    assert sorted(event["block"] for event in events) == [0, 1, 2]
    assert all(event["zeros"] == 12 + 6 + 24 and event["over_target"] == 0 for event in events)


@pytest.mark.parametrize("algorithm", ["fedprllm", "consensus"])
def test_the_order_of_uploads_changes_no_bit(tmp_path, algorithm):
    made = []
    for number, order in enumerate(itertools.permutations(SAMPLES)):
        model = server(tmp_path / str(number), algorithm)
        send(model, [(client, masks(client, EVERYTHING[client])) for client in order])
        if algorithm == "consensus":
            give_values(model, order[::-1])
        made.append({b: {n: [t.tolist() for t in unpack(p)] for n, p in model.done.get(b).items()} for b in range(3)})
    assert all(one == made[0] for one in made)


def inputs_of(client, block, unit, t=0):
    """What a client's text gives to an input: more tokens for some clients."""
    features, tokens = SHAPES[unit][1], 15 + 4 * SAMPLES[client]
    return torch.randn(tokens, features, generator=seeded("inputs", client, block, unit, t)) * torch.arange(
        1, features + 1
    )


def grams(client, blocks, t=0, precision="fp32", units=("q", "up"), exchange=0, drift=False):
    def packed(block, unit):
        x = inputs_of(client, block, unit, t)
        return pack_gram(Sums((x.T @ x).triu(), len(x), 0.1 * x.roll(1, 1).T @ x if drift else None), precision)

    return make_update(t, {b: {u: packed(b, u) for u in units} for b in blocks}, exchange)


def gram_oracle(senders, block, unit, pruner):
    """What a pruner makes of the inputs of all senders at once: linear -> (weight, mask)."""
    x = torch.cat([inputs_of(client, block, unit, t) for client, t in senders]).double()
    sums = Sums((x.T @ x).float().triu(), len(x))
    names = next(names for names in GROUPS[block] if names[0] == unit)
    return prune({n: dense(block, n, torch.float32) for n in names}, sums, Pruning(pruner, HALF), rounded=False)


@pytest.mark.parametrize("pruner", ["sparsegpt", "wanda", "admm"])
def test_gram_prunes_as_if_all_texts_were_in_one_place(tmp_path, pruner):
    assigned = {"ann": [0, 1, 2], "bob": [0, 1], "cy": [0]}
    model = server(tmp_path, "gram", assigned, torch.float32, pruner, gram=Gram("fp32"))
    send(model, [(client, grams(client, blocks)) for client, blocks in assigned.items()])
    for block in range(3):
        senders = [(client, 0) for client, blocks in assigned.items() if block in blocks]
        assert set(model.done.get(block)) == set(SHAPES)
        for unit in ("q", "up"):
            for name, (weight, mask) in gram_oracle(senders, block, unit, pruner).items():
                made, kept = unpack(model.done.get(block)[name])
                assert torch.equal(kept, mask)
                assert torch.allclose(made, weight, rtol=1e-4, atol=1e-5)
    assert model.changes(10**6) == []
    assert not model.next_exchange()


def test_a_weight_that_is_not_finite_is_not_blamed_on_the_statistics():
    weight = torch.ones(2, 4)
    weight[0, 0] = torch.nan
    with pytest.raises(
        PruningError, match="server, block 2, up: the weights of up in the checkpoint hold NaN or infinity"
    ):
        pruned_alone(weight)


def pruned_alone(weight):
    how = False, None, (2, "up"), True, torch.float16
    return prune_input({"up": weight}, Sums(torch.eye(4), 4), Pruning("wanda", HALF), *how)


def test_a_weight_that_the_checkpoint_cannot_hold_is_refused():
    weight = torch.ones(2, 4)
    assert pruned_alone(weight)["up"].kept == 4
    weight[0, 0] = 1e5  # infinite in float16
    with pytest.raises(PruningError, match="server, block 2, up: pruning up gave NaN or infinity"):
        pruned_alone(weight)


@pytest.mark.parametrize("fold", ["latest", "cumulative"])
def test_statistics_of_a_later_round_replace_or_add(tmp_path, fold):
    model = server(tmp_path, "gram", {"ann": [0, 1], "bob": [0]}, torch.float32, gram=Gram("fp32"), fold=fold)
    send(model, [("ann", grams("ann", [0, 1])), ("bob", grams("bob", [0]))])
    model.begin_round(1, {"ann": [0], "cy": [0, 2]})
    send(model, [("ann", grams("ann", [0], 1)), ("cy", grams("cy", [0, 2], 1))])
    model.end_exchange()
    earlier = [("ann", 0), ("bob", 0)] if fold == "cumulative" else []
    store = GramStore(tmp_path / STATISTICS)
    assert store.units() == [(block, unit) for block in range(3) for unit in ("q", "up")]
    for block, senders in {0: [*earlier, ("ann", 1), ("cy", 1)], 1: [("ann", 0)], 2: [("cy", 1)]}.items():
        for unit in ("q", "up"):
            x = torch.cat([inputs_of(client, block, unit, t) for client, t in senders])
            names, sums, rounded = store.load(block, unit)
            assert names == next(names for names in GROUPS[block] if names[0] == unit)
            assert (sums.tokens, rounded) == (len(x), False)
            assert torch.allclose(sums.upper, (x.T @ x).triu(), rtol=1e-5, atol=1e-3)
            for name, (weight, mask) in gram_oracle(senders, block, unit, "wanda").items():
                made, kept = unpack(model.done.get(block)[name])
                assert torch.equal(kept, mask)
                assert torch.equal(made, weight)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_the_order_of_statistics_changes_no_bit_compressed_or_not(tmp_path, precision):
    made = []
    for number, order in enumerate([*itertools.permutations(SAMPLES)]):
        model = server(tmp_path / str(number), "gram", dtype=torch.float32, pruner="sparsegpt", gram=Gram(precision))
        for client in order:
            update = grams(client, EVERYTHING[client], precision=precision)
            send(model, [(client, compress(update) if number % 2 else update)])
        made.append({b: {n: bits(unpack(p)[0]) for n, p in model.done.get(b).items()} for b in range(3)})
        model.end_exchange()
        rounded = GramStore(tmp_path / str(number) / STATISTICS).load(0, "q")[2]
        assert rounded is (precision != "fp32")
    assert all(one == made[0] for one in made)


def test_a_sweep_answers_every_exchange_with_what_it_made(tmp_path):
    events, gram = [], Gram("int8", "pruned", "dense")
    assigned = {"ann": [0, 2], "bob": [0], "cy": []}
    model = server(tmp_path, "gram", assigned, torch.float32, "admm", gram=gram, on_event=events.append)
    order = [(block, unit) for block in range(3) for unit in ("q", "up")]
    for number, (block, unit) in enumerate(order):
        assert model.round.exchange == number
        for client, blocks in assigned.items():
            assert model.owes(client, block) is (block in blocks)
            if block in blocks:
                update = grams(client, [block], 0, "int8", [unit], number, drift=True)
                model.receive(client, update, SAMPLES[client])
            model.check_complete(client)
        down = [model.pieces.load(piece) for piece in model.changes(10**6)]
        names = {"q": {"q", "k"}, "up": {"up"}}[unit]
        assert [set(update["blocks"][str(block)]) for update in down] == ([names] if block != 1 else [])
        assert all(update["exchange"] == number and list(update["blocks"]) == [str(block)] for update in down)
        assert [event["block"] for event in events] == [b for b in (0, 2) if (b, "up") in order[: number + 1]]
        assert model.next_exchange() is (number < len(order) - 1)
    assert model.done.blocks() == [0, 2]
    assert model.round.changed == {0, 2}
    assert not (tmp_path / STATISTICS).exists()  # they hold for one model only
    for block in (0, 2):
        for packed in model.done.get(block).values():
            mask = unpack_mask(packed)
            assert int((~mask).sum()) == mask.numel() // 2


def test_uploads_of_an_algorithm_that_keeps_them_apart_are_not_mixed(tmp_path):
    model = server(tmp_path, "standalone")
    for client in SAMPLES:
        made = {b: {n: pack(dense(b, n), mask_of(client, b, n), torch.float16) for n in SHAPES} for b in range(3)}
        model.receive(client, make_update(0, made), SAMPLES[client])
    for client in SAMPLES:
        for block in range(3):
            for name, packed in model.store(f"standalone/{client}").get(block).items():
                assert torch.equal(unpack_mask(packed), mask_of(client, block, name))
    assert model.done.blocks() == []
    assert model.changes(10**6) == []


def refused(model, client, update, words):
    with pytest.raises(UpdateError, match=f"refused an update from client {client}.*{words}"):
        model.receive(client, update, 1)
    assert model.open_blocks() == set()


@pytest.mark.parametrize(("algorithm", "total"), [("consensus", 2), ("gram", 6)])
def test_an_update_for_another_exchange_is_refused(tmp_path, algorithm, total):
    gram = Gram("fp32", "pruned")
    model = server(tmp_path, algorithm, gram=gram)
    for wrong in (*range(1, total), -1, total, True, 0.0, "0", None):
        update = masks("ann", [0]) if algorithm == "consensus" else grams("ann", [0], units=["q"])
        refused(model, "ann", update | {"exchange": wrong}, f"it is for exchange {wrong!r}, this is exchange 0")
    update.pop("exchange")
    refused(model, "ann", update, "the keys are")


def test_values_before_masks_and_masks_after_them_are_refused(tmp_path):
    model = server(tmp_path, "consensus", {"ann": [0]})
    early = make_update(0, {0: {"q": Packed((4, 6), values=torch.zeros(12, dtype=torch.float16))}})
    refused(model, "ann", early, "block 0, q: a matrix has the keys shape, mask, and `zstd`")
    send(model, [("ann", masks("ann", [0]))])
    assert model.next_exchange()
    refused(model, "ann", masks("ann", [0]), "it is for exchange 0, this is exchange 1")
    refused(model, "ann", masks("ann", [0]) | {"exchange": 1}, "a matrix has the keys shape, values, and `zstd`")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p | {"values": p["values"][:-1]}, "values must be 12 entries of torch.float16"),
        (lambda p: p | {"values": torch.cat([p["values"]] * 2)}, "values must be 12 entries of torch.float16"),
        (lambda p: p | {"values": p["values"].float()}, "values must be 12 entries of torch.float16"),
        (lambda p: p | {"values": p["values"] * torch.nan}, "the values hold NaN or infinity"),
        (lambda p: p | {"values": p["values"].to_sparse()}, "values must be a tensor in memory"),
        (lambda p: p | {"values": p["values"].tolist()}, "values must be a tensor in memory"),
        (lambda p: p | {"shape": [6, 4]}, r"the shape is \[6, 4\], expected \[4, 6\]"),
        (lambda p: p | {"mask": torch.zeros(3, dtype=torch.uint8)}, "a matrix has the keys shape, values, and `zstd`"),
        (lambda p: {"shape": p["shape"]}, "a matrix has the keys shape, values, and `zstd`"),
        (lambda p: p | {"zstd": ["mask"]}, "`zstd` lists which of the parts are compressed"),
        (lambda p: p | {"zstd": ["values"]}, "values: not a frame but"),
    ],
)
def test_values_that_do_not_fit_the_agreed_mask_are_refused(tmp_path, change, words):
    model = server(tmp_path, "consensus", {"ann": [0]})
    send(model, [("ann", masks("ann", [0]))])
    assert model.next_exchange()
    update = values(model, "ann", ["q"])
    update["blocks"]["0"]["q"] = change(update["blocks"]["0"]["q"])
    refused(model, "ann", update, f"block 0, q: {words}")
    send(model, [("ann", compress(values(model, "ann")))])
    assert model.done.blocks() == [0]


@pytest.mark.parametrize("algorithm", ["fedprllm", "consensus", "gram"])
def test_nothing_is_taken_twice_in_an_exchange(tmp_path, algorithm):
    model = server(tmp_path, algorithm, {"ann": [0, 1], "bob": [0, 1]}, gram=Gram("fp32"))
    make = grams if algorithm == "gram" else masks
    model.receive("ann", make("ann", [0]), 1)
    with pytest.raises(UpdateError, match="from client ann: block 0, q was sent before"):
        model.receive("ann", make("ann", [0, 1]), 1)
    assert model.open_blocks() == {0}  # block 1 of the refused one was not folded
    model.receive("bob", make("bob", [0, 1]), 1)
    model.receive("ann", make("ann", [1]), 1)
    with pytest.raises(UpdateError, match="was sent before"):
        model.receive("ann", make("ann", [1]), 1)
    if algorithm == "consensus":
        assert model.next_exchange()
        model.receive("ann", values(model, "ann"), 1)
        with pytest.raises(UpdateError, match="block 0, q was sent before"):
            model.receive("ann", values(model, "ann"), 1)


def test_an_exchange_about_one_input_takes_nothing_else(tmp_path):
    model = server(tmp_path, "gram", {"ann": [0, 1]}, gram=Gram("fp32", "pruned"))
    refused(model, "ann", grams("ann", [0], units=["up"]), r"block 0, up: there is no such linear; there are \['q'\]")
    refused(model, "ann", grams("ann", [1], units=["q"]), r"block '1' was not assigned; assigned were \[0\]")
    with pytest.raises(UpdateError, match="client ann ended round 0 without block 0, q"):
        model.check_complete("ann")
    model.receive("ann", grams("ann", [0], units=["q"]), 1)
    model.check_complete("ann")


@pytest.mark.parametrize(
    ("algorithm", "make"),
    [("consensus", lambda: masks("ann", [0])), ("gram", lambda: grams("ann", [0], units=["q"]))],
)
def test_an_exchange_cannot_end_with_something_open(tmp_path, algorithm, make):
    model = server(tmp_path, algorithm, {"ann": [0], "bob": [0]}, gram=Gram("fp32", "pruned"))
    model.receive("ann", make(), 1)
    for end in (model.next_exchange, lambda: model.begin_round(1, EVERYTHING)):
        with pytest.raises(RuntimeError, match=r"round 0 cannot end: blocks \[0\] are not complete"):
            end()


@pytest.mark.parametrize("algorithm", [name for name in BUILT_IN if name not in ("gram", "fedprllm", "consensus")])
def test_statistics_and_bare_masks_are_nothing_for_the_others(tmp_path, algorithm):
    model = server(tmp_path, algorithm)
    for update in (grams("ann", [0], units=["q"]), masks("ann", [0])):
        refused(model, "ann", update, "block 0, q: a matrix has the keys shape, mask, values, and `zstd`")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("change", [lambda part: part * 1e3, lambda part: part.sign() * 3e38])
def test_statistics_that_no_text_gives_are_refused_by_name_before_anything_is_folded(tmp_path, precision, change):
    """Correlations far above 1, and products that leave the range of float32."""
    model = server(tmp_path, "gram", {"ann": [0], "bob": [0]}, gram=Gram(precision))
    update = grams("ann", [0], precision=precision, units=["up"])
    packed, part = update["blocks"]["0"]["up"], "scale" if precision == "int8" else "upper"
    packed[part] = change(packed[part])
    refused(model, "ann", update, "block 0, up: correlations are at most 1, got")
    model.receive("ann", grams("ann", [0], precision=precision, units=["up"]), 1)


@pytest.mark.parametrize("pruner", ["sparsegpt", "admm", "wanda"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("target", ["own", "dense"])
def test_nothing_that_one_client_may_send_raises_while_anothers_statistics_are_handled(
    tmp_path, pruner, precision, target
):
    """Signs that belong to no inputs, on the largest diagonal, a tiny one and none at all, and the largest drift."""
    gram, drift = Gram(precision, "pruned" if target == "dense" else "dense", target), target == "dense"
    for number, diagonal in enumerate((MOST_SQUARES, 1e-38, 0.0)):
        model = server(tmp_path / str(number), "gram", {"ann": [0], "bob": [0]}, pruner=pruner, gram=gram)
        generator, units = torch.Generator().manual_seed(number), model._units(0)
        update = grams("ann", [0], precision=precision, units=units, drift=drift)
        for packed in update["blocks"]["0"].values():
            packed["diagonal"].fill_(diagonal)
            for part, scale, limit in (("upper", "scale", 0.99), ("drift", "drift_scale", 900.0)):
                if part in packed:
                    signs = torch.rand(packed[part].shape, generator=generator).sub_(0.5).sign()
                    unit = 127 if scale in packed else limit * diagonal
                    packed[part] = (signs * unit).to(packed[part].dtype)
                if scale in packed:
                    packed[scale].fill_(limit / 127)
        model.receive("ann", update, 1)
        model.receive("bob", grams("bob", [0], precision=precision, units=units, drift=drift), 1)


@pytest.mark.parametrize("pruner", ["sparsegpt", "admm"])
def test_exact_statistics_of_no_inputs_are_lifted_as_rounded_ones_are(pruner):
    """Sixteen features, each the opposite of every other."""
    gram = torch.full((16, 16), -1.0).fill_diagonal_(1.0).triu()
    settings = Pruning(pruner, HALF, damping_retries=0)
    weight, mask = prune({"q": torch.randn(4, 16)}, Sums(gram, 20), settings, rounded=False)["q"]
    assert bool(weight.isfinite().all()) and int(mask.sum()) == 32


@pytest.mark.parametrize("expansion", ["matrix", "row"])
@pytest.mark.parametrize("more", [-1, 1])
def test_an_algorithm_that_misses_the_target_is_named(tmp_path, monkeypatch, expansion, more):
    """Its mask prunes an entry more or less than it should, although nobody asked for it."""

    def combine(votes, matrix):
        dense = matrix.dense()
        kept = torch.ones(dense.numel(), dtype=torch.bool)
        kept[: matrix.target.zeros(dense.numel()) + more] = False
        return dense, kept.view(dense.shape)

    mine = Algorithm("mine", [Exchange("masks", "weights", combine)], expands=True)
    monkeypatch.setitem(registry.REGISTRY._known, "mine", mine)
    model = server(tmp_path, "mine", {"ann": [0], "bob": [0], "cy": [0]}, expansion=expansion)
    message = f"algorithm mine, block 0, q: sparsity 0.5 prunes 12 of 24 entries, the mask {12 + more}"
    with pytest.raises(PruningError, match=message):
        send(model, [(client, masks(client, [0])) for client in SAMPLES])
