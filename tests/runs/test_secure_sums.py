"""Runs whose server sees sums alone: bits with masks and without, clients that fall out, and what is refused."""

import copy
import errno
import fcntl
import os
import re
import stat
from contextlib import suppress
from unittest import mock

import pytest
import torch
import yaml

from fedspallm_appfl import validate
from fedspallm_appfl.api import prepared
from fedspallm_appfl.cli import main
from fedspallm_appfl.cli.checked import well_formed
from fedspallm_appfl.errors import ConfigError, FederationError, FedSpaLLMError, ModelError, SecureSumError
from fedspallm_appfl.rounds.client import LocalClient
from fedspallm_appfl.rounds.hidden import folds, places, sweeps
from fedspallm_appfl.rounds.hidden.client import Hiding
from fedspallm_appfl.rounds.hidden.kept import Kept
from fedspallm_appfl.rounds.hidden.server import Sums
from fedspallm_appfl.runs import experiment, further_models, serial
from fedspallm_appfl.secure import client as secure_client
from fedspallm_appfl.secure import server as secure_server
from fedspallm_appfl.secure.identity import Identity, Roster
from fedspallm_appfl.wire.hidden import PackedWords
from helpers.experiments import DOMAINS
from helpers.tiny import BLOCKS, events, save_tiny, tiny_config, weights

SECURE = {"server_configs": {"secure_sums": True}}


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def run(folder, model, algorithm, clients=3, **changes):
    file = tiny_config(folder, model, algorithm, clients, **changes)
    experiment.conduct(prepared(well_formed(str(file), []), False), serial.run, False)
    return weights(folder / "run"), events(folder / "run", "absent")


RECOVERY = {"rounds": 2, "steps": 2, "batch": 4}
BY_SIZE = {"aggregator_kwargs": {"weights": "sample_size"}}


@pytest.mark.parametrize(("algorithm", "rank"), [("fedprllm", None), ("consensus", 0), ("gram", 2)])
def test_the_bits_do_not_depend_on_masks(tmp_path, tiny_model, algorithm, rank):
    after = {} if rank is None else {"recovery": {**RECOVERY, "rank": rank}}
    masked, _ = run(tmp_path / "masked", tiny_model, algorithm, **SECURE, **after)
    nothing = mock.Mock()
    with (
        mock.patch.object(secure_client, "add_streams", nothing),
        mock.patch.object(secure_server, "add_streams", nothing),
    ):
        bare, _ = run(tmp_path / "bare", tiny_model, algorithm, **SECURE, **after)
    assert nothing.called
    assert masked.keys() == bare.keys()
    assert all(torch.equal(masked[name], bare[name]) for name in bare)


def test_votes_are_exact(tmp_path, tiny_model):
    hidden, _ = run(tmp_path / "hidden", tiny_model, "fedprllm", **SECURE)
    seen, _ = run(tmp_path / "seen", tiny_model, "fedprllm")
    assert all(torch.equal(hidden[name], seen[name]) for name in seen)


@pytest.mark.parametrize("algorithm", ["consensus", "gram"])
def test_fixed_points_are_fine_enough(tmp_path, tiny_model, algorithm):
    fine = {"gram": {"precision": "fp32"}} if algorithm == "gram" else {}
    hidden, _ = run(tmp_path / "hidden", tiny_model, algorithm, **SECURE)
    seen, _ = run(tmp_path / "seen", tiny_model, algorithm, **fine)
    for name, weight in seen.items():
        assert float(((hidden[name] == 0) != (weight == 0)).float().mean()) < 0.02
        assert torch.allclose(hidden[name].float().norm(), weight.float().norm(), rtol=0.01)


@pytest.mark.parametrize("rank", [0, 4])
def test_changes_of_recovery_are_those_of_a_run_that_sees_them(tmp_path, tiny_model, rank):
    """Votes are exact, so that all begin with the same model; lengths are those of the mean square and of the median."""
    after = {"recovery": {"rounds": 1, "steps": 8, "batch": 4, "rank": rank, "delta": "fp16"}}
    before, _ = run(tmp_path / "before", tiny_model, "fedprllm")
    seen, _ = run(tmp_path / "seen", tiny_model, "fedprllm", **after)
    after["recovery"].pop("delta")
    hidden, _ = run(tmp_path / "hidden", tiny_model, "fedprllm", **SECURE, **after)
    compared = 0
    for name, weight in before.items():
        one, other = ((made[name].float() - weight.float()).flatten() for made in (seen, hidden))
        if one.any():
            compared += 1
            assert float(one @ other / (one.norm() * other.norm())) > 0.9
            assert 0.7 < float(other.norm() / one.norm()) < 1.4
    assert compared


