"""Everything that is changed at random."""

from collections.abc import Iterator

from helpers.fuzz import files, uploads
from helpers.fuzz.harness import Attempt


def attempts() -> Iterator[tuple[str, Attempt]]:
    """(name, what makes and runs a case) of each target."""
    yield from uploads.attempts()
    yield from files.attempts()
