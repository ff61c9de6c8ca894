"""The server's side of a round: order of uploads, folds over rounds, comparisons, and what it refuses."""

import errno
import random
import weakref
from fractions import Fraction

import pytest
import torch

from fedspallm_appfl.algorithms import fedavg, fedspallm
from fedspallm_appfl.errors import ConfigError, FederationError, ModelError, UpdateError
from fedspallm_appfl.models.layout import Layout, Linear
from fedspallm_appfl.rounds.client import LocalClient
from fedspallm_appfl.rounds.folds.intake import Receipt
from fedspallm_appfl.settings.schema import HashedModel, Pruning
from fedspallm_appfl.tensors.target import parse_target
from fedspallm_appfl.wire.packed import pack, pack_mask
from fedspallm_appfl.wire.update import compress, make_update, update_nbytes
from helpers.packed import matrices, unpack
from helpers.paths import DEMO
from helpers.rounds import client_settings, global_model, server_settings

SHAPES = {"q": (4, 6), "up": (3, 5)}
LAYOUT = Layout("layers", (tuple(Linear(name, shape, False) for name, shape in SHAPES.items()),) * 3)
HALF = parse_target(0.5)
SPARSEGPT = Pruning("sparsegpt", HALF)
SAMPLES = {"ann": 3, "bob": 1, "cy": 8}
EVERYTHING = {client: [0, 1, 2] for client in SAMPLES}


def matrix(client, block, name, t=0, dtype=torch.float16):
    """A client's weight (a few kept zeros, magnitudes with ties) and mask, exactly half of it pruned."""
    seed, shape = random.Random(f"{client}/{block}/{name}/{t}").randrange(2**31), SHAPES[name]
    generator = torch.Generator().manual_seed(seed)
    entries = shape[0] * shape[1]
    mask = (torch.randperm(entries, generator=generator) >= HALF.zeros(entries)).view(shape)
    return torch.randint(-3, 4, shape, generator=generator).to(dtype) / 4 * mask, mask


def upload(client, blocks, names=tuple(SHAPES), t=0, dtype=torch.float16):
    return make_update(t, {b: {n: pack(*matrix(client, b, n, t, dtype), dtype) for n in names} for b in blocks})


def dense(block, name):
    """A dense matrix that all clients share, with zeros, ties and both signs."""
    seed = random.Random(f"{block}/{name}").randrange(2**31)
    return torch.randint(-3, 4, SHAPES[name], generator=torch.Generator().manual_seed(seed)).half() / 4


def server(folder, assigned=EVERYTHING, dtype=torch.float16, on_event=lambda event: None, **settings):
    model = global_model(LAYOUT, dtype, server_settings(SPARSEGPT, **settings), folder, dense, on_event=on_event)
    model.begin_round(0, assigned)
    return model


def send_all(model, t=0):
    for client, blocks in model.round.assigned.items():
        model.receive(client, upload(client, blocks, t=t), SAMPLES[client])


def stored(store):
    """Every byte of a store."""
    return {
        (block, name, part): getattr(packed, part).view(torch.uint8).tolist()
        for block in store.blocks()
        for name, packed in store.get(block).items()
        for part in ("mask", "values")
    }


