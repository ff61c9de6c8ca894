"""Recovery: rounding that is right in the mean, one step by hand, zeros that stay, and a server that adds up exactly."""

import itertools
import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import log_softmax

from fedspallm_appfl.algorithms import registry
from fedspallm_appfl.algorithms.algorithm import of_round
from fedspallm_appfl.cli import main
from fedspallm_appfl.errors import PruningError, UpdateError
from fedspallm_appfl.models.blockwise import advance, embed, finish
from fedspallm_appfl.models.layout import Layout, Linear
from fedspallm_appfl.models.lazy_model import LazyModel
from fedspallm_appfl.recovery import training
from fedspallm_appfl.recovery.losses import kl
from fedspallm_appfl.recovery.low_rank import Basis
from fedspallm_appfl.recovery.rounding import rounded
from fedspallm_appfl.recovery.steps import fewest_windows, generator, order
from fedspallm_appfl.recovery.trained import largest_change
from fedspallm_appfl.recovery.training import Learner, recovered
from fedspallm_appfl.rounds.hidden.coding import DIGITS, farthest, from_levels, levels
from fedspallm_appfl.rounds.hidden.folds import HiddenDeltas
from fedspallm_appfl.rounds.source import Source
from fedspallm_appfl.settings.schema import Gram, Pruning, Recovery
from fedspallm_appfl.tensors.target import parse_target
from fedspallm_appfl.wire.deltas import PackedDelta, changed_entries, delta_size, packed_nibbles, unpacked_nibbles
from fedspallm_appfl.wire.packed import pack
from fedspallm_appfl.wire.update import check_delta, compress, make_update
from helpers.experiments import DOMAINS
from helpers.families import save_family
from helpers.rounds import client_settings, global_model, server_settings
from helpers.tiny import events, linears, run, save_tiny, tiny_config, weights


def test_levels_of_four_bits_by_hand():
    levels = torch.tensor([-7, 7, 0, 3, -1], dtype=torch.int8)
    packed = packed_nibbles(levels)
    assert packed.tolist() == [1 | 15 << 4, 8 | 11 << 4, 7]
    assert torch.equal(unpacked_nibbles(packed, 5), levels)
    made = PackedDelta(packed, torch.tensor([0.5]).bfloat16())
    assert made.changes(5).tolist() == [-3.5, 3.5, 0, 1.5, -0.5]
    assert made.nbytes == delta_size(5, "int4") == 3 + 2
    assert (delta_size(129, "int4"), delta_size(129, "int8"), delta_size(129, "fp16")) == (69, 133, 262)


@pytest.mark.parametrize(("precision", "levels"), [("int4", 7), ("int8", 127), ("fp16", None)])
def test_rounding_is_right_in_the_mean_and_never_off_by_a_level(precision, levels):
    change = 1e-4 * torch.randn(300, generator=torch.Generator().manual_seed(0))
    change[7], change[200:] = 0.0, 0.0  # the last group is all zeros
    random = torch.Generator().manual_seed(1)
    seen = torch.stack([rounded(change, precision, random).changes(300) for _ in range(400)])
    largest = torch.nn.functional.pad(change, (0, 84)).view(3, 128).abs().amax(1).repeat_interleave(128)[:300]
    step = 1.01 * largest / levels if levels else change.abs() * 2**-7
    assert bool(((seen - change).abs() <= step).all())
    assert bool(((seen.mean(0) - change).abs() <= 5 * step / (2 * 20)).all()) or levels is None
    assert bool((seen[:, 200:] == 0).all())
    one, other = (rounded(change, precision, generator(0, "a")).changes(300) for _ in range(2))
    assert torch.equal(one, other)


def test_every_batch_has_its_turn():
    steps = list(order(5, 4, 3, generator("any")))
    assert [len(one) for one in steps] == [3] * 4
    seen = list(itertools.chain(*steps))
    assert sorted(seen[:5]) == sorted(seen[5:10]) == list(range(5)) and seen[:5] != seen[5:10]


@pytest.mark.parametrize(("windows", "batch", "batches"), [(129, 128, 1), (20, 8, 7), (16, 8, 5), (3, 8, 4), (9, 4, 6)])
def test_what_a_site_counts_is_what_steps_take_at_least(windows, batch, batches):
    sizes = [len(part) for part in torch.arange(windows).split(batch)]
    taken = {sum(sizes[one] for [one] in order(len(sizes), batches, 1, generator(seed))) for seed in range(200)}
    assert fewest_windows(windows, batch, batches) == min(taken)


