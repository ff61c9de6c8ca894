"""The streaming scheduler: nobody waits for ever, whoever is slow; open blocks stay few; an error reaches everybody."""

import functools
import random
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from fedspallm_appfl.adaptors.registration import register
from fedspallm_appfl.aggregation.layer_sampling import from_text
from fedspallm_appfl.errors import UpdateError
from fedspallm_appfl.tensors.target import parse_target
from fedspallm_appfl.wire.messages import plan
from fedspallm_appfl.wire.packed import pack, packed_size
from fedspallm_appfl.wire.update import make_update
from helpers.families import save_family

SHARES = {"a": 1.0, "b": 0.67, "c": 1.0, "d": 0.34, "e": 1.0}
TARGET = parse_target(0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    register()
    return save_family("llama", tmp_path_factory.mktemp("model"))


def make_scheduler(folder, state, open_blocks, rounds=2):
    from fedspallm_appfl.adaptors.aggregator import FedSpaLLMAggregator
    from fedspallm_appfl.adaptors.scheduler import FedSpaLLMScheduler

    settings = {
        "model": {"path": str(folder), "blocks": None},
        "sparsity": "0.5",
        "layer_sampling": "balanced",
        "seed": 3,
        "rounds": rounds,
        "roster": SHARES,
        "screening": "off",
        "weights": "equal",
        "fold": "latest",
        "expansion": "matrix",
        "comparisons": [],
        "device": "cpu",
        "max_message_bytes": 10**6,
        "state_dir": str(state),
    }
    aggregator = FedSpaLLMAggregator(None, OmegaConf.create(settings), None)
    return FedSpaLLMScheduler(OmegaConf.create({"max_open_blocks": open_blocks}), aggregator, None)


def messages_of(layout, limit):
    sizes = {
        block: {
            name: packed_size(shape, TARGET.zeros(shape[0] * shape[1]), torch.float32) for name, shape in shapes.items()
        }
        for block, shapes in enumerate(map(layout.shapes, range(len(layout.blocks))))
    }
    return plan(sizes, 1, limit)


@functools.cache
def packed(shape):
    mask = torch.arange(shape[0] * shape[1]).view(shape) % 2 == 0
    return pack(torch.ones(shape), mask, torch.float32)


def upload(layout, units, assigned, round_index):
    blocks = {}
    for block, name in units:
        if block in assigned:
            blocks.setdefault(block, {})[name] = packed(tuple(layout.shapes(block)[name]))
    return make_update(round_index, blocks) if blocks else {}


@pytest.mark.parametrize("limit", [10**6, 6000], ids=["whole blocks", "split blocks"])
@pytest.mark.parametrize("open_blocks", [1, 2])
@pytest.mark.parametrize("ranks", [("a", "b", "c", "d", "e"), ("ab", "cde"), ("abc", "d", "e")], ids=str)
def test_whoever_is_slow_all_come_to_the_end(folder, tmp_path, ranks, open_blocks, limit):
    """Ranks send when the scheduler has answered all their clients, in an order in which some are far behind."""
    for seed in range(6):
        generator = random.Random(seed)
        scheduler = make_scheduler(folder, tmp_path / str(seed), open_blocks)
        layout = scheduler.aggregator.skeleton.layout
        messages = messages_of(layout, limit)
        speed = {rank: generator.choice([1, 5, 50]) for rank in ranks}
        sent, futures = dict.fromkeys(ranks, 0), {rank: [] for rank in ranks}
        while any(count < 2 * len(messages) for count in sent.values()):
            free = [r for r in ranks if sent[r] < 2 * len(messages) and all(f.done() for f in futures[r])]
            assert free, f"all wait: {sent}"
            rank = generator.choices(free, [speed[r] for r in free])[0]
            round_index, number = divmod(sent[rank], len(messages))
            futures[rank] = []
            for client in rank:
                assigned = from_text(scheduler.aggregator.instructions([client])["assign"][client])
                update = upload(layout, messages[number], assigned, round_index)
                facts = {"_chunk_idx": number, "_total_chunks": len(messages), "samples": 1, "seconds": 0.0}
                futures[rank].append(scheduler.schedule(client, update, **facts))
            sent[rank] += 1
            assert len(scheduler.aggregator.global_model.open_blocks()) <= open_blocks + len(ranks)
        assert scheduler.get_num_global_epochs() == 2
        assert all(future.done() for waiting in futures.values() for future in waiting)


def test_an_error_reaches_every_client_that_waits(folder, tmp_path):
    scheduler = make_scheduler(folder, tmp_path, 1)
    facts = {"_chunk_idx": 0, "_total_chunks": 1, "samples": 1, "seconds": 0.0}
    layout = scheduler.aggregator.skeleton.layout
    units = [(block, linear.name) for block, linears in enumerate(layout.blocks) for linear in linears]
    waiting = scheduler.schedule("a", upload(layout, units, {0, 1, 2}, 0), **facts)
    assert not waiting.done()
    with pytest.raises(UpdateError, match="client c ended round 0 without block 0"):
        scheduler.schedule("c", {}, **facts)
    assert isinstance(waiting.exception(timeout=1), UpdateError)


class Rounds:
    """An aggregator that counts who has ended or was given up, and nothing else."""

    def __init__(self, roster):
        self.settings = SimpleNamespace(roster=roster)
        self.global_model = SimpleNamespace(open_blocks=set, owes=lambda client, block: False)
        self.round, self.ended, self.absent, self.events = 0, set(), set(), []
        self.on_event = self.events.append

    def receive(self, client, update, metadata):
        self.ended.add(client)
        return True

    def give_up(self, client):
        self.absent.add(client)

    def given_up(self):
        return self.absent

    def all_ended(self):
        return len(self.ended) + len(self.absent) == len(self.settings.roster)

    def end_exchange(self):
        self.round, self.ended, self.absent = self.round + 1, set(), set()
        return {}

    def instructions(self, clients):
        return {"round": self.round}


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_no_exchange_ends_before_those_who_are_left_out_wait_for_its_end(folder, order):
    """Or the second of two clients of one process is taken for one that fails in the next round, which waits for it."""
    from fedspallm_appfl.adaptors.scheduler import FedSpaLLMScheduler

    scheduler = FedSpaLLMScheduler(OmegaConf.create({}), Rounds("abcd"), None)
    scheduler.spare_others = scheduler.all_attend = True
    assert scheduler.leave_out("b", {"why": ""}, waits=False).result()[1] == {"left_out": True}
    others = [scheduler.schedule(client, {}) for client in "cd"]
    first, second = (scheduler.leave_out(client, {"why": ""}, waits=True) for client in order)
    futures = [*others, first, second]
    assert [future.result(0)[1] for future in futures] == [{"round": 1}] * 4
    absent = [(event["round"], event["client"]) for event in scheduler.aggregator.events]
    assert absent == [(0, "b"), (0, "a")]