def global_oracle(senders, block, name, weigh, fedavg=False):
    """Oracle: l0 mean, then mask expansion over the matrix, in rational numbers and plain loops; (values, mask), row-major.

    Of (client, round) senders, with weight a: `sum a W / sum a` over those that kept an entry, or over all for FedAvg.
    The half that goes is first in the order of (votes, most first; |mean|; index), or of (|mean|, index) for FedAvg.
    """
    weights, masks, a = [], [], [SAMPLES[client] if weigh else 1 for client, _ in senders]
    for client, t in senders:
        weight, mask = matrix(client, block, name, t)
        weights.append([Fraction(value) for value in weight.flatten().tolist()])
        masks.append(mask.flatten().tolist())
    entries, clients = range(len(masks[0])), range(len(senders))
    divisors = [sum(a[k] for k in clients if fedavg or masks[k][i]) for i in entries]
    means = [sum(a[k] * weights[k][i] for k in clients) / max(divisors[i], 1) for i in entries]
    votes = [0 if fedavg else sum(not masks[k][i] for k in clients) for i in entries]
    pruned = sorted(entries, key=lambda i: (-votes[i], abs(means[i]), i))[: len(entries) // 2]
    mask = [i not in pruned for i in entries]
    values = torch.tensor([float(mean) if kept else 0.0 for mean, kept in zip(means, mask, strict=True)])
    return values.half().tolist(), mask


def assert_stored(store, senders_of, weigh, fedavg=False):
    assert store.blocks() == sorted(senders_of)
    for block, senders in senders_of.items():
        linears = store.get(block)
        assert set(linears) == set(SHAPES)
        for name in SHAPES:
            weight, mask = unpack(linears[name])
            assert weight.dtype is torch.float16
            expected = global_oracle(senders, block, name, weigh, fedavg)
            assert (weight.flatten().tolist(), mask.flatten().tolist()) == expected


@pytest.mark.parametrize("weights", ["equal", "sample_size"])
def test_a_round_stores_the_expanded_l0_mean_and_fedavg_beside_it(tmp_path, weights):
    model = server(tmp_path, weights=weights, comparisons=("fedavg",))
    send_all(model)
    senders = dict.fromkeys(range(3), [(client, 0) for client in SAMPLES])
    assert_stored(model.done, senders, weights == "sample_size")
    assert_stored(model.store("fedavg"), senders, weights == "sample_size", fedavg=True)


@pytest.mark.parametrize("weights", ["equal", "sample_size"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_order_of_uploads_never_changes_a_stored_byte(tmp_path, weights, dtype):
    messages = [(client, b, name) for client in SAMPLES for b in range(3) for name in SHAPES]
    results = []
    for order in range(6):
        random.Random(order).shuffle(messages)
        model = server(tmp_path / str(order), dtype=dtype, weights=weights, comparisons=("fedavg", "standalone"))
        for client, block, name in messages:
            model.receive(client, upload(client, [block], [name], dtype=dtype), SAMPLES[client])
        results.append([stored(model.store(n)) for n in ("global", "fedavg", *(f"standalone/{c}" for c in SAMPLES))])
    assert len(results[0][0]) == 12
    assert all(result == results[0] for result in results)


def test_standalone_stores_what_each_client_sent(tmp_path):
    model = server(tmp_path, comparisons=("standalone",))
    for names in (["up"], ["q"]):
        model.receive("bob", upload("bob", [0, 2], names), 1)
    linears = model.store("standalone/bob").get(2)
    assert model.store("standalone/bob").blocks() == [0, 2]
    for name in SHAPES:
        weight, mask = matrix("bob", 2, name)
        assert [part.tolist() for part in unpack(linears[name])] == [weight.tolist(), mask.tolist()]
    assert model.store("standalone/ann").blocks() == []


@pytest.mark.parametrize("weights", ["equal", "sample_size"])
@pytest.mark.parametrize("fold", ["latest", "cumulative"])
def test_a_later_round_replaces_or_adds_to_the_earlier_one(tmp_path, fold, weights):
    model = server(tmp_path, {"ann": [0, 1], "bob": [0]}, fold=fold, weights=weights, comparisons=("fedavg",))
    send_all(model)
    model.begin_round(1, {"ann": [0], "cy": [0, 2], "bob": []})
    send_all(model, t=1)
    earlier = [("ann", 0), ("bob", 0)] if fold == "cumulative" else []
    senders = {0: [*earlier, ("ann", 1), ("cy", 1)], 1: [("ann", 0)], 2: [("cy", 1)]}
    assert_stored(model.done, senders, weights == "sample_size")
    assert_stored(model.store("fedavg"), senders, weights == "sample_size", fedavg=True)


def test_blocks_are_open_from_the_first_upload_to_the_last(tmp_path):
    model = server(tmp_path, {"ann": [0, 1], "bob": [1]})
    seen = []
    for client, block, name in [
        ("ann", 1, "q"),
        ("ann", 0, "q"),
        ("ann", 0, "up"),
        ("bob", 1, "q"),
        ("ann", 1, "up"),
        ("bob", 1, "up"),
    ]:
        model.receive(client, upload(client, [block], [name]), 1)
        seen.append(model.open_blocks())
    assert seen == [{1}, {0, 1}, {1}, {1}, {1}, set()]
    assert model.done.blocks() == [0, 1]


def test_a_block_that_nobody_drew_stays_as_it_was(tmp_path):
    model = server(tmp_path, {"ann": [0], "bob": []})
    send_all(model)
    assert model.done.blocks() == [0]


def pieces(model, limit=10**6):
    """The update to send down, loaded piece by piece."""
    return [model.pieces.load(piece) for piece in model.changes(limit)]


def test_only_the_blocks_that_changed_go_down(tmp_path):
    model = server(tmp_path, {"ann": [2, 0]})
    assert pieces(model) == []
    send_all(model)
    assert [list(update["blocks"]) for update in pieces(model)] == [["0", "2"]]
    model.begin_round(1, {"ann": [1]})
    assert pieces(model) == []
    send_all(model, t=1)
    (update,) = pieces(model)
    assert (update["round"], list(update["blocks"])) == (1, ["1"])
    for name in SHAPES:
        assert [part.tolist() for part in unpack(update["blocks"]["1"][name])] == [
            part.tolist() for part in matrix("ann", 1, name, t=1)
        ]


def test_the_way_down_is_cut_at_the_limit_and_every_matrix_goes_once(tmp_path):
    model = server(tmp_path)
    send_all(model)
    matrix_bytes, block_bytes = 3 + 2 * 12, 3 + 2 * 12 + 2 + 2 * 8
    for limit, expected in ((3 * block_bytes, 1), (2 * block_bytes, 2), (block_bytes, 3), (matrix_bytes, 6)):
        plan = model.changes(limit)
        updates = [model.pieces.load(piece) for piece in plan]
        sent = [(int(b), name) for update in updates for b, linears in update["blocks"].items() for name in linears]
        assert sorted(sent) == [(block, name) for block in range(3) for name in SHAPES]
        assert [(piece.number, piece.total) for piece in plan] == [(number, expected) for number in range(expected)]
        assert [update_nbytes(update) for update in updates] == [piece.nbytes for piece in plan]
        assert all(piece.nbytes <= limit for piece in plan)
    with pytest.raises(ConfigError, match="block 0, q takes 27 bytes packed, a message may have at most 26"):
        model.changes(matrix_bytes - 1)


def test_each_block_that_is_done_is_an_event(tmp_path):
    events = []
    model = server(tmp_path, {"bob": [1], "ann": [0, 1]}, on_event=events.append)
    send_all(model)
    masks = {name: [matrix(client, 1, name)[1] for client in ("ann", "bob")] for name in SHAPES}
    unanimous = sum(int((~(one | other)).sum()) for one, other in masks.values())
    common = {"event": "block", "round": 0, "of": 3, "zeros": 12 + 7, "over_target": 0}
    assert sorted(events, key=lambda event: event["block"]) == [
        common | {"block": 0, "clients": ["ann"], "zeros_before_expansion": 19},
        common
        | {"block": 1, "clients": ["ann", "bob"], "zeros_before_expansion": unanimous}
        | {"zeros_of_one": 19, "zeros_of_two": unanimous},
    ]
    assert 0 < unanimous < 19


def test_rows_that_all_clients_pruned_beyond_the_target_are_reported(tmp_path):
    events = []
    model = server(tmp_path, {"ann": [0]}, on_event=events.append, expansion="row")
    send_all(model)
    over = 0
    for name in SHAPES:
        masks = matrix("ann", 0, name)[1]
        counts = [HALF.zeros((i + 1) * masks.shape[1]) - HALF.zeros(i * masks.shape[1]) for i in range(len(masks))]
        over += sum(max(0, count - int((~row).sum())) for row, count in zip(masks, counts, strict=True))
    assert over > 0
    assert (events[0]["zeros"], events[0]["over_target"]) == (19 + over, over)


def test_received_bytes_are_counted_and_an_empty_message_folds_nothing(tmp_path):
    model = server(tmp_path)
    assert model.receive("ann", {}, 3).nbytes == 0
    assert model.open_blocks() == set()
    update = upload("ann", [1])
    assert model.receive("ann", update, 3).nbytes == update_nbytes(update) == 3 + 2 * 12 + 2 + 2 * 8


def test_a_client_that_is_not_in_the_roster_is_refused(tmp_path):
    with pytest.raises(UpdateError, match=r"from eve: it is not in the roster \['ann', 'bob', 'cy'\]"):
        server(tmp_path).receive("eve", upload("ann", [0]), 1)


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (upload("ann", [2]), r"from client ann: block '2' was not assigned; assigned were \[0, 1\]"),
        (upload("ann", [0], t=1), "from client ann: it is for round 1, this is round 0"),
        (
            upload("ann", [0], dtype=torch.float32),
            "from client ann, block 0, q: values must be 12 entries of torch.float16",
        ),
    ],
)
def test_an_upload_that_was_not_assigned_is_refused(tmp_path, update, message):
    model = server(tmp_path, {"ann": [0, 1]})
    with pytest.raises(UpdateError, match=message):
        model.receive("ann", update, 1)
    assert model.open_blocks() == set()


def test_a_matrix_is_taken_once_a_round(tmp_path):
    model = server(tmp_path)
    model.receive("ann", upload("ann", [0], ["up"]), 1)
    with pytest.raises(UpdateError, match="from client ann: block 0, up was sent before"):
        model.receive("ann", upload("ann", [0]), 1)
    model.receive("ann", upload("ann", [0], ["q"]), 1)
    for client in ("bob", "cy"):
        model.receive(client, upload(client, [0]), 1)
    assert_stored(model.done, {0: [(client, 0) for client in SAMPLES]}, weigh=False)
    model.begin_round(1, EVERYTHING)
    model.receive("ann", upload("ann", [0], t=1), 1)


def test_a_round_cannot_be_ended_with_a_matrix_missing(tmp_path):
    model = server(tmp_path, {"ann": [0, 2], "bob": []})
    model.check_complete("bob")
    model.receive("ann", upload("ann", [0]), 1)
    model.receive("ann", upload("ann", [2], ["q"]), 1)
    with pytest.raises(UpdateError, match="client ann ended round 0 without block 2, up"):
        model.check_complete("ann")
    model.receive("ann", upload("ann", [2], ["up"]), 1)
    model.check_complete("ann")


@pytest.mark.parametrize("samples", [0, -4])
def test_a_sample_size_below_one_is_refused(tmp_path, samples):
    model = server(tmp_path, weights="sample_size")
    with pytest.raises(UpdateError, match="client ann"):
        model.receive("ann", upload("ann", [0]), samples)


def test_nothing_of_a_refused_upload_is_folded(tmp_path):
    model = server(tmp_path, dtype=torch.float32)
    diverged = upload("ann", [0], dtype=torch.float32)
    diverged["blocks"]["0"]["up"]["values"][0] = 1e9
    with pytest.raises(UpdateError, match="client ann, block 0, up: "):
        model.receive("ann", diverged, 1)
    assert model.open_blocks() == set()
    for client in SAMPLES:
        model.receive(client, upload(client, [0], dtype=torch.float32), 1)
    other = server(tmp_path / "other", {client: [0] for client in SAMPLES}, dtype=torch.float32)
    for client in SAMPLES:
        other.receive(client, upload(client, [0], dtype=torch.float32), 1)
    assert stored(model.done) == stored(other.done)


STORES = ("global", "fedavg", *(f"standalone/{client}" for client in SAMPLES))


def everything(model):
    """Every byte of the global model and of its comparisons."""
    return [stored(model.store(name)) for name in STORES]


def masks_of(client, blocks, t=0, values=False):
    """An upload of a pruner that leaves kept weights as they are, as a mask alone or with its values."""

    def packed(block, name):
        mask = matrix(client, block, name, t)[1]
        return pack(dense(block, name), mask, torch.float16) if values else pack_mask(mask)

    return make_update(t, {b: {name: packed(b, name) for name in SHAPES} for b in blocks})


@pytest.mark.parametrize("weights", ["equal", "sample_size"])
@pytest.mark.parametrize("masks_only", [{"ann"}, {"bob", "cy"}, set(SAMPLES)])
def test_masks_alone_give_the_same_bits_as_masks_with_values(tmp_path, masks_only, weights):
    results = []
    for senders in (frozenset(), frozenset(masks_only)):
        model = global_model(
            LAYOUT,
            torch.float16,
            server_settings(
                SPARSEGPT,
                weights=weights,
                fold="cumulative",
                comparisons=("fedavg", "standalone"),
                mask_only=senders,
            ),
            tmp_path / str(len(senders)),
            dense,
        )
        for t in range(2):
            model.begin_round(t, EVERYTHING)
            for client, blocks in EVERYTHING.items():
                update = masks_of(client, blocks, t, values=client not in senders)
                assert model.receive(client, update, SAMPLES[client]).nbytes == update_nbytes(update)
        results.append(everything(model))
    assert all(len(store) == 12 for store in results[1])
    assert results[0] == results[1]


def test_a_mask_alone_is_only_taken_from_those_who_leave_weights_as_they_are(tmp_path):
    model = server(tmp_path, mask_only=frozenset({"ann"}))
    with pytest.raises(UpdateError, match="from client bob, block 0, q: a matrix has the keys shape, mask, values"):
        model.receive("bob", masks_of("bob", [0]), 1)
    with pytest.raises(UpdateError, match="from client ann, block 0, q: a matrix has the keys shape, mask, and"):
        model.receive("ann", masks_of("ann", [0], values=True), 1)
    assert model.open_blocks() == set()


WIDE = Layout("layers", ((Linear("q", (32, 48), False), Linear("up", (16, 96), False)),) * 2)
SPARSE = parse_target("0.9")  # 1382 of 1536 entries


def wide_upload(client, t, dtype):
    """An upload of two blocks whose masks and values both get smaller."""

    def packed(block, linear):
        seed = random.Random(f"{client}/{block}/{linear.name}/{t}").randrange(2**31)
        generator = torch.Generator().manual_seed(seed)
        mask = (torch.randperm(32 * 48, generator=generator) >= 1382).view(linear.shape)
        return pack(torch.randint(-3, 4, linear.shape, generator=generator) / 4, mask, dtype)

    return make_update(t, {b: {linear.name: packed(b, linear) for linear in WIDE.blocks[b]} for b in range(2)})


def wide_server(folder, dtype=torch.float16, **settings):
    settings = server_settings(Pruning("sparsegpt", SPARSE), comparisons=("fedavg", "standalone"), **settings)
    return global_model(WIDE, dtype, settings, folder, dense)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_compressed_uploads_give_the_same_bits_as_plain_ones(tmp_path, dtype):
    results = []
    for prepare in (lambda update: update, compress):
        model, received = wide_server(tmp_path / str(len(results)), dtype, fold="cumulative"), 0
        for t in range(2):
            model.begin_round(t, dict.fromkeys(SAMPLES, [0, 1]))
            for client in SAMPLES:
                update = prepare(wide_upload(client, t, dtype))
                received += model.receive(client, update, 1).nbytes
                assert prepare is not compress or all(p["zstd"] == ["mask", "values"] for *_, p in matrices(update))
        results.append((everything(model), received))
    assert results[0][0] == results[1][0]
    assert all(len(store) == 8 for store in results[0][0])
    assert results[1][1] < results[0][1]


@pytest.mark.parametrize("compression", [False, True])
def test_what_goes_down_is_compressed_only_when_asked(tmp_path, compression):
    model = wide_server(tmp_path, compression=compression)
    model.begin_round(0, {"ann": [0, 1]})
    model.receive("ann", wide_upload("ann", 0, torch.float16), 1)
    sent = pieces(model, limit=192 + 2 * 154)
    assert len(sent) == 4
    assert [(update["piece"], update["pieces"]) for update in sent] == [(i, 4) for i in range(4)]
    for update in sent:
        for _, _, packed in matrices(update):
            assert packed.get("zstd") == (["mask", "values"] if compression else None)
        assert (update_nbytes(update) < 192 + 2 * 154) == compression


def test_a_full_disk_is_named_where_what_goes_down_is_compressed(tmp_path, monkeypatch):
    model = wide_server(tmp_path, compression=True)
    model.begin_round(0, {"ann": [0, 1]})
    model.receive("ann", wide_upload("ann", 0, torch.float16), 1)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ModelError, match=r"down/0.pt cannot be written: No space left on device; make room"):
        pieces(model)