def test_the_divergence_by_hand():
    logits, dense = torch.randn(2, 1, 3, 5, generator=torch.Generator().manual_seed(0))
    share = dense.softmax(-1)
    by_hand = sum(
        float(p * (p.log() - q)) for p, q in zip(share.flatten(), log_softmax(logits, -1).flatten(), strict=True)
    )
    assert float(kl(logits, torch.zeros(1, 3), dense)) == pytest.approx(by_hand / 3, rel=1e-5)
    assert float(kl(dense, torch.zeros(1, 3), dense)) == 0


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return LazyModel(str(save_tiny(tmp_path_factory.mktemp("model"), torch.float32)))


def halved(model):
    """Every matrix with about half of its entries."""
    made, random = {}, torch.Generator().manual_seed(0)
    for block, linears_of in enumerate(model.layout.blocks):
        dense = {one.name: model.skeleton.dense_weight(block, one) for one in linears_of}
        keep = {name: torch.rand(one.shape, generator=random) < 0.5 for name, one in dense.items()}
        made[block] = {name: pack(one, keep[name], torch.float32) for name, one in dense.items()}
    return made


def learner(model, pruned, **recovery):
    windows = torch.randint(model.vocabulary, (4, 12), generator=torch.Generator().manual_seed(0))
    told = Recovery(**{"rounds": 1, "batch": 4, "delta": "fp16", **recovery})
    settings = client_settings(batch=2, client="a", recovery=told)
    return Learner(model, pruned.get, windows, settings, 0)


def travelled(of):
    """What the server gets: a number for each kept entry, or each entry of a factor."""
    pruned, rank = {block: of.pruned(block) for block in range(3)}, of.settings.recovery.rank
    return {
        (block, name): delta.changes(changed_entries(pruned[block][name].kept, pruned[block][name].shape[0], rank))
        for block, made in recovered(of, {0, 1, 2})
        for name, delta in made.items()
    }


def changes(of):
    """By how much each kept entry changes."""
    found, rank = travelled(of), of.settings.recovery.rank
    for (block, name), factor in found.items() if rank else ():
        packed = of.pruned(block)[name]
        basis = Basis(rank, of.settings.seed, of.turn).of(block, name, packed.shape[1])
        found[block, name] = (factor.view(-1, rank) @ basis)[packed.unpack_mask()]
    return found


@pytest.mark.parametrize("loss", ["kl", "next_token"])
def test_a_step_is_the_sign_of_the_gradient_of_the_whole_model(model, loss):
    """AdamW's first step goes as far as the learning rate; the oracle is the model of transformers with all in memory."""
    import transformers

    pruned, lr = halved(model), 0.01
    whole = transformers.AutoModelForCausalLM.from_pretrained(model.skeleton.folder, dtype=torch.float32)
    of = learner(model, pruned, loss=loss, steps=1, lr=lr)
    with torch.no_grad():
        wanted = whole(of.windows).logits
    parameters = {}
    for block, made in pruned.items():
        for name, packed in made.items():
            parameters[block, name] = whole.get_parameter(f"model.layers.{block}.{name}.weight")
            parameters[block, name].data = packed.unpack_weight()
    out = whole(of.windows, labels=of.windows if loss == "next_token" else None)
    (out.loss if loss == "next_token" else kl(out.logits, of.windows, wanted)).backward()
    found = changes(of)
    assert found.keys() == parameters.keys()
    for (block, name), parameter in parameters.items():
        assert_signs(found[block, name], pruned[block][name], parameter.grad, lr)


def assert_signs(change, packed, gradient, lr):
    """A first step of AdamW, where the gradient is not too small to be sure of its sign."""
    gradient, size = gradient[packed.unpack_mask()], packed.values.square().mean().sqrt()
    sure = gradient.abs() > 0.1 * gradient.abs().mean()
    assert torch.allclose(change[sure], (-lr * size * gradient.sign())[sure], rtol=0.05)
    assert sure.float().mean() > 0.8


def test_everybody_has_the_same_basis_of_signs_and_another_in_each_round():
    basis = Basis(4, 0, 1).of(2, "q", 200)
    assert basis.shape == (4, 200) and set(basis.unique().tolist()) == {-0.5, 0.5}
    assert torch.equal(basis, Basis(4, 0, 1).of(2, "q", 200))
    assert 300 < int((basis > 0).sum()) < 500
    for other in (Basis(4, 1, 1).of(2, "q", 200), Basis(4, 0, 0).of(2, "q", 200), Basis(4, 0, 1).of(1, "q", 200)):
        assert 250 < int((basis != other).sum()) < 550
    packed = pack(torch.tensor([[6.0, 1.0]]), torch.ones(1, 2, dtype=torch.bool), torch.float32)
    assert (largest_change(packed, 4), largest_change(packed, 0)) == (3.0, 6.0)


