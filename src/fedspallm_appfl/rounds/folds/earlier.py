"""Sums of earlier rounds, which `fold: cumulative` adds to."""

from pathlib import Path

from fedspallm_appfl.errors import UpdateError
from fedspallm_appfl.rounds.folds.context import Context
from fedspallm_appfl.wire.store import SumsT, load_sums, save_sums


def with_earlier_rounds(context: Context, sums: SumsT, block: int, unit: str) -> SumsT:
    """Sums of a matrix with those of earlier rounds added, which are kept in a file.

    Raises:
        UpdateError: the sums leave their range.
    """
    name = Path("sums") / f"{block:04d}-{unit}.safetensors"
    if (context.folder / name).is_file():
        try:
            sums.merge(load_sums(type(sums), context.folder / name, context.device))
        except ValueError as error:
            raise UpdateError(f"block {block}, {unit}: the sums of all rounds: {error}") from error
    save_sums(sums, context.making(block) / name)
    return sums