STAGES = {  # where a client fails
    "keys": (Hiding, "_advertise"),
    "shares": (Hiding, "_share"),
    "words": (Hiding, "mask"),
    "opening": (Hiding, "_open"),
    "changes": (Hiding, "mask"),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("algorithm", ["consensus", "gram"])
def test_a_client_that_falls_out_is_taken_out_of_the_sums(tmp_path, tiny_model, algorithm, stage):
    place, name = STAGES[stage]
    before = getattr(place, name)

    def fails(self, *args):
        late = stage != "changes" or self._exchange == max(place[0] for place in self._numbers)
        if self._name == "sqldocs" and late:
            raise RuntimeError("gone")
        return before(self, *args)

    changes = {"server_configs": {"secure_sums": True, "min_clients": 3}}
    changes |= {"recovery": {"rounds": 1, "steps": 2, "batch": 4}} if stage == "changes" else {}
    with mock.patch.object(place, name, fails):
        left, log = run(tmp_path / "left", tiny_model, algorithm, 4, **changes)
    assert [event["client"] for event in log] == ["sqldocs"]
    if stage == "opening":  # its squares or its votes are in
        return
    nothing = mock.Mock()
    with (
        mock.patch.object(place, name, fails),
        mock.patch.object(secure_client, "add_streams", nothing),
        mock.patch.object(secure_server, "add_streams", nothing),
    ):
        bare, _ = run(tmp_path / "bare", tiny_model, algorithm, 4, **changes)
    assert all(torch.equal(left[one], bare[one]) for one in bare)


def test_too_few_clients_end_the_run(tmp_path, tiny_model):
    def fails(self, *args):
        if self._name != "austen":
            raise RuntimeError("gone")
        return before(self, *args)

    before = Hiding._advertise
    changes = {"server_configs": {"secure_sums": True, "min_clients": 1}}
    with (
        mock.patch.object(Hiding, "_advertise", fails),
        pytest.raises(FederationError, match="at least 3 must take part"),
    ):
        run(tmp_path, tiny_model, "gram", 3, **changes)


def test_what_the_server_sees_is_noise(tmp_path, tiny_model):
    seen = []
    add = Sums.add

    def spying(self, client, exchange, units):
        seen.extend(words for words in units.values())
        add(self, client, exchange, units)

    zeros = lambda self, block, unit, words: mask(self, block, unit, torch.zeros_like(words))  # noqa: E731
    mask = Hiding.mask
    with mock.patch.object(Sums, "add", spying), mock.patch.object(Hiding, "mask", zeros):
        run(tmp_path, tiny_model, "fedprllm", **SECURE)
    bits = torch.cat([words.clone() for words in seen]).view(torch.uint8).numpy()
    share = float(sum(int(byte).bit_count() for byte in bits)) / (8 * len(bits))
    assert abs(share - 0.5) < 0.02


def test_words_that_were_not_to_come_are_refused(tmp_path, tiny_model):
    before = LocalClient.next_message

    def shorter(self):
        made = before(self)
        for units in (made.update or {"blocks": {}})["blocks"].values():
            for name, unit in units.items():
                if "words" in unit and self.settings.client_id == "bible":
                    units[name] = PackedWords(unit["words"][:-1]).to_dict()
        return made

    with (
        mock.patch.object(LocalClient, "next_message", shorter),
        pytest.raises(Exception, match="client bible, block 0.*words"),
    ):
        run(tmp_path, tiny_model, "fedprllm", **SECURE)


@pytest.mark.parametrize(
    ("algorithm", "clients", "changes", "rule"),
    [
        ("fedspallm", 3, {}, "with fedspallm each client keeps other weights"),
        ("gram", 2, {}, "list at least 3 clients, got 2"),
        ("gram", 3, {"gram": {"propagate": "pruned"}}, "leave gram.propagate at dense"),
        (
            "gram",
            3,
            {"recovery": {"rounds": 1, "model": "runs"}},
            "a model that was pruned before is recovered without",
        ),
        ("consensus", 3, {"server_configs": BY_SIZE}, "weights at equal"),
        ("gram", 3, {"server_configs": BY_SIZE, "recovery": {"rounds": 1}}, "weights at equal"),
        ("gram", 3, {"recovery": {"rounds": 1, "delta": "int8"}}, "changes have a precision of their own"),
        ("gram", 3, {"server_configs": {"aggregator_kwargs": {"fold": "cumulative"}}}, "fold at latest"),
    ],
)
def test_what_does_not_go_with_it_is_said(tmp_path, tiny_model, algorithm, clients, changes, rule):
    secure = {"secure_sums": True} | changes.pop("server_configs", {})
    file = tiny_config(tmp_path, tiny_model, algorithm, clients, server_configs=secure, **changes)
    problems = validate(file)
    assert [
        one for one in problems if one.startswith(("server_configs.secure_sums: ", "recovery.delta: ")) and rule in one
    ]
    assert yaml.safe_load(file.read_text())["server_configs"]["secure_sums"] is True


def identities(folder, clients):
    """An identity of each client, and the roster."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {client: Identity.make() for client in clients}
    for client, identity in made.items():
        identity.save(folder / f"{client}.key")
    (folder / "roster.yaml").write_text(yaml.safe_dump({client: one.public for client, one in made.items()}))
    return made


def signed(folder, model, algorithm="fedprllm", clients=3, **secure):
    """A configuration with identities."""
    identities(folder, DOMAINS[:clients])
    secure = {"secure_sums": True, "roster": str(folder / "roster.yaml"), **secure}
    file = tiny_config(folder, model, algorithm, clients, server_configs=secure)
    config = yaml.safe_load(file.read_text())
    for client in config["clients"]:
        client["identity"] = str(folder / f"{client['client_id']}.key")
    file.write_text(yaml.safe_dump(config))
    return file


def conduct(file):
    experiment.conduct(prepared(well_formed(str(file), []), False), serial.run, False)
    return weights(file.parent / "run")


@pytest.mark.parametrize("algorithm", ["consensus", "gram"])
def test_the_bits_do_not_depend_on_identities(tmp_path, tiny_model, algorithm):
    bare, _ = run(tmp_path / "bare", tiny_model, algorithm, **SECURE)
    confirm = mock.patch.object(Hiding, "_confirm", autospec=True, side_effect=Hiding._confirm)
    with confirm as confirmed:
        found = conduct(signed(tmp_path / "signed", tiny_model, algorithm))
    assert confirmed.call_count == 2 * 3
    assert all(torch.equal(found[name], bare[name]) for name in bare)
    counted = [event["counted"] for event in events(tmp_path / "signed" / "run", "upload")]
    assert counted.count(None) == 6 * 3
    assert [one for one in counted if one] == [[0, 2]] * (3 * BLOCKS) + [[1, 2]] * (3 * BLOCKS)


def test_further_models_need_no_keys(tmp_path, tiny_model):
    run, config = tmp_path / "run", signed(tmp_path, tiny_model, "gram")
    (run / "statistics").mkdir(parents=True)
    (run / "manifest.json").touch()
    config.rename(run / "config.yaml")
    for file in (tmp_path / "roster.yaml", *tmp_path.glob("*.key")):
        file.unlink()
    assert further_models._config(run, None).server_configs.secure_sums


def test_a_client_that_confirms_and_is_lost_stays_in_the_sum(tmp_path, tiny_model):
    whole = conduct(signed(tmp_path / "whole", tiny_model, clients=4))
    for stage, gone in {"_confirm": "bible", "_open": "sqldocs"}.items():
        before = getattr(Hiding, stage)

        def fails(self, *args, gone=gone, before=before):
            if self._name == gone:
                raise RuntimeError("gone")
            return before(self, *args)

        with mock.patch.object(Hiding, stage, fails):
            left = conduct(signed(tmp_path / stage, tiny_model, clients=4, min_clients=3))
        assert [event["client"] for event in events(tmp_path / stage / "run", "absent")] == [gone]
        assert all(torch.equal(left[name], whole[name]) for name in whole)


def test_sums_that_too_few_confirm_are_not_opened(tmp_path, tiny_model):
    before = Hiding._confirm

    def fails(self, told):
        if self._name == "bible":
            raise RuntimeError("gone")
        return before(self, told)

    file = signed(tmp_path, tiny_model, min_clients=1)
    with (
        mock.patch.object(Hiding, "_confirm", fails),
        pytest.raises(FederationError, match="at least 3 clients whose part is in them must confirm it, got .*austen"),
    ):
        conduct(file)


def test_a_client_with_another_identity_is_refused_by_name(tmp_path, tiny_model):
    file = signed(tmp_path, tiny_model)
    (tmp_path / "bible.key").unlink()
    Identity.make().save(tmp_path / "bible.key")
    with pytest.raises(ConfigError, match="the roster has another key of client bible than its identity"):
        conduct(file)


def test_an_estimate_tells_who_says_what(tmp_path, tiny_model, capsys):
    assert main(["estimate", str(signed(tmp_path, tiny_model, "gram"))]) == 0
    [told] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("each round: ")]
    assert (
        told.startswith("each round: keys of secure sums up;") and told.count("who is in the sums up; shares that") == 2
    )


@pytest.mark.parametrize(("stage", "after"), [("_advertise", "_share"), ("_confirm", "_open")])
def test_words_that_another_has_signed_are_refused_by_name(tmp_path, tiny_model, stage, after):
    """A server that puts keys of its own in the place of a client's, or says for it who is in a sum."""
    before, stranger = getattr(Hiding, stage), Identity.make()

    def swapped(self, told):
        said = before(self, told)
        if self._name != "bible":
            return said
        own, self._mine._identity = self._mine._identity, stranger
        try:
            return said_of(self, stage, told)
        finally:
            self._mine._identity = own

    def said_of(hiding, stage, told):
        if stage == "_confirm":
            return before(hiding, told)
        return places.said({"key": hiding._mine.advertise()})

    relayed = mock.Mock(side_effect=AssertionError("the server has relayed it"))
    with (
        mock.patch.object(Hiding, stage, swapped),
        mock.patch.object(Hiding, after, relayed),
        pytest.raises(SecureSumError, match="client bible: its signature does not fit the key of client bible"),
    ):
        conduct(signed(tmp_path, tiny_model))


def test_a_client_refuses_keys_that_the_server_has_swapped(tmp_path, tiny_model):
    before = Sums.tell

    def lies(self, exchange, client):
        told = before(self, exchange, client)
        if "batch" in told and client == "austen":
            told["batch"]["bible"] = told["batch"]["sqldocs" if "sqldocs" in told["batch"] else "austen"]
        return told

    with (
        mock.patch.object(Sums, "tell", lies),
        pytest.raises(SecureSumError, match="refused the public keys of client bible: its sender must be bible"),
    ):
        conduct(signed(tmp_path, tiny_model))


def test_a_roster_that_differs_at_one_client_is_refused_by_name(tmp_path, tiny_model):
    before = serial.client_settings

    def other(config, client, *rest):
        made = before(config, client, *rest)
        if client.client_id == "bible":
            made.public_keys["austen"] = Identity.make().public
        return made

    with (
        mock.patch.object(serial, "client_settings", other),
        pytest.raises(SecureSumError, match="the public keys of client bible: its roster must be .* different rosters"),
    ):
        conduct(signed(tmp_path, tiny_model))


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda config: config["clients"][1].pop("identity"), "clients.1.identity: client 'bible' has none"),
        (
            lambda config: config["clients"][1].update(identity="no.key"),
            "clients.1.identity: .* there is no file no.key",
        ),
        (
            lambda config: config["clients"][1].update(identity=config["clients"][0]["identity"]),
            "clients.1.identity: the roster has another key of this client",
        ),
        (lambda config: config["server_configs"].pop("roster"), "server_configs.roster: .*austen.* have an identity"),
        (lambda config: config["server_configs"].update(roster="no.yaml"), "server_configs.roster: .* cannot be read"),
        (lambda config: config["server_configs"].update(secure_sums=False), "server_configs.roster: .*set server_conf"),
        (
            lambda config: config["clients"][1].update(client_id="b"),
            "server_configs.roster: .* which are .*b.*, got .*bib",
        ),
    ],
)
def test_identities_are_there_for_all_or_none(tmp_path, tiny_model, change, rule):
    file = signed(tmp_path, tiny_model)
    config = yaml.safe_load(file.read_text())
    change(config)
    file.write_text(yaml.safe_dump(config))
    problems = validate(file)
    assert [one for one in problems if re.match(rule, one)], problems