def test_a_step_of_factors_is_the_sign_of_their_gradient(model):
    """The oracle is the model of transformers, whose matrices are sums: what is kept, and the product under the mask."""
    import transformers

    pruned, lr, rank = halved(model), 0.01, 3
    whole = transformers.AutoModelForCausalLM.from_pretrained(model.skeleton.folder, dtype=torch.float32)
    of = learner(model, pruned, loss="next_token", steps=1, lr=lr, rank=rank)
    factors = {}
    for block, made in pruned.items():
        for name, packed in made.items():
            owner = whole.get_submodule(f"model.layers.{block}.{name}")
            factors[block, name] = factor = torch.zeros(packed.shape[0], rank, requires_grad=True)
            basis, weight = Basis(rank, of.settings.seed, 0).of(block, name, packed.shape[1]), packed.unpack_weight()
            del owner.weight
            owner.weight = weight + (weight != 0) * (factor @ basis)
    whole(of.windows, labels=of.windows).loss.backward()
    found = travelled(of)
    assert found.keys() == factors.keys()
    for (block, name), factor in factors.items():
        gradient, size = factor.grad.flatten(), pruned[block][name].values.square().mean().sqrt()
        sure = gradient.abs() > 0.1 * gradient.abs().mean()
        assert torch.allclose(found[block, name][sure], (-lr * size * gradient.sign())[sure], rtol=0.05)
        assert sure.float().mean() > 0.8


def test_a_block_is_fitted_to_the_dense_one_behind_blocks_that_were_fitted(model):
    """The oracle is the model of transformers, with the first block as it was after its step."""
    import transformers

    pruned, lr = halved(model), 0.05
    whole = transformers.AutoModelForCausalLM.from_pretrained(model.skeleton.folder, dtype=torch.float32)
    of = learner(model, pruned, scope="blockwise", steps=1)
    found = changes(of)
    with torch.no_grad():
        wanted = whole(of.windows, output_hidden_states=True).hidden_states[2]
    for name, packed in pruned[0].items():
        fitted = replace(packed, values=packed.values + found[0, name])
        whole.get_parameter(f"model.layers.0.{name}.weight").data = fitted.unpack_weight()
    for name, packed in pruned[1].items():
        whole.get_parameter(f"model.layers.1.{name}.weight").data = packed.unpack_weight()
    made = whole(of.windows, output_hidden_states=True).hidden_states[2]
    errors = [
        (one - other).square().sum() / other.square().sum()
        for one, other in zip(made.split(2), wanted.split(2), strict=True)
    ]
    sum(errors).backward()
    for name, packed in pruned[1].items():
        assert_signs(found[1, name], packed, whole.get_parameter(f"model.layers.1.{name}.weight").grad, lr)


def end_of(model, windows, matrices):
    """The logits of the model with these matrices."""
    state = embed(model, windows, 4)
    for index in range(3):
        with model.block(index, matrices.get(index)) as module:
            advance(module, index, state)
    return next(finish(model, windows, state, 4))[1]


@pytest.mark.parametrize(("scope", "rank"), [("all", 0), ("blockwise", 0), ("all", 8)])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])  # linears, transposed ones, experts in one tensor
def test_the_model_comes_nearer_to_the_dense_one(tmp_path, family, scope, rank):
    """And the dense model that other clients use is as it was."""
    model = LazyModel(str(save_family(family, tmp_path)))
    pruned = halved(model)
    of = learner(model, pruned, scope=scope, rank=rank, steps=12, lr=0.03)
    before = [end_of(model, of.windows, matrices) for matrices in ({}, pruned)]
    found = changes(of)
    after = {
        block: {name: replace(one, values=one.values + found[block, name]) for name, one in made.items()}
        for block, made in pruned.items()
    }
    dense, recovered_end = (end_of(model, of.windows, matrices) for matrices in ({}, after))
    assert torch.equal(dense, before[0])
    assert kl(recovered_end, of.windows, dense) < (0.97 if rank else 0.9) * kl(before[1], of.windows, dense)


def test_a_loss_that_is_not_finite_names_the_client(model):
    with pytest.raises(
        PruningError, match="client a, round 1 of recovery: the loss of recovery is .*; lower recovery.lr"
    ):
        changes(learner(model, halved(model), steps=30, lr=1e30))