def demo_client():
    """A client that holds the bundled model and needs no text."""
    model = HashedModel(str(DEMO / "model"), "float32")
    return LocalClient(client_settings(Pruning("magnitude", HALF), client="ann", model=model, device="cpu", threads=1))


@pytest.mark.parametrize("compression", [False, True])
def test_a_client_understands_what_goes_down(tmp_path, compression):
    client = demo_client()
    layout, dtype = client.model.layout, client.model.skeleton.stored_dtype
    model = global_model(layout, dtype, server_settings(SPARSEGPT, compression=compression), tmp_path, dense)
    model.begin_round(0, {"ann": [1, 3]})
    for block in (1, 3):
        for linear in layout.blocks[block]:
            entries = linear.shape[0] * linear.shape[1]
            generator = torch.Generator().manual_seed(entries + block)
            mask = (torch.randperm(entries, generator=generator) >= HALF.zeros(entries)).view(linear.shape)
            weight = torch.randn(linear.shape, generator=generator)
            model.receive("ann", make_update(0, {block: {linear.name: pack(weight, mask, dtype)}}), 1)
    sent = pieces(model, limit=100_000)
    assert len(sent) > 2
    assert any(packed.get("zstd") for update in sent for *_, packed in matrices(update)) == compression
    for update in sent:
        client.take(update)
    assert client.agreed.blocks() == [1, 3]
    for block in (1, 3):
        linears, expected = client.agreed.get(block), model.done.get(block)
        assert sorted(linears) == sorted(expected)
        for name, packed in linears.items():
            assert packed.shape == expected[name].shape
            for part in ("mask", "values"):
                given, taken = getattr(expected[name], part), getattr(packed, part)
                assert taken.dtype is given.dtype
                assert torch.equal(taken.view(torch.uint8), given.view(torch.uint8))


