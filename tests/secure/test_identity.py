"""Identity files and rosters: what is written is read, and what cannot be trusted is refused."""

import base64
import json
import stat

import pytest

from fedspallm_appfl.errors import ConfigError
from fedspallm_appfl.secure.identity import KIND, Identity, Roster

NAMES = ("a", "b", "c")


def test_an_identity_is_a_file_of_its_owner(tmp_path):
    identity, file = Identity.make(), tmp_path / "identity.pem"
    identity.save(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert Identity.load(file).public == identity.public
    with pytest.raises(FileExistsError):
        Identity.make().save(file)
    file.chmod(0o640)
    with pytest.raises(ConfigError, match="only the owner may read the identity .*its mode is 640; chmod 600"):
        Identity.load(file)
    for text in ("", "no key", identity.public):
        file.write_text(text)
        with pytest.raises(ConfigError, match="the identity .* cannot be read"):
            Identity.load(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        Identity.load(tmp_path / "none")


def test_a_roster_is_read_and_tells_signatures_apart(tmp_path):
    identities = {name: Identity.make() for name in NAMES}
    file = tmp_path / "roster.yaml"
    file.write_text("".join(f"{name}: {one.public}\n" for name, one in identities.items()))
    roster = Roster.read(file)
    assert roster.clients == NAMES
    file.write_text(json.dumps({name: identities[name].public for name in reversed(NAMES)}))
    assert Roster.read(file).digest == roster.digest
    signature = identities["a"].sign(b"statement")
    assert roster.verify("a", b"statement", signature)
    assert not roster.verify("b", b"statement", signature)
    assert not roster.verify("a", b"another", signature)
    assert not roster.verify("a", b"statement", signature[:-1])


def test_rosters_of_other_names_or_keys_have_other_digests():
    keys = {name: Identity.make().public for name in NAMES}
    swapped = keys | {"a": keys["b"], "b": keys["a"]}
    rosters = [
        Roster(NAMES),
        Roster(("a", "b", "d")),
        Roster(NAMES, keys),
        Roster(NAMES, swapped),
        Roster(("ab", "c", "d")),
    ]
    assert len({roster.digest for roster in rosters}) == len(rosters)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: KEY\na: KEY\nb: KEY\n", "the key 'a' stands twice"),
        ("- a\n- b\n", "must be a mapping of client to public key"),
        ("1: KEY\n2: KEY\n3: KEY\n", "must be a mapping of client to public key"),
        ("a: KEY\nb: KEY\nc: KEY\n", "two clients of a roster have the same key"),
        (
            "a: KEY\nb: ed25519:AAAA\nc: x\n",
            "the key of client b must be ed25519: and 44 characters, .*, got 'ed25519:AAAA'",
        ),
        ("a: KEY\nb: BARE\nc: x\n", "the key of client b must be ed25519: and 44 characters"),
        ("a: KEY\nb: ALIAS\nc: x\n", "the key of client b must be ed25519: and 44 characters"),
        ("a: KEY\nb: '*'\nc: x\n", "the key of client b must be"),
    ],
)
def test_what_is_no_roster(tmp_path, text, reason):
    file = tmp_path / "roster.yaml"
    key = Identity.make().public
    alias = f"{key[:-2]}{chr(ord(key[-2]) + 1)}="  # its last two bits belong to no byte
    assert base64.b64decode(alias.removeprefix(KIND)) == base64.b64decode(key.removeprefix(KIND))
    file.write_text(text.replace("KEY", key).replace("BARE", key.removeprefix(KIND)).replace("ALIAS", alias))
    with pytest.raises(ConfigError, match=reason):
        Roster.read(file)


def test_names_and_keys_belong_together():
    with pytest.raises(ConfigError, match="a client stands in a roster once, got a, a, b"):
        Roster(("a", "b", "a"))
    with pytest.raises(ConfigError, match="a key of every client or none, got keys of a"):
        Roster(NAMES, {"a": Identity.make().public})