def test_rounding_to_the_arithmetic_is_no_change(tmp_path):
    model = LazyModel(str(save_family("llama", tmp_path, torch.float32)), None, "bfloat16")
    pruned = halved(model)[0]
    with model.block(0, pruned) as module:
        trained = learner(model, {0: pruned}).trained(0, module)
        made = [change for one in trained for _, change in one.changes(pruned)]
    assert made and not any(change.any() for change in made)


@pytest.mark.parametrize(("precision", "rank"), [("int4", 0), ("int8", 0), ("fp16", 0), ("int4", 4)])
def test_no_client_asks_for_more_than_the_server_takes(model, precision, rank):
    """However far its steps went."""
    pruned = halved(model)
    of = learner(model, pruned, steps=20, lr=1.0, delta=precision, rank=rank)
    clipped = 0
    for block, made in recovered(of, {0, 1, 2}):
        for name, delta in made.items():
            packed = pruned[block][name]
            count = changed_entries(packed.kept, packed.shape[0], rank)
            largest = float(packed.values.abs().max()) / (rank**0.5 or 1)
            check_delta(delta.to_dict(), "here", count, precision, largest)
            clipped += int((delta.changes(count).abs() > 0.8 * largest).sum())
    assert clipped


@pytest.mark.parametrize("scope", ["all", "blockwise"])
def test_a_server_that_sends_no_weights_is_refused(model, scope):
    whole = halved(model)
    without_values = {**whole[1], "mlp.up_proj": replace(whole[1]["mlp.up_proj"], values=None)}
    for sent in ({0: whole[0]}, whole | {1: without_values}):
        with pytest.raises(UpdateError, match=r"client a, round 1 of recovery, block 1, .*has not sent its"):
            list(recovered(learner(model, sent, scope=scope, steps=1), {0, 1}))


LAYOUT = Layout("layers", ((Linear("q", (4, 6), False, expert=True),),))
WEIGHT = torch.arange(24).view(4, 6) / 8 - 1.0
KEEP = torch.arange(24).view(4, 6) % 2 == 0


def server(folder, weights="equal", rank=0):
    told = server_settings(
        Pruning("wanda", parse_target(0.5)), recovery=Recovery(rounds=1, delta="int8", rank=rank), weights=weights
    )
    made = global_model(LAYOUT, torch.float16, told, folder, lambda block, name: WEIGHT.half())
    made.begin_round(0, {client: [0] for client in "abc"})
    for client in "abc":
        made.receive(client, make_update(0, {0: {"q": replace(pack(WEIGHT, KEEP, torch.float16), tokens=5)}}), 1)
    assert [piece.units for piece in made.changes(10**6)] == [[(0, "q")]]  # all need the weights
    assert made.next_exchange() and made.exchange.recovers
    return made


def delta(*levels, scale=1 / 64):
    return PackedDelta(
        torch.tensor([*levels, *[0] * (12 - len(levels))], dtype=torch.int8), torch.tensor([scale]).bfloat16()
    )


@pytest.mark.parametrize("turn", list(itertools.permutations("abc")))
def test_the_mean_of_changes_is_made_as_long_as_they_are_exactly_and_in_any_order(tmp_path, turn):
    sent, samples = {"a": delta(64, 1), "b": delta(-32, 1), "c": delta(0, 2, 60)}, {"a": 3, "b": 1, "c": 8}
    made = server(tmp_path, "sample_size")
    for client in turn:
        update = make_update(0, {0: {"q": sent[client]}}, 1)
        made.receive(client, compress(update) if client == "a" else update, samples[client])
    [packed] = made.done.get(0).values()
    assert torch.equal(packed.unpack_mask(), KEEP)
    before, mean = WEIGHT[KEEP].half(), torch.zeros(12)
    mean[:3] = torch.tensor([(3 * 64 - 32) / 12, (3 + 1 + 16) / 12, 8 * 60 / 12]) / 64
    step = 91 / 64  # lengths in units of 1 / 64: 64.01, 32.02 and 60.03 of the clients, 42.20 of the mean
    assert step == pytest.approx(60.03 / 42.20, abs=1 / 128)
    assert torch.equal(packed.values, (before.float() + step * mean).half())
    assert not made.next_exchange() and made.round.changed == {0}