def test_what_goes_down_empty_changes_nothing():
    client = demo_client()
    client.take({})
    assert client.agreed.blocks() == []


@pytest.mark.parametrize("weights", ["equal", "sample_size"])
@pytest.mark.parametrize("fold", ["latest", "cumulative"])
def test_the_sums_of_a_matrix_and_the_average_are_dropped_before_its_mask_is_made(tmp_path, monkeypatch, fold, weights):
    model = server(tmp_path, fold=fold, weights=weights, comparisons=("fedavg",))
    sums, averages, opened, dropped = {}, [], [], []
    expand, plain_mean = fedspallm.expand, fedavg.plain_mean

    def references(of):
        return [weakref.ref(tensor) for tensor in (of.total, of.kept) if tensor is not None]

    def watched(votes, *rest):
        dropped.append([reference() is None for reference in (*sums[tuple(votes.shape)], *averages)])
        return expand(votes, *rest)

    def averaged(of):
        mean = plain_mean(of)
        averages.append(weakref.ref(mean))
        return mean

    monkeypatch.setattr(fedspallm, "expand", watched)
    monkeypatch.setattr(fedavg, "plain_mean", averaged)
    for client in SAMPLES:
        for name in SHAPES:
            model.receive(client, upload(client, [0], [name]), SAMPLES[client])
            opened.append([name for _, name in model._open])
            sums.update({SHAPES[name]: references(one) for (_, name), one in model._intake._sums.items()})
    assert opened == [["q"], ["q", "up"], ["q", "up"], ["q", "up"], ["up"], []]
    parts = 1 if weights == "equal" else 2
    assert dropped == [[True] * (parts + 1), [True] * (parts + 2)]
    assert all(reference() is None for of in sums.values() for reference in of)


