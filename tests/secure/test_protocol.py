"""Sums of a whole protocol are those of the inputs, bit for bit, whoever falls out wherever; and nothing else is seen."""

import itertools

import pytest
import torch
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from fedspallm_appfl.errors import ConfigError, SecureSumError
from fedspallm_appfl.secure import shamir, shares
from fedspallm_appfl.secure.client import Client
from fedspallm_appfl.secure.encoding import join, split
from fedspallm_appfl.secure.exchange import Exchange
from fedspallm_appfl.secure.identity import Identity, Roster
from fedspallm_appfl.secure.server import Server
from fedspallm_appfl.secure.stream import add_streams, self_key
from helpers.secure import UNITS, Federation

STAGES = ("nobody", "keys", "shares", "all messages", "some messages", "opening")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("size", "degree", "signed"),
    [(3, None, True), (5, None, False), (5, None, True), (20, 16, False)],
)
def test_sums_are_those_of_the_survivors(size, degree, signed, stage):
    federation = Federation(size, signed=signed, degree=degree)
    names = list(federation.clients)
    gone = dict.fromkeys(STAGES, []) | {stage: names[1::4] if stage != "nobody" and size > 3 else []}
    federation.advertise(gone["keys"])
    federation.share(gone["shares"])
    federation.receive()
    federation.upload(0, gone["all messages"])
    federation.upload(1, gone["all messages"] + gone["some messages"])
    survivors = federation.open([0, 1], gone["all messages"] + gone["some messages"] + gone["opening"])
    absent = gone["keys"] + gone["shares"] + gone["all messages"]
    assert survivors[0] == [name for name in names if name not in absent]
    assert survivors[1] == [name for name in survivors[0] if name not in gone["some messages"]]
    for message, left in survivors.items():
        sums = dict(federation.server.sums(message))
        assert {*sums} == {*UNITS}
        for unit, words in sums.items():
            assert torch.equal(words, federation.plain(message, unit, left))


def test_of_three_one_may_be_silent_when_the_sum_is_opened():
    federation = Federation(3)
    federation.prepare()
    federation.upload(0)
    federation.open([0], without=["c01"])
    assert torch.equal(dict(federation.server.sums(0))["gram"], federation.plain(0, "gram", federation.clients))


def test_uploads_of_zeros_look_like_noise():
    """Bits are set half of the time, and bytes are uniform by a chi-square test (p about 1e-6 on either side)."""
    federation = Federation(4)
    federation.prepare()
    words = federation.clients["c00"].mask(0, "gram", torch.zeros(1 << 15, dtype=torch.int64))
    count = len(words)
    set_bits = torch.stack([(words >> bit & 1).sum() for bit in range(64)])
    assert ((set_bits - count / 2).abs() < 5.5 * (count / 4) ** 0.5).all()
    seen = torch.bincount(words.view(torch.uint8).long(), minlength=256)
    expected = 8 * count / 256
    chi = float(((seen - expected) ** 2 / expected).sum())
    assert abs(chi - 255) < 5 * (2 * 255) ** 0.5


def test_no_two_uploads_share_a_word():
    """The same input in another unit, message, exchange, round or run, or of another client, is hidden by another mask."""
    identities = {f"c{i:02}": Identity.make() for i in range(3)}
    zeros, seen = torch.zeros(100, dtype=torch.int64), []
    places = [{"number": 0}, {"number": 1}, {"round_": 1}, {"run": "other"}]
    for place in places:
        federation = Federation(3, identities=identities, **place)
        for name in identities:  # the worst case: the secrets of the first exchange are used again
            federation.clients[name] = Client(federation.exchange, name, identities[name], root=name.encode() * 11)
        federation.prepare()
        for client, message, unit in itertools.product(federation.clients.values(), (0, 1), UNITS):
            seen.append(client.mask(message, unit, zeros))
    assert len(torch.cat(seen).unique()) == 100 * len(places) * 3 * 2 * 2


def test_masks_do_not_hang_on_the_own_one_alone():
    """With the seed of its own mask known, an upload still looks nothing like its input."""
    federation = Federation(3)
    federation.prepare()
    client, words = federation.clients["c00"], torch.zeros(50, dtype=torch.int64)
    left = client.mask(0, "gram", words)
    add_streams(left, [], [self_key(client._seed(0), *federation.exchange.context, 0, "gram")])
    assert int((left == 0).sum()) == 0