def test_the_mean_of_factors_is_multiplied_once(tmp_path):
    """The same as the mean of the products, along which the server goes as far as factors are long."""
    made, rank, scale = server(tmp_path, rank=2), 2, 1 / 64
    levels = torch.randint(-5, 25, (3, 4, rank), generator=torch.Generator().manual_seed(0))
    for client, mine in zip("abc", levels, strict=True):
        sent = PackedDelta(mine.flatten().to(torch.int8), torch.tensor([scale]).bfloat16())
        made.receive(client, make_update(0, {0: {"q": sent}}, 1), 1)
    [packed] = made.done.get(0).values()
    factors, basis = levels.double() * scale, Basis(rank, made.settings.seed, 0).of(0, "q", 6).double()
    change = torch.stack([factor @ basis for factor in factors]).mean(0)
    lengths = sorted(float(factor.norm()) for factor in factors)
    step = round(64 * lengths[1] / float(factors.mean(0).norm())) / 64
    assert 1 < step < 3**0.5
    assert torch.equal(packed.unpack_mask(), KEEP)
    assert torch.equal(packed.values, (WEIGHT[KEEP].double() + step * change[KEEP]).float().half())


@pytest.mark.parametrize("rank", [0, 2])
def test_a_hidden_sum_of_changes_is_their_mean_made_as_long_as_they_are(tmp_path, rank):
    """Three clients, whose words are added as they are; lengths in the mean of squares, exact but for rounding."""
    made = server(tmp_path, rank=rank)
    fold, clients = HiddenDeltas(made.context, replace(made.exchange, hidden=3)), 3
    count = 8 if rank else 12
    sent = 0.04 * torch.randn(clients, count, generator=torch.Generator().manual_seed(0)) + 0.02
    most = farthest(pack(WEIGHT, KEEP, torch.float16), Recovery(rounds=1))
    coding = fold._coding(0, "q")
    assert (coding.count, coding.bits) == (count + DIGITS, 15)
    words = sum(coding.pack(levels(one, most, count, generator("any"))) for one in sent)
    stores, _ = fold.made(0, "q", words, clients)
    mean, length = sent.double().mean(0), float(sent.double().square().sum(1).mean().sqrt())
    step = round(64 * length / float(mean.norm())) / 64
    change = mean
    if rank:
        change = (mean.view(4, rank) @ Basis(rank, made.settings.seed, 0).of(0, "q", 6).double())[KEEP]
    assert 1 < step < 3**0.5
    [values] = [packed.values.double() for packed in stores["global"].values()]
    assert torch.allclose(values, WEIGHT[KEEP].double() + step * change, atol=1.5e-3)


def test_levels_and_squares_by_hand():
    most, random = 4095.0, generator("any")
    numbers = levels(torch.tensor([2048.0, -4095.0, 0.0, 5000.0]), most, 5, random)
    assert numbers[:5].tolist() == [2048, -4095, 0, 4095, 0]  # what is beyond the largest is cut off
    assert sum(digit * 4096**place for place, digit in enumerate(numbers[5:].tolist())) == 2048**2 + 2 * 4095**2
    mean, square = from_levels(2 * numbers, most, 2)
    assert mean[1] == -4095.0 and square == 2048**2 + 2 * 4095**2
    quarters = torch.stack([levels(torch.tensor([2.25, -2.25]), most, 2, random)[:2] for _ in range(400)]).double()
    assert torch.allclose(quarters.mean(0), torch.tensor([2.25, -2.25]).double(), atol=0.1)
    assert from_levels(levels(torch.zeros(2), 0.0, 2, random), 0.0, 1)[1] == 0.0


def test_one_large_weight_hides_no_change():
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    weight[3, 4] = 300.0
    most = farthest(pack(weight, torch.ones_like(weight, dtype=torch.bool), torch.float32), Recovery(rounds=1))
    change = 0.002 * torch.randn(1000, generator=torch.Generator().manual_seed(1))
    [mean, _] = from_levels(levels(change, most, 1000, generator("any")), most, 1)
    assert float((mean - change).norm() / change.norm()) < 0.05


@pytest.mark.parametrize("rank", [0, 2])
def test_weights_that_are_not_finite_afterwards_are_not_sent(model, monkeypatch, rank):
    def breaks(trained, *args):
        trained[0].values.data[0] = float("nan")

    monkeypatch.setattr(training, "train", breaks)
    with pytest.raises(PruningError, match="client a, round 1 of recovery, block 0, .*: weights are not finite after"):
        changes(learner(model, halved(model), rank=rank))


