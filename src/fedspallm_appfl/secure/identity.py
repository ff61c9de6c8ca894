"""Who a client is: an Ed25519 key of its site, and the roster of all clients' public keys.

Sites exchange public keys among themselves; the file of the roster never comes from the server. Where a roster names no
keys nothing is signed, and the server is trusted to relay keys as they are.
"""

import base64
import binascii
import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedspallm_appfl.errors import ConfigError, SecureSumError, quoted
from fedspallm_appfl.secure.encoding import join
from fedspallm_appfl.settings import yaml_text

LEAST_CLIENTS = 3  # a sum of two tells each of the two what the other one's part was
KIND = "ed25519:"  # before a public key, as text
MAKE = "fedspallm site SITE.yaml --keys makes one, and so does Identity.make().save(FILE)"


class Identity:
    """The secret key of one client."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key

    @classmethod
    def make(cls) -> "Identity":
        """A new one, at random."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, file: Path) -> "Identity":
        """Read what `save` wrote.

        Raises:
            ConfigError: it is no such file, or others than its owner can read it.
        """
        try:
            mode = stat.S_IMODE(file.stat().st_mode)
            key = serialization.load_pem_private_key(file.read_bytes(), None)
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise ConfigError(f"the identity {file} cannot be read: {error}; {MAKE}") from error
        if mode & 0o077:
            raise ConfigError(f"only the owner may read the identity {file}, its mode is {mode:o}; chmod 600 {file}")
        if not isinstance(key, Ed25519PrivateKey):
            raise ConfigError(f"the identity {file} must be an Ed25519 key, got {type(key).__name__}")
        return cls(key)

    def save(self, file: Path) -> None:
        """Write it as PEM that only the owner can read, in a folder that is made for the owner alone if it is not there.

        Raises:
            FileExistsError: there is such a file; an identity is never overwritten.
            OSError: the file or its folder cannot be written.
        """
        encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        text = self._key.private_bytes(encoding, form, serialization.NoEncryption())
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with os.fdopen(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as out:
            out.write(text)

    @property
    def public(self) -> str:
        """The public key as it stands in a roster."""
        return KIND + base64.b64encode(self._key.public_key().public_bytes_raw()).decode()

    def sign(self, statement: bytes) -> bytes:
        """64 bytes."""
        return self._key.sign(statement)


@dataclass(frozen=True)
class Roster:
    """The clients of a federation.

    Attributes:
        clients: their names, sorted.
        keys: client -> public key, of every client or of none.

    Raises:
        SecureSumError: there are fewer than three clients.
        ConfigError: a client stands twice or has no key of its own.
    """

    clients: tuple[str, ...]
    keys: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "clients", tuple(sorted(self.clients)))
        if len({*self.clients}) < len(self.clients):
            raise ConfigError(f"a client stands in a roster once, got {', '.join(self.clients)}")
        if len(self.clients) < LEAST_CLIENTS:
            raise SecureSumError(
                f"a secure sum needs at least {LEAST_CLIENTS} clients, got {len(self.clients)}: of a sum of two, each "
                "knows the other's part; add clients"
            )
        if self.keys and {*self.keys} != {*self.clients}:
            raise ConfigError(f"a roster has a key of every client or none, got keys of {', '.join(sorted(self.keys))}")
        if len({_public(client, key).public_bytes_raw() for client, key in self.keys.items()}) < len(self.keys):
            raise ConfigError("two clients of a roster have the same key; each site makes its own")

    @classmethod
    def read(cls, file: Path) -> "Roster":
        """Read a YAML or JSON file: client -> public key.

        Raises:
            ConfigError: it is no such file.
        """
        try:
            found = yaml_text.load(file.read_text("utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"the roster {file} cannot be read: {error}") from error
        texts = isinstance(found, dict) and all(isinstance(one, str) for pair in found.items() for one in pair)
        if not texts:
            raise ConfigError(f"the roster {file} must be a mapping of client to public key, both text")
        return cls(tuple(found), found)

    @property
    def digest(self) -> bytes:
        """The fingerprint that sites compare: SHA-256 of names and keys, whatever their order and spacing in the file."""
        pairs = [part for client in self.clients for part in (client, self.keys.get(client, ""))]
        return hashlib.sha256(join("roster", *pairs)).digest()

    def verify(self, client: str, statement: bytes, signature: bytes) -> bool:
        """Whether a client has signed a statement."""
        try:
            _public(client, self.keys[client]).verify(signature, statement)
        except InvalidSignature:
            return False
        return True


def _public(client: str, text: str) -> Ed25519PublicKey:
    """A key of a roster; each has one spelling."""
    try:
        raw = base64.b64decode(text.removeprefix(KIND), validate=True)
        if text != KIND + base64.b64encode(raw).decode():
            raise ValueError("it is spelt in another way")
        return Ed25519PublicKey.from_public_bytes(raw)
    except (binascii.Error, ValueError) as error:
        raise ConfigError(
            f"the key of client {client} must be {KIND} and 44 characters, as fedspallm site SITE.yaml --keys prints it, "
            f"got {quoted(text)}"
        ) from error
