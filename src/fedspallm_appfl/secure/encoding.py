"""Lists of byte strings as one: each behind its length, so that no two lists are encoded alike."""

from fedspallm_appfl.errors import SecureSumError

LENGTH = 4  # bytes


def join(*parts: bytes | str | int) -> bytes:
    """Encode parts; text as UTF-8, integers in decimal."""
    encoded = [part if isinstance(part, bytes) else str(part).encode() for part in parts]
    return b"".join(len(part).to_bytes(LENGTH, "little") + part for part in encoded)


def split(data: bytes, what: str) -> list[bytes]:
    """The parts that `join` encoded.

    Args:
        data: from outside.
        what: the message and its sender, for the error.

    Raises:
        SecureSumError: it ends inside a part.
    """
    parts, start = [], 0
    while start < len(data):
        end = start + LENGTH + int.from_bytes(data[start : start + LENGTH], "little")
        if end > len(data) or start + LENGTH > len(data):
            raise SecureSumError(f"refused {what}: its {len(data)} bytes end inside a part; it was cut or changed")
        parts.append(data[start + LENGTH : end])
        start = end
    return parts