def test_of_two_tasks_for_one_client_the_first_goes_on(tmp_path):
    """A server could have one worker open for some survivors, and another at the same time for others."""
    first = Kept(tmp_path / "kept", "a")
    first.write("keys")
    second = Kept(tmp_path / "kept", "a")
    assert second.read() == "keys" and stat.S_IMODE((tmp_path / "kept").stat().st_mode) == 0o700
    second.write("confirmed")
    for late in (lambda: first.write("other"), first.forget):
        with pytest.raises(SecureSumError, match="client a: another task has gone on"):
            late()
    assert first.read() == "confirmed"
    second.forget()
    with pytest.raises(SecureSumError, match="client a: another task has gone on"):
        first.write("other")


def test_keys_are_kept_in_a_folder_of_their_own_with_locks(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"the folder .*file is for what nobody else may see"):
        Kept(tmp_path / "file", "a").write("keys")

    def none(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(
        ConfigError, match=r"client a: .*lock cannot be written or locked: Operation not supported; keys of secure"
    ):
        Kept(tmp_path / "kept", "a").write("keys")


def test_a_full_disk_is_said_before_sums_are_mapped(tmp_path, tiny_model, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ModelError, match="cannot be written: No space left on device; make room"):
        run(tmp_path, tiny_model, "consensus", **SECURE)


def told(monkeypatch, **lies):
    """A server that tells all clients but austen something else; clients share no folder."""
    honest = serial.client_settings

    def settings(config, client, *others):
        made = honest(config, client, *others)
        made.agreed = None
        if client.client_id != "austen":
            for name, value in lies.items():
                setattr(made, name, value)
        return made

    monkeypatch.setattr(serial, "client_settings", settings)


@pytest.mark.parametrize("signs", [True, False])
def test_clients_that_are_told_different_settings_take_no_keys_of_each_other(tmp_path, tiny_model, monkeypatch, signs):
    """With `magnitude` the others' masks would follow from the model, and the sum would show those of austen."""
    told(monkeypatch, pruner="magnitude")
    with pytest.raises(SecureSumError, match="the public keys of client bible: its settings must be"):
        conduct(signed(tmp_path, tiny_model, "fedprllm")) if signs else run(tmp_path, tiny_model, "fedprllm", **SECURE)


def test_a_client_does_not_hide_among_others_that_hardly_count(tmp_path, tiny_model, monkeypatch):
    told(monkeypatch)
    honest = serial.client_settings

    def settings(config, client, *others):
        made = honest(config, client, *others)
        made.data.windows = made.data.windows if client.client_id == "austen" else 1
        made.tokens = {name: tokens if name == "austen" else made.data.length for name, tokens in made.tokens.items()}
        return made

    monkeypatch.setattr(serial, "client_settings", settings)
    with pytest.raises(SecureSumError, match="client austen has .* and a sum hides nobody who has more than half"):
        run(tmp_path, tiny_model, "fedprllm", **SECURE)


@pytest.mark.parametrize("lies", [True, False])
def test_sums_of_clients_that_were_sent_different_things_say_nothing(tmp_path, tiny_model, monkeypatch, lies):
    """With squares of zero the others would send zeros, and the sum would be what austen sends."""
    told(monkeypatch)
    opened, sent, take = {}, {}, LocalClient.take
    grams, made = sweeps._SWEEPS["grams"], folds.HiddenGrams.made

    def other(self, update):
        squares = update and self.exchanges[update["exchange"]].down == "squares"
        if squares and self.settings.client_id != "austen":
            update = copy.deepcopy(update)
            for units in update["blocks"].values():
                for packed in units.values():
                    packed["values"].mul_(0)
        take(self, update)

    def sending(source, exchange, blocks):
        for block, units in grams(source, exchange, blocks):
            if source.settings.client_id == "austen":
                sent.update({(block, name): words.words.clone() for name, (words, _) in units.items()})
            yield block, units

    def opening(self, block, unit, words, clients):
        opened[block, unit] = words.clone()
        return made(self, block, unit, words, clients)

    monkeypatch.setattr(LocalClient, "take", other)
    monkeypatch.setitem(sweeps._SWEEPS, "grams", sending)
    monkeypatch.setattr(folds.HiddenGrams, "made", opening)
    if not lies:
        with pytest.raises(SecureSumError, match="the words of client .* was sent something else than the others"):
            conduct(signed(tmp_path, tiny_model, "gram"))
        return
    monkeypatch.setattr(Sums, "require_view", lambda *_: None)
    with suppress(FedSpaLLMError):  # noise may be refused as a Gram matrix
        conduct(signed(tmp_path, tiny_model, "gram"))
    assert opened and all(float((sent[place] == words).float().mean()) < 0.01 for place, words in opened.items())


def test_a_client_makes_nothing_before_it_has_keys(tmp_path):
    hiding = Hiding("a", Roster(("a", "b", "c")), "", {(2, 0, "q"): 0}, tmp_path / "secrets")
    with pytest.raises(SecureSumError, match="client a has no keys for secure sums"):
        hiding.begin(0, 2, "squares", {}, "")
    assert not (tmp_path / "secrets").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("clients.1.train_configs.damping=0.1", "client bible has another damping"),
        ("clients.1.data.windows=500", "client bible has .* and a sum hides nobody who has more than half of them"),
    ],
)
def test_what_would_give_a_client_away_is_refused_before_a_run(tmp_path, tiny_model, capsys, change, words):
    file = tiny_config(tmp_path, tiny_model, "gram", 3, **SECURE)
    assert main(["validate", str(file), change]) == 2
    assert re.search(words, capsys.readouterr().err)