def test_other_words_are_not_hidden_by_the_same_mask():
    federation = Federation(3)
    federation.prepare()
    client, words = federation.clients["c00"], torch.arange(10)
    once = client.mask(0, "gram", words)
    assert torch.equal(client.mask(0, "gram", words), once)
    assert torch.equal(words, torch.arange(10))
    for changed in (words + 1, words[:9]):
        with pytest.raises(SecureSumError, match="client c00 refused to mask gram of message 0 again"):
            client.mask(0, "gram", changed)
    with pytest.raises(SecureSumError, match="client c00 cannot mask message 2 of 2"):
        client.mask(2, "gram", words)


@pytest.mark.parametrize("steps", range(5))
def test_a_resumed_client_repeats_what_it_has_sent(steps):
    federation = Federation(5, signed=True)
    exchange, identity = federation.exchange, federation.identities["c01"]
    plan = [federation.advertise, federation.share, federation.receive, lambda: federation.upload(0), lambda: None]

    def resume():
        federation.clients["c01"] = Client.restore(exchange, "c01", identity, federation.clients["c01"].state())

    for step in plan[:steps]:
        step()
    resume()
    assert (
        federation.clients["c01"].state()
        == Client.restore(exchange, "c01", identity, federation.clients["c01"].state()).state()
    )
    for step in plan[steps:]:
        step()
    resume()
    client = federation.clients["c01"]
    again = client.mask(0, "gram", federation.inputs["c01", 0, "gram"])
    assert torch.equal(again, federation.uploads["c01", 0]["gram"])
    survivors = federation.open([0])
    assert torch.equal(dict(federation.server.sums(0))["votes"], federation.plain(0, "votes", federation.clients))
    resume()
    with pytest.raises(SecureSumError, match="again: its words have changed"):
        federation.clients["c01"].mask(0, "gram", torch.zeros(37, dtype=torch.int64))
    with pytest.raises(SecureSumError, match="it has confirmed others"):
        federation.clients["c01"].open({0: survivors[0][1:]})


def test_a_state_is_of_one_exchange():
    federation = Federation(3)
    state = federation.clients["c00"].state()
    other = Exchange("run", 0, 1, 2, federation.exchange.roster)
    for exchange, name in ((other, "c00"), (federation.exchange, "c01")):
        with pytest.raises(ConfigError, match="the state of client c00 is of another client or exchange"):
            Client.restore(exchange, name, None, state)


