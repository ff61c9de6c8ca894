"""Make `public.txt`, the text that allocation takes if no other is named: prose, a dictionary, law, C and Python.

It is not used at run time. Run it where these Debian packages are unpacked below one folder (`dpkg-deb -x NAME.deb
SOURCES/NAME`), as `python -m fedspallm_appfl.allocation.make_public_text SOURCES`:

    r-cran-tokenizers   Moby-Dick, chapters 1 to 3                       public domain
    dict-devil          The Devil's Dictionary                           public domain
    miscfiles           Declaration of Independence, Constitution (US)   public domain
    zlib1g-dev          zlib.h                                           zlib licence, which stands in its first lines
    (none)              Python files of this project                     MIT

None of it overlaps the texts of the demo. The Python files are those of the day it was made: it is not made anew when they
change, as that would change targets. The pieces of all parts take turns, so that any stretch of it has all styles.
"""

import gzip
import re
import sys
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

PIECE = 3_000  # characters
PART = 42_000  # characters of each part
OWN = (
    "pruning/admm.py",
    "pruning/least_squares.py",
    "texts/files.py",
    "wire/store.py",
    "aggregation/layer_sampling.py",
)


def parts(sources: Path) -> Iterator[str]:
    """The texts, one for each style."""
    yield "\n\n".join(_packed(file) for file in sorted(sources.glob("r-cran-tokenizers/**/moby-ch*.txt.gz")))
    entries = _packed(next(sources.glob("dict-devil/**/devil.dict.dz")))
    yield entries[entries.index("ABASEMENT, n.") :]
    yield "\n\n".join(
        _packed(next(sources.glob(f"miscfiles/**/us-{name}.gz"))) for name in ("declaration", "constitution")
    )
    yield next(sources.glob("zlib1g-dev/**/zlib.h")).read_text("utf-8")
    yield "\n\n".join((Path(__file__).parents[1] / name).read_text("utf-8") for name in OWN)


def _packed(file: Path) -> str:
    return gzip.decompress(file.read_bytes()).decode("utf-8-sig")


def pieces(text: str) -> list[str]:
    """A text cut at line ends."""
    text, found, start = re.sub(r"\n{3,}", "\n\n", text.replace("\r", "")).strip(), [], 0
    while start < min(len(text), PART):
        end = text.find("\n", start + PIECE) + 1 or len(text)
        found.append(text[start:end])
        start = end
    return found


if __name__ == "__main__":
    turns = zip_longest(*map(pieces, parts(Path(sys.argv[1]))), fillvalue="")
    made = "".join(piece for turn in turns for piece in turn)
    Path(__file__).with_name("public.txt").write_text(made, "utf-8")