def test_a_client_that_is_given_up_counts_where_it_has_sent_and_nobody_waits_for_it(tmp_path):
    """cy sends block 0 whole and q of block 1, then is given up before, between or after what the others send."""
    parts = [
        lambda model: model.receive("ann", upload("ann", [0, 1, 2]), 3),
        lambda model: model.receive("bob", upload("bob", [0, 1, 2]), 1),
        lambda model: model.give_up("cy"),
    ]
    for order in ((0, 1, 2), (2, 0, 1), (0, 2, 1)):
        events = []
        model = server(tmp_path / str(order), on_event=events.append, weights="sample_size")
        model.receive("cy", upload("cy", [0]), 8)
        model.receive("cy", upload("cy", [1], names=["q"]), 8)
        for number in order:
            parts[number](model)
        everybody, two = [(client, 0) for client in SAMPLES], [("ann", 0), ("bob", 0)]
        assert model.done.blocks() == [0, 1, 2] and not model.open_blocks()
        for block, name, senders in ((0, "q", everybody), (0, "up", everybody), (1, "q", everybody), (1, "up", two)):
            weight, mask = unpack(model.done.get(block)[name])
            expected = global_oracle(senders, block, name, weigh=True)
            assert (weight.flatten().tolist(), mask.flatten().tolist()) == expected
        assert {event["block"]: event["clients"] for event in events}[2] == ["ann", "bob"]
        with pytest.raises(UpdateError, match="client cy: round 0 goes on without it"):
            model.receive("cy", upload("cy", [2]), 8)
        model.begin_round(1, EVERYTHING)
        send_all(model, t=1)
        assert model.done.blocks() == [0, 1, 2]