def test_changes_of_nothing_and_a_client_that_is_given_up_amid_recovery(tmp_path):
    made = server(tmp_path)
    for client in "ab":
        made.receive(client, make_update(0, {0: {"q": delta(8 * (client == "a"), scale=1 / 8)}}, 1), 1)
    made.give_up("c")
    [packed] = made.done.get(0).values()
    change = torch.zeros(12)
    change[0] = 0.5  # the mean; one of two clients changed nothing, so that the median is as long
    assert torch.equal(packed.values, (WEIGHT[KEEP] + change).half())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"levels": torch.zeros(11, dtype=torch.int8)}, r"levels must be 12 entries of torch.int8"),
        ({"levels": torch.zeros(12)}, r"levels must be 12 entries of torch.int8"),
        ({"scale": torch.tensor([float("nan")]).bfloat16()}, "a scale is finite"),
        ({"scale": torch.tensor([float("inf")]).bfloat16()}, "a scale is finite"),
        (
            {"scale": torch.tensor([1.0]).bfloat16()},
            "weights change by 7, and the largest of the matrix is 1.75: no honest",
        ),
        ({"scale": torch.tensor([-0.01]).bfloat16()}, "a scale is not negative"),
        ({"mask": torch.zeros(3)}, "a change has the keys levels, scale"),
    ],
)
def test_what_is_no_change_is_refused(tmp_path, change, why):
    made = server(tmp_path)
    update = make_update(0, {0: {"q": delta(7, -7)}}, 1)
    update["blocks"]["0"]["q"] |= change
    with pytest.raises(UpdateError, match=f"client b, block 0, q: {why}"):
        made.receive("b", update, 1)


def test_masks_are_those_of_pruning_and_all_clients_recover_all_blocks(tmp_path):
    """Clients prune some blocks of each round only, in float16; what was predicted is what travels."""
    from fedspallm_appfl.estimates import over_globus, traffic
    from fedspallm_appfl.estimates.job import Job
    from fedspallm_appfl.settings.reading import load_config

    shares = [f"clients.{client}.train_configs.resource_share=0.4" for client in (0, 1, 2)]
    shares.append("model.dtype=auto")  # float16 is too narrow for gradients
    recovery = {"rounds": 2, "steps": 2, "batch": 4}
    file = tiny_config(
        tmp_path,
        save_tiny(tmp_path / "model"),
        "fedspallm",
        server_configs={"num_global_epochs": 2},
        recovery=recovery,
    )
    job = Job.of(load_config(file, shares)[0])
    plain = linears(weights(run(file, *shares, "recovery.rounds=0", "recovery.steps=16", "recovery.batch=8")))
    (tmp_path / "run").rename(tmp_path / "pruned")
    folder = run(file, *shares)
    after = linears(weights(folder))
    for name, tensor in plain.items():
        assert torch.equal(tensor != 0, after[name] != 0)
        assert not torch.equal(tensor, after[name]) or bool((tensor != 0).all())  # dense where nobody pruned
    began = [(event["turn"], event["clients"]) for event in events(folder, "training")]
    assert began == [(turn, list(DOMAINS[:3])) for turn in (0, 1)]
    uploads = events(folder, "upload")
    for number, one in enumerate(traffic.traffic(job)):
        sent = {c: sum(e["bytes"] for e in uploads if (e["round"], e["client"]) == (number, c)) for c in one.up}
        assert sent == one.up
        assert events(folder, "round")[number]["bytes_down"] == one.down
    [down] = {event["bytes_down"] for event in events(folder, "measured")}
    assert down == traffic.final(job)
    assert [turn.round for turn in over_globus.turns(job)] == [0, 1, 1, 1]
    last = [sum(e["bytes"] for e in uploads if e["exchange"] == 2 and e["client"] == c) for c in one.up]
    assert list(over_globus.turns(job)[-1].up.values()) == last
    healed = [
        "recover",
        str(folder.parent / "pruned"),
        str(file),
        "server_configs.num_global_epochs=1",
        "model.dtype=auto",
    ]
    assert main([*healed, "recovery.rounds=2", f"run_dir={tmp_path / 'healed'}"]) == 0  # the same from its folder
    again = linears(weights(tmp_path / "healed"))
    assert all(torch.equal(again[name], tensor) for name, tensor in after.items())
    [one] = traffic.traffic(Job.of(load_config(tmp_path / "healed" / "config.yaml")[0]))
    assert sum(one.up.values()) == sum(event["bytes"] for event in events(tmp_path / "healed", "upload"))
    assert one.down == events(tmp_path / "healed", "round")[0]["bytes_down"]
    assert "# 3 clients, 1 round, recovery of" in (tmp_path / "healed" / "report.md").read_text("utf-8")
    report = (folder / "report.md").read_text("utf-8")
    assert "Recovery: 2 rounds of 2 steps of 4 windows, loss kl. Clients sent" in report
    assert "were fitted to text" in (folder / "model" / "README.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"model.norm.weight": 2.0}, "model.norm.weight differs from that of .*, and only matrices that take part"),
        ({}, "has no zeros beyond those of"),
    ],
)
def test_what_was_not_made_of_the_dense_model_is_refused(tmp_path, capsys, change, why):
    model = save_tiny(tmp_path / "model")
    shutil.copytree(model, tmp_path / "other")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][:4] *= 0 if change else 1
    save_file(
        tensors | {n: v + tensors[n] for n, v in change.items()},
        tmp_path / "other" / "model.safetensors",
        {"format": "pt"},
    )
    file = tiny_config(tmp_path, model, "fedspallm", recovery={"steps": 1, "batch": 4})
    assert main(["recover", str(tmp_path / "other"), str(file)]) == 2
    assert re.search(why, capsys.readouterr().err)


