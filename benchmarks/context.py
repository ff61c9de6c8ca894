"""What every benchmark is told."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Context:
    """How to run.

    Attributes:
        quick: small sizes, to see that everything works; the ratios mean little.
        out: folder for what is kept, such as plots.
        scratch: folder for models and the like, removed afterwards.
    """

    quick: bool
    out: Path
    scratch: Path