class TestALyingServer:
    """What a client refuses to be told."""

    @pytest.fixture
    def ready(self):
        federation = Federation(5, signed=True)
        federation.prepare()
        for message in (0, 1):
            federation.upload(message)
        return federation

    def confirmations(self, federation, survivors, names=None):
        others = names or federation.clients
        return {name: federation.clients[name].confirm(survivors) for name in others}

    def test_nobody_opens_both(self, ready):
        everybody, fewer = {0: [*ready.clients]}, {0: [*ready.clients][:4]}
        client = ready.clients["c00"]
        client.confirm(everybody)
        for told in (client.confirm, client.open):
            with pytest.raises(SecureSumError, match="client c00 refused .* message 0: it has confirmed others"):
                told(fewer)
        first = client.open(everybody, self.confirmations(ready, everybody))
        assert client.open(everybody, self.confirmations(ready, everybody)) == first
        client.confirm({1: fewer[0]})  # another message has other secrets

    def test_nobody_opens_for_survivors_that_others_have_not_confirmed(self, ready):
        everybody = {0: [*ready.clients]}
        fewer = {0: everybody[0][:4]}
        given = self.confirmations(ready, everybody, ["c00", "c01", "c02"])
        with pytest.raises(
            SecureSumError, match="message 0: at least 4 of its survivors must have .*, got c00, c01, c02"
        ):
            ready.clients["c00"].open(everybody, given)
        for wrong in (fewer, {1: everybody[0]}):
            given["c03"] = ready.clients["c03"].confirm(wrong)
            with pytest.raises(
                SecureSumError, match="confirmation of survivors of client c03: it is of other survivors"
            ):
                ready.clients["c00"].open(everybody, given)
        given["c03"] = given["c02"]
        with pytest.raises(SecureSumError, match="confirmation of survivors of client c03: its sender must be"):
            ready.clients["c00"].open(everybody, given)

    def test_what_was_confirmed_with_other_keys_does_not_count(self, ready):
        """A server could ask for keys twice under one run, and use what clients confirmed with the first ones."""
        again, everybody = Federation(5, identities=ready.identities), {0: [*ready.clients]}
        again.prepare()
        again.upload(0)
        earlier = self.confirmations(ready, everybody)
        with pytest.raises(SecureSumError, match="of client c00: it is of other survivors or other keys"):
            again.clients["c00"].open(everybody, earlier)
        with pytest.raises(SecureSumError, match="of client c01: it is of other survivors or other keys"):
            again.server.confirmed("c01", everybody, earlier["c01"])

    def test_only_survivors_count_and_open(self):
        """Or a server could have a group open the masks of a client that is not told of it."""
        federation = Federation(7, signed=True)
        federation.prepare()
        names = [*federation.clients]
        for message in (0, 1):
            federation.upload(message, without=names[:2] if message else ())
        survivors = federation.server.close([0, 1])
        given = self.confirmations(federation, survivors, names[:6])
        with pytest.raises(SecureSumError, match="does not open message 1: at least 5 .*, got c02, c03, c04, c05"):
            federation.clients["c02"].open(survivors, given)
        given |= self.confirmations(federation, survivors, names[6:])
        for name, messages in (("c00", {0}), ("c02", {0, 1})):
            opened = federation.clients[name].open(survivors, given)
            assert {*shares.read_opening(federation.exchange, name, opened)} == messages

    @pytest.mark.parametrize(
        ("names", "reason"),
        [
            (["c00", "c01", "c02"], "of 5 clients at least 4 must be left"),
            (["c00", "c00", "c01", "c02"], "each must be a client of the roster, once"),
            (["c00", "c01", "c02", "x"], "each must be a client of the roster, once"),
            ([], "got none"),
        ],
    )
    def test_survivors_that_cannot_be(self, ready, names, reason):
        with pytest.raises(SecureSumError, match=f"client c00 refused the survivors of message 0: .*{reason}"):
            ready.clients["c00"].open({0: names})

    def test_survivors_whose_message_cannot_have_come(self):
        federation = Federation(5)
        federation.advertise()
        federation.share(without=["c04"])
        federation.receive()
        for name in ("c00", "c01", "c02", "c03"):
            federation.clients[name].mask(0, "gram", torch.zeros(1, dtype=torch.int64))
        with pytest.raises(SecureSumError, match="client c00 refused .* it has no shares of c04"):
            federation.clients["c00"].open({0: ["c00", "c01", "c02", "c04"]})
        with pytest.raises(
            SecureSumError, match="client c00 refused .* it is among them, and has sent no such message"
        ):
            federation.clients["c00"].open({1: ["c00", "c01", "c02", "c03"]})
        with pytest.raises(SecureSumError, match="there are messages 0 to 1"):
            federation.clients["c00"].open({2: ["c00", "c01", "c02", "c03"]})

    @pytest.mark.parametrize("signed", [False, True])
    def test_keys_that_were_not_sent(self, signed):
        federation, other = Federation(4, signed=signed), Federation(4, signed=signed)
        batch, foreign = federation.advertise(), other.advertise()
        client = federation.clients["c00"]
        with pytest.raises(SecureSumError, match="batch of keys: its own keys|keys of client c00: its roster"):
            client.share(batch | {"c00": foreign["c00"]})
        with pytest.raises(SecureSumError, match="refused keys of 2 clients: of 4 at least 3 must take part"):
            client.share({name: batch[name] for name in ("c00", "c01")})
        with pytest.raises(SecureSumError, match="the public keys of client c01: its sender must be c01, got 'c02'"):
            client.share(batch | {"c01": batch["c02"]})
        if signed:
            with pytest.raises(SecureSumError, match="client c01: its roster must be"):
                client.share(batch | {"c01": foreign["c01"]})
        else:  # the server is trusted not to do this; who saw other keys cannot read the shares
            shares = client.share(batch | {"c01": foreign["c01"]})
            federation.clients["c02"].share(batch)
            with pytest.raises(
                SecureSumError, match="refused the shares of client c00 for client c02: they cannot be dec"
            ):
                federation.clients["c02"].receive(dict.fromkeys(federation.clients, shares["c02"]))

    def test_keys_with_a_signature_of_nobody_or_of_somebody_else(self):
        federation = Federation(3, signed=True)
        batch, exchange = federation.advertise(), federation.exchange
        body = exchange.read("public keys", "c01", batch["c01"])
        changed = bytes([body[4] ^ 1]).join([body[:4], body[5:]])
        for identity, reason in (
            (None, "it is not signed"),
            (federation.identities["c02"], "does not fit the key of client c01"),
        ):
            with pytest.raises(SecureSumError, match=f"refused the public keys of client c01: .*{reason}"):
                federation.clients["c00"].share(batch | {"c01": exchange.sign("public keys", "c01", body, identity)})
        statement, signature = batch["c01"][:-68], batch["c01"][-68:]
        with pytest.raises(SecureSumError, match="does not fit the key of client c01"):
            federation.clients["c00"].share(batch | {"c01": statement.replace(body, changed) + signature})

    @pytest.mark.parametrize(
        ("place", "what"), [({"run": "r"}, "run"), ({"round_": 1}, "round"), ({"number": 1}, "exchange")]
    )
    def test_messages_of_another_place(self, place, what):
        federation = Federation(3, signed=True)
        earlier = Federation(3, identities=federation.identities, **place)
        batch = federation.advertise()
        with pytest.raises(SecureSumError, match=f"refused the public keys of client c01: its {what} must be"):
            federation.clients["c00"].share(batch | {"c01": earlier.clients["c01"].advertise()})

    def test_messages_of_sites_with_another_roster_or_for_something_else(self):
        federation = Federation(3, signed=True)
        batch = federation.advertise()
        larger = Federation(4, identities=federation.identities | {"c03": Identity.make()})
        with pytest.raises(SecureSumError, match="refused the public keys of client c01: its roster must be"):
            federation.clients["c00"].share(batch | {"c01": larger.clients["c01"].advertise()})
        signed = federation.exchange.sign("opened shares", "c01", b"", federation.identities["c01"])
        with pytest.raises(SecureSumError, match="its purpose must be public keys, got 'opened shares'"):
            federation.clients["c00"].share(batch | {"c01": signed})

    def test_keys_that_two_have(self):
        federation = Federation(3)
        batch, exchange = federation.advertise(), federation.exchange
        body = exchange.read("public keys", "c01", batch["c01"])
        with pytest.raises(SecureSumError, match="refused the keys of client c01 and c02: a key is used once"):
            federation.clients["c00"].share(batch | {"c02": exchange.sign("public keys", "c02", body, None)})

    def test_a_key_that_makes_no_secret(self):
        federation = Federation(3)
        batch, exchange = federation.advertise(), federation.exchange
        body = exchange.read("public keys", "c01", batch["c01"])
        weak = exchange.sign("public keys", "c01", body[:4] + bytes(32) + body[36:], None)
        with pytest.raises(SecureSumError, match="refused a key of client c01: it makes no secret"):
            Server(exchange).advertised("c01", weak)
        with pytest.raises(SecureSumError, match="refused a key of client c01: it makes no secret"):
            federation.clients["c00"].share(batch | {"c01": weak})

    def test_a_second_batch_and_other_shares(self, ready):
        client = ready.clients["c00"]
        batch = ready.server.batch()
        assert client.share(batch) == ready.server._sealed["c00"]
        with pytest.raises(SecureSumError, match="client c00 refused a second batch of keys"):
            client.share({name: batch[name] for name in list(batch)[:4]})
        shares = ready.server.shares_for("c00")
        client.receive(shares)
        with pytest.raises(SecureSumError, match="client c00 refused other shares than before"):
            client.receive({name: shares[name] for name in list(shares)[:4]})

    def test_shares_that_are_not_for_this_client(self):
        federation = Federation(5)
        federation.advertise()
        federation.share()
        client, shares = federation.clients["c00"], federation.server.shares_for("c00")
        with pytest.raises(SecureSumError, match="client c00 needs 4 of its neighbours and itself, got 3 that shared"):
            client.receive({name: shares[name] for name in ("c00", "c01", "c02")})
        with pytest.raises(
            SecureSumError, match="client c00 refused shares of its neighbours: its own are not among them"
        ):
            client.receive({name: shares[name] for name in ("c01", "c02", "c03", "c04")})
        for wrong in (shares["c02"], federation.server.shares_for("c01")["c01"], shares["c01"][:-1] + b"x"):
            with pytest.raises(SecureSumError, match="of client c01 for client c00: they cannot be decrypted"):
                client.receive(shares | {"c01": wrong})
        with pytest.raises(SecureSumError, match="refused shares of x: no neighbour"):
            client.receive(shares | {"x": shares["c01"]})