def test_what_does_not_go_with_recovery_is_said_before(tmp_path, capsys):
    file, found = tiny_config(tmp_path, save_tiny(tmp_path / "model"), "fedspallm"), []
    for words in (
        ["recovery.steps=3"],
        ["recovery.rounds=1", "algorithm=standalone", "client_configs.data.batch=1"],
        ["recovery.rounds=1", "recovery.batch=2"],
        ["recovery.rounds=1", "recovery.scope=blockwise", "recovery.loss=next_token"],
        ["recovery.model=runs", "recovery.rounds=1", "server_configs.num_global_epochs=2"],
    ):
        assert main(["validate", str(file), *words]) == 2
        found.append(capsys.readouterr().err)
    for said, why in zip(
        found,
        (
            "recovery: its keys are without effect while recovery.rounds is 0",
            "recovery.rounds: with standalone there is nobody to average changes with",
            "recovery.batch: at least the data.batch of every client, got 2 and 4 of clients.0",
            "recovery.loss: blocks are fitted to the dense block's output; leave it at kl",
            "server_configs.num_global_epochs: nothing is pruned with recovery.model",
        ),
        strict=True,
    ):
        assert why in said
    for weights_of in ("equal", "sample_size"):  # gram averages nothing but in recovery
        given = ["algorithm=gram", f"server_configs.aggregator_kwargs.weights={weights_of}"]
        assert main(["validate", str(file), *given, "recovery.rounds=1"]) == 0


def test_what_was_pruned_outlives_a_recovery_that_fails(tmp_path, capsys, monkeypatch):
    """Its model is that of the run without recovery; sums are where `fedspallm prune` looks for them."""
    shape = {"rounds": 1, "steps": 1, "batch": 4}
    file = tiny_config(tmp_path, save_tiny(tmp_path / "model"), "gram", count=2)
    plain = linears(weights(run(file, "run_dir=" + str(tmp_path / "run"))))
    shutil.rmtree(tmp_path / "run")

    def fails(*args):
        raise PruningError("client a: the loss is nan")

    monkeypatch.setattr("fedspallm_appfl.recovery.training.train", fails)
    assert main(["run", str(file), *(f"recovery.{key}={value}" for key, value in shape.items())]) == 2
    error = capsys.readouterr().err
    assert "the loss is nan. The model as it was pruned is in" in error and "fedspallm recover" in error
    monkeypatch.undo()
    kept = linears(weights(tmp_path / "run"))
    assert all(torch.equal(kept[name], tensor) for name, tensor in plain.items())
    assert main(["prune", str(tmp_path / "run"), "--sparsity", "0.7"]) == 0
    healed = ["recover", str(tmp_path / "run"), str(file), f"run_dir={tmp_path / 'healed'}"]
    assert main([*healed, "recovery.steps=1", "recovery.batch=4"]) == 0


@pytest.mark.parametrize(("dtype", "wide"), [("auto", True), ("bfloat16", False), ("float32", False)])
def test_gradients_are_computed_in_float32_where_the_model_is_in_float16(tmp_path, dtype, wide):
    """The range of float16 ends where gradients of large models lie."""
    narrow = LazyModel(str(save_tiny(tmp_path)), dtype=dtype)
    of = Source(narrow, torch.zeros(1, 2), client_settings(), in_float32=lambda: "in float32")
    assert (of.trainable() == "in float32") == wide