def test_a_block_that_nobody_can_complete_any_more_stays_as_it_was(tmp_path):
    model = server(tmp_path, {"ann": [0, 1], "bob": [0]})
    model.receive("ann", upload("ann", [1], names=["q"]), 3)
    assert model.open_blocks() == {1}
    model.give_up("ann")
    assert not model.open_blocks() and model.done.blocks() == []
    model.receive("bob", upload("bob", [0]), 1)
    assert model.done.blocks() == [0] and model.round.changed == {0}
    model.begin_round(1, {"ann": [1]})
    model.receive("ann", upload("ann", [1], t=1), 3)
    assert model.done.blocks() == [0, 1]


@pytest.mark.parametrize("weights", ["equal", "sample_size"])
def test_no_client_can_use_up_the_range_that_others_need(tmp_path, weights):
    """What fits into the sums alone, and would leave no room for an honest upload, is refused from whom it comes."""
    roster = sorted(EVERYTHING)
    model = server(tmp_path, dtype=torch.float32, weights=weights, roster=roster)
    greedy = upload("ann", [0], dtype=torch.float32)
    if weights == "equal":
        greedy["blocks"]["0"]["q"]["values"][0] = 2.0**22 - 1
    samples = 2**21 if weights == "sample_size" else 1
    with pytest.raises(
        UpdateError, match="client ann, block 0, q: a weight of .* exceeds the client's share of the sums"
    ):
        model.receive("ann", greedy, samples)
    for client, blocks in EVERYTHING.items():
        model.receive(client, upload(client, blocks, dtype=torch.float32), SAMPLES[client])