class TestAWrongClient:
    """What the server refuses, with the client's name; the others' sum is as it was."""

    def test_keys(self):
        federation = Federation(4, signed=True)
        server, sent = federation.server, federation.clients["c01"].advertise()
        with pytest.raises(SecureSumError, match="refused keys of client x: it is not in the roster"):
            server.advertised("x", sent)
        with pytest.raises(SecureSumError, match="refused the public keys of client c02: its sender must be"):
            server.advertised("c02", sent)
        short = federation.exchange.sign("public keys", "c01", b"", federation.identities["c01"])
        with pytest.raises(SecureSumError, match="refused the keys of client c01: 2 messages need 3 keys of 32 bytes"):
            server.advertised("c01", short)
        for cut in (b"", sent[:50], sent + b"x"):
            with pytest.raises(SecureSumError, match="refused the public keys of client c01"):
                server.advertised("c01", cut)
        server.advertised("c01", sent)
        server.advertised("c01", sent)
        again = Client(federation.exchange, "c01", federation.identities["c01"]).advertise()
        with pytest.raises(SecureSumError, match="refused keys of client c01: it has sent others"):
            server.advertised("c01", again)
        with pytest.raises(SecureSumError, match="refused keys of 1 clients: of 4 at least 3"):
            server.batch()

    def test_shares(self):
        federation = Federation(4)
        server, batch = federation.server, federation.advertise(without=["c03"])
        sealed = federation.clients["c00"].share(batch)
        with pytest.raises(SecureSumError, match="refused the shares of client c03: its keys were not relayed"):
            server.shared("c03", sealed)
        with pytest.raises(SecureSumError, match="refused the shares of client c00: they must be for c00, c01, c02"):
            server.shared("c00", {name: sealed[name] for name in ("c00", "c01")})
        with pytest.raises(SecureSumError, match="the shares of client c00: they must be 4 shares and their SHA-256"):
            server.shared("c00", sealed | {"c01": b""})
        with pytest.raises(SecureSumError, match="at least 3 clients must share their secrets, .*c00"):
            server.shared("c00", sealed)
            server.shares_for("c00")
        federation.share()
        server.shares_for("c00")
        with pytest.raises(SecureSumError, match="refused the shares of client c01: they come after the others'"):
            server.shared("c01", sealed)
        with pytest.raises(SecureSumError, match="refused keys of client c03: .*comes after"):
            server.advertised("c03", federation.clients["c03"].advertise())

    def test_shares_that_are_not_the_announced_ones(self):
        federation = Federation(3)
        federation.advertise()
        federation.share()
        key = federation.clients["c01"]._sealing("c01", "c00")
        sent = federation.server.shares_for("c00")
        digests, _ = split(sent["c01"], "shares")
        lie = ChaCha20Poly1305(key).encrypt(bytes(12), bytes(4 * shamir.SHARE), digests)
        with pytest.raises(SecureSumError, match="client c01 for client c00: they are not those that it announced"):
            federation.clients["c00"].receive(sent | {"c01": join(digests, lie)})

    def test_messages(self):
        federation = Federation(4)
        federation.advertise(without=["c03"])
        federation.share()
        federation.receive()
        server, words = federation.server, {unit: torch.ones(size, dtype=torch.int64) for unit, size in UNITS.items()}
        with pytest.raises(SecureSumError, match="refused message 0 of client c00: the message is not open"):
            server.add("c00", 0, words)
        federation.upload(0)
        with pytest.raises(SecureSumError, match="refused message 0 of client c03: others have no shares"):
            server.add("c03", 0, words)
        with pytest.raises(SecureSumError, match="refused message 0 of client c00: .*it has come before"):
            server.add("c00", 0, words)
        with pytest.raises(ValueError, match="message 0 of 2 cannot be opened, or was before"):
            server.begin(0, UNITS)
        server.begin(1, UNITS)
        for wrong, reason in (
            ({"gram": words["gram"]}, "its units must be gram, votes"),
            (words | {"votes": words["votes"][1:]}, "votes must be 5 words of int64"),
            (words | {"votes": words["votes"].int()}, "votes must be 5 words of int64"),
        ):
            with pytest.raises(SecureSumError, match=f"refused message 1 of client c00: {reason}"):
                server.add("c00", 1, wrong)
        with pytest.raises(SecureSumError, match="message 1 has too few survivors: .* 3 must be left, got none"):
            server.close([1])
        federation.open([0])
        assert torch.equal(dict(server.sums(0))["gram"], federation.plain(0, "gram", ["c00", "c01", "c02"]))

    def test_messages_that_come_too_early_or_too_late(self):
        federation = Federation(4)
        federation.advertise()
        federation.share()
        server, words = federation.server, {unit: torch.ones(size, dtype=torch.int64) for unit, size in UNITS.items()}
        server.begin(1, UNITS)
        with pytest.raises(SecureSumError, match="refused message 1 of client c00: others have no shares"):
            server.add("c00", 1, words)
        federation.receive()
        federation.upload(0, without=["c03"])
        federation.open([0])
        with pytest.raises(SecureSumError, match="refused message 0 of client c03: the message is not open"):
            server.add("c03", 0, words)
        assert torch.equal(dict(server.sums(0))["gram"], federation.plain(0, "gram", ["c00", "c01", "c02"]))

    def test_openings(self):
        federation = Federation(4)
        federation.prepare()
        federation.upload(0)
        federation.upload(1, without=["c03"])
        server, clients, exchange = federation.server, federation.clients, federation.exchange
        sent = clients["c00"].open({0: [*clients], 1: ["c00", "c01", "c02"]})
        with pytest.raises(SecureSumError, match="refused opened shares of client c00: message 0 is not closed"):
            server.opened("c00", sent)
        server.close([0, 1])
        with pytest.raises(SecureSumError, match="refused the opened shares of client c01: its sender must be"):
            server.opened("c01", sent)
        with pytest.raises(SecureSumError, match="refused opened shares of client x: it holds none"):
            server.opened("x", sent)
        body = exchange.read("opened shares", "c00", sent)
        for wrong in (body[:-1] + b"\xee", body.replace(b"c01", b"c02", 1), body.replace(b"c01", b"c07"), body + body):
            with pytest.raises(SecureSumError, match="opened shares of client c00"):
                server.opened("c00", exchange.sign("opened shares", "c00", wrong, None))
        liar = clients["c01"].open({0: ["c00", "c01", "c02"]})  # as if c03 had fallen out
        with pytest.raises(SecureSumError, match="client c01: in message 0, that of client c03 is a wrong one"):
            server.opened("c01", liar)
        server.opened("c00", sent)
        with pytest.raises(SecureSumError, match="message 0 cannot be opened: .* client c00 3 shares .*got 1: c00"):
            next(server.sums(0))

    def test_a_mask_key_that_is_not_the_advertised_one(self, monkeypatch):
        federation = Federation(4)
        federation.advertise()
        monkeypatch.setattr(federation.clients["c03"], "_mask_key", lambda message: b"k" * 32)
        monkeypatch.setattr(federation.clients["c03"], "advertise", lambda: federation.server.batch()["c03"])
        federation.share()
        federation.receive()
        federation.upload(0, without=["c03"])
        federation.open([0])
        with pytest.raises(SecureSumError, match="client c03 has shared another mask key than its own"):
            next(federation.server.sums(0))