def test_clients_are_sent_the_pruned_model_and_recovery_follows_the_last_round():
    made = registry.find("gram").exchanges((), Gram(), Recovery(rounds=2))
    assert [(one.up, one.down) for one in made] == [("grams", "weights"), ("deltas", "weights"), ("deltas", "weights")]
    assert of_round(made, last=False) == made[:1] and of_round(made, last=True) == made


def pruned_elsewhere(model, folder, matrices):
    """A model folder in which other hands have made some share of these matrices zero."""
    shutil.copytree(model, folder)
    tensors = load_file(model / "model.safetensors")
    for name, share in matrices.items():
        flat = tensors[name].view(-1)
        flat[: int(share * len(flat))] = 0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("rank", [0, 3])
def test_matrices_that_nobody_pruned_stay_as_they_are(tmp_path, capsys, rank):
    """Whatever block they are in; rounds are those of the file, and a path may look like YAML."""
    from fedspallm_appfl.estimates import traffic
    from fedspallm_appfl.estimates.job import Job
    from fedspallm_appfl.settings.reading import load_config

    model = save_tiny(tmp_path / "model")
    block = "model.layers.{}.{}.weight".format
    asked = {block(0, "mlp.up_proj"): 0.7, block(0, "mlp.down_proj"): 0.5, block(2, "self_attn.q_proj"): 0.6}
    folder = pruned_elsewhere(model, tmp_path / "~other: {1} #2", asked | {block(1, "mlp.up_proj"): 0.005})
    tensors = load_file(folder / "model.safetensors")
    tensors[block(1, "mlp.up_proj")] = load_file(model / "model.safetensors")[block(1, "mlp.up_proj")]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    file = tiny_config(tmp_path, model, "gram", count=2, recovery={"rounds": 2, "steps": 2, "batch": 4, "rank": rank})
    assert main(["recover", str(folder), str(file)]) == 0
    [predicted] = traffic.traffic(Job.of(load_config(tmp_path / "run" / "config.yaml")[0]))
    sent = [event["bytes"] for event in events(tmp_path / "run", "upload")]
    assert sum(predicted.up.values()) == sum(sent)
    said = re.search(r"stay: sparsity ([0-9.]+), ", capsys.readouterr().out)
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "run" / "model"))
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == set(asked)
    zeros = sum(int((before[name] == 0).sum()) for name in asked)
    entries = sum(before[name].numel() for name in asked)
    assert float(said[1]) == pytest.approx(zeros / entries, abs=1 / entries)  # of all together, as no two are alike
    assert all(torch.equal(before[name] == 0, after[name] == 0) for name in before)
    assert {event["exchange"] for event in events(tmp_path / "run", "upload") if event["bytes"]} == {1, 2}
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text("utf-8"))
    assert {one["name"]: float(one["target"]) for one in manifest["matrices"]} == asked
    report = (tmp_path / "run" / "report.md").read_text("utf-8")
    assert "before expansion" not in report and "No client sent" not in report and "`prune.ignore`" in report
    card = (tmp_path / "run" / "model" / "README.md").read_text("utf-8")
    assert "pruned before, then recovered with" in card and str(tmp_path) not in card


def test_who_pruned_a_model_stays_known(tmp_path, capsys):
    """Targets of its matrices too, whatever the configuration says, and then that is said."""
    model = save_tiny(tmp_path / "model")
    file = tiny_config(tmp_path, model, "fedspallm", count=2)
    targets = "client_configs.train_configs.sparsity={default: 0.6, down_proj: '2:4'}"
    folder = run(file, "client_configs.train_configs.pruner=wanda", targets)
    healed = ["recover", str(folder), str(file), f"run_dir={tmp_path / 'healed'}", "algorithm=gram"]
    assert main([*healed, "recovery.steps=1", "recovery.batch=4"]) == 0
    assert f"the zeros of {folder} stay: sparsity 0.6, " in (out := capsys.readouterr().out)
    assert "; 0.5, of the configuration, is not used" in out
    made, again = (json.loads((f / "manifest.json").read_text("utf-8")) for f in (folder, tmp_path / "healed"))
    for key in ("algorithm", "pruner", "target", "allocation"):
        assert again[key] == made[key]
    assert [one["target"] for one in again["matrices"]] == [one["target"] for one in made["matrices"]]
    card = (tmp_path / "healed" / "model" / "README.md").read_text("utf-8")
    assert "pruned by FedSpaLLM with wanda, then recovered" in card
