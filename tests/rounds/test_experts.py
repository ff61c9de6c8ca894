"""The server's side of mixtures of experts: clients whose tokens reach an expert, and those that leave it out."""

from dataclasses import replace

import pytest
import torch

from fedspallm_appfl.errors import UpdateError
from fedspallm_appfl.models.layout import Layout, Linear
from fedspallm_appfl.settings.schema import Pruning
from fedspallm_appfl.tensors.target import parse_target
from fedspallm_appfl.wire.packed import Unreached, pack, pack_mask, pack_values
from fedspallm_appfl.wire.update import compress, make_update
from helpers.rounds import global_model, server_settings

NAME, SHAPE = "experts.0.up_proj", (2, 4)
LAYOUT = Layout("layers", ((Linear("q", SHAPE, False), Linear(NAME, SHAPE, False, expert=True)),))
DENSE = torch.tensor([[1.0, -2.0, 3.0, -4.0], [0.5, 6.0, -7.0, 8.0]])
KEPT = torch.tensor([[True, True, False, False], [True, False, True, False]])
HALF = Pruning("sparsegpt", parse_target(0.5))


def server(folder, algorithm="fedspallm", clients=("a", "b", "c"), events=None, **settings):
    log = (lambda event: None) if events is None else events.append
    told = server_settings(HALF, algorithm, **settings)
    model = global_model(LAYOUT, torch.float32, told, folder, lambda block, name: DENSE, on_event=log)
    model.begin_round(0, dict.fromkeys(clients, [0]))
    return model


def weights(value, tokens):
    """An upload of all kept weights at one value; `tokens` None leaves the expert out."""
    one = pack(torch.full(SHAPE, value), KEPT, torch.float32)
    return make_update(0, {0: {"q": one, NAME: Unreached(3) if tokens is None else replace(one, tokens=tokens)}})


def done(model):
    return {name: one.unpack_weight() for name, one in model.done.get(0).items()}


@pytest.mark.parametrize("packed", [lambda update: update, compress])
def test_an_expert_is_the_mean_over_clients_that_have_it_by_their_tokens(tmp_path, packed):
    events = []
    model = server(tmp_path, events=events)
    model.receive("a", packed(weights(1.0, 64)), 1)  # weighs one
    model.receive("b", packed(weights(4.0, 65)), 1)  # 65 tokens begin a second unit
    model.receive("c", packed(weights(100.0, None)), 1)
    found = done(model)
    assert torch.equal(found["q"], KEPT * torch.tensor(35.0))  # all three alike
    assert torch.equal(found[NAME], KEPT * torch.tensor(3.0))  # (1 + 2 * 4) / 3
    [block] = [event for event in events if event["event"] == "block"]
    assert (block["left_out"], block.get("unreached", 0)) == (1, 0)


@pytest.mark.parametrize(("unreached", "zeros"), [("magnitude", 4), ("dense", 0)])
def test_an_expert_that_nobody_has_is_pruned_by_magnitude_or_stays_dense(tmp_path, unreached, zeros):
    events = []
    model = server(tmp_path, events=events, unreached=unreached)
    for client in "abc":
        model.receive(client, weights(1.0, None), 1)
    expected = DENSE * (DENSE.abs() > 3.5) if zeros else DENSE
    assert torch.equal(done(model)[NAME], expected)
    [block] = [event for event in events if event["event"] == "block"]
    assert (block["left_out"], block["unreached"]) == (3, 1)


def test_an_expert_that_an_earlier_round_has_made_stays_so(tmp_path):
    model = server(tmp_path, clients=("a",), rounds=2)
    model.receive("a", weights(2.0, 64), 1)
    model.begin_round(1, {"a": [0]})
    model.receive("a", weights(5.0, None) | {"round": 1}, 1)
    assert torch.equal(done(model)[NAME], KEPT * torch.tensor(2.0))
    assert torch.equal(done(model)["q"], KEPT * torch.tensor(5.0))


def test_consensus_goes_on_without_votes_and_without_values(tmp_path):
    model = server(tmp_path, "consensus", clients=("a", "b"))
    for client in "ab":
        model.receive(client, make_update(0, {0: {"q": pack_mask(KEPT), NAME: Unreached(0)}}), 1)
    agreed = model.store("masks").get(0)[NAME].unpack_mask()
    assert torch.equal(agreed, DENSE.abs() > 3.5)
    assert model.next_exchange()
    for client in "ab":
        values = pack_values(torch.ones(SHAPE), pack_mask(KEPT).bits, torch.float32)
        model.receive(client, make_update(0, {0: {"q": values, NAME: Unreached(0)}}, 1), 1)
    assert torch.equal(done(model)[NAME], DENSE * agreed)


def test_the_model_of_a_client_alone_has_experts_that_it_left_out(tmp_path):
    model = server(tmp_path, clients=("a", "b"), comparisons=["standalone"])
    model.receive("a", weights(1.0, 64), 1)
    model.receive("b", weights(1.0, None), 1)
    own = model.store("standalone/b").get(0)
    assert torch.equal(own[NAME].unpack_weight(), DENSE * (DENSE.abs() > 3.5))


@pytest.mark.parametrize(
    ("name", "unit", "says"),
    [
        ("q", Unreached(3), "the keys shape, mask, values"),
        ("q", replace(pack(DENSE, KEPT, torch.float32), tokens=5), "the keys shape, mask, values"),
        (NAME, Unreached(-1), "`unreached` is a number of tokens from 0"),
        (NAME, Unreached(True), "`unreached` is a number of tokens from 0"),
        (NAME, pack(DENSE, KEPT, torch.float32), "`tokens` is a number of tokens from 1 .* got None"),
        (NAME, replace(pack(DENSE, KEPT, torch.float32), tokens=2**50), "`tokens` is a number of tokens from 1"),
    ],
)
def test_what_is_said_of_tokens_is_checked(tmp_path, name, unit, says):
    with pytest.raises(UpdateError, match=rf"client a, block 0, {name}.*{says}"):
        server(tmp_path).receive("a", make_update(0, {0: {name: unit}}), 1)
