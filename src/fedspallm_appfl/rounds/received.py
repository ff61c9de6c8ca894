"""Which units of an exchange have come from whom: a bit for each, since clients, blocks and matrices multiply."""

from collections.abc import Iterator, MutableSet

Upload = tuple[str, int, str]  # client, block, unit


class Received(MutableSet[Upload]):
    """A set of (client, block, unit) that takes a bit of each."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, str], int] = {}  # (block, unit) -> its bit
        self._bits: dict[str, int] = {}  # client -> what it has sent

    def __contains__(self, upload: object) -> bool:
        """Whether a client has sent a unit."""
        assert isinstance(upload, tuple)
        client, block, unit = upload
        number = self._numbers.get((block, unit))
        return number is not None and bool(self._bits.get(client, 0) >> number & 1)

    def __iter__(self) -> Iterator[Upload]:
        """What has come, client by client."""
        for client in self._bits:
            yield from ((client, block, unit) for block, unit in self._sent(client))

    def __len__(self) -> int:
        """Units that have come of all clients."""
        return sum(bits.bit_count() for bits in self._bits.values())

    def add(self, value: Upload) -> None:
        """A client has sent a unit."""
        client, block, unit = value
        number = self._numbers.setdefault((block, unit), len(self._numbers))
        self._bits[client] = self._bits.get(client, 0) | 1 << number

    def discard(self, value: Upload) -> None:
        """A client has not sent a unit."""
        if value in self:
            self._bits[value[0]] &= ~(1 << self._numbers[value[1], value[2]])

    def clear(self) -> None:
        """Nothing has come."""
        self._numbers, self._bits = {}, {}

    def blocks_of(self, client: str) -> set[int]:
        """Blocks of which a client has sent something."""
        return {block for block, _ in self._sent(client)}

    def _sent(self, client: str) -> Iterator[tuple[int, str]]:
        bits = self._bits.get(client, 0)
        return (unit for unit, number in self._numbers.items() if bits >> number & 1)
