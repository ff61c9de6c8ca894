"""Which units of an exchange have come from whom: a bit for each, since clients, blocks and matrices multiply."""

from collections.abc import Iterable, Iterator

Upload = tuple[str, int, str]  # client, block, unit


class Received:
    """A set of (client, block, unit) that takes a bit of each."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, str], int] = {}  # (block, unit) -> its bit
        self._bits: dict[str, int] = {}  # client -> what it has sent

    def __contains__(self, upload: Upload) -> bool:
        """Whether a client has sent a unit."""
        client, block, unit = upload
        number = self._numbers.get((block, unit))
        return number is not None and bool(self._bits.get(client, 0) >> number & 1)

    def add(self, value: Upload) -> None:
        """A client has sent a unit."""
        client, block, unit = value
        number = self._numbers.setdefault((block, unit), len(self._numbers))
        self._bits[client] = self._bits.get(client, 0) | 1 << number

    def update(self, uploads: Iterable[Upload]) -> None:
        """Clients have sent units."""
        for upload in uploads:
            self.add(upload)

    def clear(self) -> None:
        """Nothing has come."""
        self._numbers, self._bits = {}, {}

    def blocks_of(self, client: str) -> set[int]:
        """Blocks of which a client has sent something."""
        return {block for block, _ in self._sent(client)}

    def _sent(self, client: str) -> Iterator[tuple[int, str]]:
        bits = self._bits.get(client, 0)
        return (unit for unit, number in self._numbers.items() if bits >> number & 1)