class Far:
    """Folds for another server, which is told nothing but receipts."""

    def __init__(self, intake):
        self.intake, self.said = intake, []

    def stand(self, standing):
        self.said.append((standing.round_index, standing.given_up))
        self.intake.stand(standing)

    def close(self, block, unit):
        self.said.append((block, unit))
        return self.intake.close(block, unit)


def test_a_server_that_hears_receipts_alone_ends_with_the_same_bits(tmp_path):
    near, there = server(tmp_path / "near"), server(tmp_path / "there")
    model, far = server(tmp_path / "far"), Far(there._intake)
    model.fold_elsewhere(far)
    for client in ("ann", "bob"):
        update = upload(client, [0, 1, 2])
        receipt = far.intake.take(client, update, SAMPLES[client])
        assert model.receive(client, receipt, SAMPLES[client]) is receipt
        near.receive(client, update, SAMPLES[client])
    part = upload("cy", [1])
    model.receive("cy", far.intake.take("cy", part, SAMPLES["cy"]), SAMPLES["cy"])
    near.receive("cy", part, SAMPLES["cy"])
    assert far.said == [(0, frozenset()), (1, "q"), (1, "up")]
    for one in (model, near):
        one.give_up("cy")
        one.end_exchange()
    assert far.said[3] == (0, frozenset({"cy"})) and set(far.said[4:]) == {(0, "q"), (0, "up"), (2, "q"), (2, "up")}
    with pytest.raises(UpdateError, match="goes on without it"):
        far.intake.take("cy", upload("cy", [2]), SAMPLES["cy"])
    assert stored(model.done) == stored(near.done)


def test_what_was_folded_elsewhere_in_part_cannot_be_spared(tmp_path):
    model = server(tmp_path)
    receipt = model._intake.take("cy", upload("cy", [1]), SAMPLES["cy"])
    receipt.add(Receipt(refused="refused an update from client cy: the rest of it"))
    with pytest.raises(FederationError, match=r"the rest of it; other parts of it are in the sums.*fold_ranks: 0"):
        model.receive("cy", receipt, SAMPLES["cy"])
