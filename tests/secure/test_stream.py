"""Streams against the vectors of RFC 8439 and RFC 5869, and keys that differ wherever what they are for differs."""

import itertools

import pytest
import torch
from cryptography.hazmat.primitives import hashes, hmac

from fedspallm_appfl.errors import SecureSumError
from fedspallm_appfl.secure import stream
from fedspallm_appfl.secure.encoding import join, split

# RFC 8439, appendix A.1, test vectors 1 and 2: a key of zeros, blocks 0 and 1
ZEROS = (
    "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
    "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"
)


def test_a_stream_is_chacha20():
    assert stream.keystream(bytes(32), 128).hex() == ZEROS
    words = torch.zeros(16, dtype=torch.int64)
    stream.add_streams(words, [bytes(32)])
    assert words.numpy().astype("<i8").tobytes().hex() == ZEROS


@pytest.mark.parametrize("size", [0, 1, 7, 8, 50])
def test_streams_are_added_and_subtracted_in_pieces(size, monkeypatch):
    monkeypatch.setattr(stream, "PIECE", 8)
    keys = [bytes([i]) * 32 for i in range(3)]

    def numbers(key):
        data = stream.keystream(key, 8 * size)
        return [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)]

    words = torch.arange(size)
    stream.add_streams(words, keys[:2], keys[2:])
    wanted = [i + a + b - c for i, (a, b, c) in enumerate(zip(*map(numbers, keys), strict=True))]
    assert [one % 2**64 for one in words.tolist()] == [one % 2**64 for one in wanted]
    stream.add_streams(words, keys[2:], keys[:2])
    assert words.tolist() == list(range(size))


def test_a_key_is_hkdf():
    """RFC 5869 by hand: extract with a salt of zeros, then one block of expansion."""

    def mac(key, data):
        one = hmac.HMAC(key, hashes.SHA256())
        one.update(data)
        return one.finalize()

    info = join("fedspallm secure sums 1", "pair", "run", 1)
    assert stream.derive(b"secret", "pair", "run", 1) == mac(mac(bytes(32), b"secret"), info + b"\x01")


def test_keys_differ_wherever_what_they_are_for_differs():
    lists = [("run", 1, 0, 2, "unit"), ("run", 2, 0, 2, "unit"), ("run", 1, 1, 2, "unit"), ("run", 1, 0, 3, "unit")]
    lists += [
        ("run1", "", 0, 2, "unit"),
        ("ru", "n1", 0, 2, "unit"),
        ("run", 1, 0, 2, "unit", ""),
        ("run", 10, 2, "unit"),
    ]
    keys = [stream.derive(bytes(32), "pair", *one) for one in lists] + [stream.derive(bytes(32), "self", *lists[0])]
    assert all(a != b for a, b in itertools.combinations(keys, 2))


@pytest.mark.parametrize("kind", [stream.self_key, lambda *place: stream.pair_key(place[0], "a", "b", *place[1:])])
def test_every_part_of_a_place_is_in_the_keys_of_masks(kind):
    places = [("run", 1, 2, 3, "unit")]
    places += [(*places[0][:i], other, *places[0][i + 1 :]) for i, other in enumerate(("other", 9, 9, 9, "other"))]
    keys = {kind(secret, *place) for secret in (b"s" * 32, b"t" * 32) for place in places}
    assert len(keys) == 2 * len(places)


def test_two_clients_make_the_same_mask_and_two_others_another_one():
    pairs = [("a", "b"), ("b", "a"), ("a", "c"), ("ab", "c")]
    one, same, *others = (stream.pair_key(b"s" * 32, *pair, "run", 0, 0, 0, "unit") for pair in pairs)
    assert one == same
    assert len({one, *others}) == 3


def test_lists_come_out_as_they_went_in():
    assert split(join(b"", "a", 12, "ü"), "x") == [b"", b"a", b"12", "ü".encode()]
    assert split(b"", "x") == []
    whole = join(b"abc", b"de")
    for cut in (1, 3, 5, 9, len(whole) - 1):
        with pytest.raises(SecureSumError, match="refused the keys of a: its .* bytes end inside a part"):
            split(whole[:cut], "the keys of a")