def test_too_few_clients_are_refused():
    for names in (("a",), ("a", "b")):
        with pytest.raises(SecureSumError, match=f"a secure sum needs at least 3 clients, got {len(names)}"):
            Roster(names)
    assert [Exchange("r", 0, 0, 1, Roster(tuple("abcdefghij"[:n]))).threshold for n in (3, 4, 5, 9)] == [3, 3, 4, 7]


def test_a_third_of_the_clients_may_help_a_lying_server():
    """Any two groups that confirm or make masks with each other have an honest client in common."""
    for clients in range(3, 200):
        exchange = Exchange("run", 0, 0, 1, Roster(tuple(map(str, range(clients)))), degree=clients - 1)
        helpers = clients // 3
        assert exchange.masks_needed + exchange.threshold > clients + helpers
        assert exchange.shares_needed > helpers
    assert Exchange("run", 0, 0, 1, Roster(tuple(map(str, range(100))))).masks_needed == 32


def test_clients_that_sign_are_neighbours_of_everybody():
    with pytest.raises(ConfigError, match="clients that sign have everybody else as neighbours, that is 4, got 2"):
        Federation(5, signed=True, degree=2)
    keys = {str(i): Identity.make().public for i in range(60)}
    assert len(Exchange("run", 0, 0, 1, Roster(tuple(keys), keys)).members["0"]) == 60
    assert len(Exchange("run", 0, 0, 1, Roster(tuple(keys))).members["0"]) < 60


def test_a_client_is_in_the_roster_with_its_key():
    federation = Federation(3, signed=True)
    for name, identity in (("x", None), ("c00", None), ("c00", Identity.make())):
        with pytest.raises(ConfigError, match="roster"):
            Client(federation.exchange, name, identity)
