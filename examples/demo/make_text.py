"""Make the demo's text: five visibly different domains, all in the public domain.

Run it where these packages are unpacked below one folder (their names are the folder's children):

    Debian   bible-kjv and bible-kjv-text (installed: the `bible` program prints the verses),
             r-cran-janeaustenr, sqlite3-doc, dict-jargon        dpkg-deb -x NAME.deb SOURCES/NAME
    npm      better-sqlite3, for deps/sqlite3/sqlite3.c            tar -x -C SOURCES/better-sqlite3

    python examples/demo/make_text.py SOURCES WORK examples/demo/text

It writes `WORK/train/DOMAIN.txt`, all that `train_model.py` may see, and `TEXT/DOMAIN/{calib,test}.txt`, evenly spaced
pieces that are held out of training.  The three never overlap.
"""

import argparse
import gzip
import html
import re
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

PIECE = 8_000  # characters: long enough that a window of 256 tokens rarely crosses a seam
HELD_OUT = 14  # pieces: 6 for the test, 8 to calibrate
TEST_PIECES = 6
TRAIN_LIMIT = 4_600_000  # characters of a domain, so that no domain drowns the others


def bible(_: Path) -> str:
    """King James Version, printed verse by verse by the `bible` program."""
    verses = subprocess.run(["bible", "-f", "gen1:1-rev22:21"], capture_output=True, text=True, check=True)
    return re.sub(r"(?m)^\S+ ", "", verses.stdout)


def austen(sources: Path) -> str:
    """Six novels from the lazy-load database of an R package: each value is a zlib block of serialised strings."""
    data = next(sources.glob("r-cran-janeaustenr/**/data/Rdata.rdb")).read_bytes()
    return "\n".join(line for block in _zlib_blocks(data) for line in _r_strings(block))


def _zlib_blocks(data: bytes) -> Iterator[bytes]:
    """Values of an R lazy-load database: four bytes with the unpacked length, then a zlib stream."""
    at = 0
    while at < len(data):
        unpacker = zlib.decompressobj()
        block = unpacker.decompress(data[at + 4 :])
        yield block
        at = len(data) - len(unpacker.unused_data)


def _r_strings(block: bytes) -> Iterator[str]:
    """Strings of one serialised R character vector: header, then flags, length and bytes of each."""
    at = block.index(b"UTF-8") + 5 + 8
    while at + 8 <= len(block):
        flags, length = struct.unpack(">ii", block[at : at + 8])
        if flags & 0xFF != 9:  # CHARSXP: anything else is the end of the vector
            return
        yield block[at + 8 : at + 8 + max(length, 0)].decode("utf-8")
        at += 8 + max(length, 0)


def sqldocs(sources: Path) -> str:
    """The SQLite manual, prose and lists of the HTML pages without their change logs."""
    pages = sorted(next(sources.glob("sqlite3-doc/**/lang_select.html")).parent.glob("*.html"))
    skip = re.compile(r"releaselog|chronology|changes|news|sitemap|doclist|keyword_index|requirements|toc_db|cves")
    return "\n\n".join(_plain(page.read_text("utf-8", "replace")) for page in pages if not skip.search(page.name))


def _plain(page: str) -> str:
    body = re.sub(r"(?s)<(script|style|svg|button|head)\b.*?</\1>", " ", page)
    body = re.sub(r'(?s)<div class="?(nosearch|fancy_toc|menu).*?</div>', " ", body)
    blocks = re.sub(r"(?i)</?(p|div|h\d|li|ul|ol|pre|tr|table|dt|dd|br|blockquote)\b[^>]*>", "\n", body)
    text = html.unescape(re.sub(r"<[^>]+>", "", blocks))
    kept = [line.rstrip() for line in text.splitlines() if len(line.strip()) > 25]
    return "\n".join(kept[3:])


def csource(sources: Path) -> str:
    """The C source of SQLite, from its one-file amalgamation."""
    return next(sources.glob("better-sqlite3/**/sqlite3.c")).read_text("utf-8")


def jargon(sources: Path) -> str:
    """The Jargon File, a dictionary of hacker slang."""
    packed = next(sources.glob("dict-jargon/**/jargon.dict.dz")).read_bytes()
    return gzip.decompress(packed).decode("utf-8")


DOMAINS: dict[str, Callable[[Path], str]] = {
    "austen": austen,
    "bible": bible,
    "csource": csource,
    "jargon": jargon,
    "sqldocs": sqldocs,
}


def split(text: str) -> tuple[str, str, str]:
    """Cut into pieces at line ends; hold out evenly spaced ones. Returns (train, calib, test)."""
    pieces, start = [], 0
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    while start < len(text):
        end = text.find("\n", start + PIECE) + 1 or len(text)
        pieces.append(text[start:end])
        start = end
    pieces = pieces[: TRAIN_LIMIT // PIECE]
    held = [round((i + 0.5) * len(pieces) / HELD_OUT) for i in range(HELD_OUT)]
    test = held[1 :: HELD_OUT // TEST_PIECES][:TEST_PIECES]
    calib = [i for i in held if i not in test]
    train = [i for i in range(len(pieces)) if i not in held]
    return tuple("".join(pieces[i] for i in part) for part in (train, calib, test))


def main() -> None:
    """Write the train, calibration and test text of every domain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, help="folder that holds the unpacked packages")
    parser.add_argument("work", type=Path, help="folder for the training text (not part of the repository)")
    parser.add_argument("text", type=Path, help="folder for the calibration and test text")
    args = parser.parse_args()
    (args.work / "train").mkdir(parents=True, exist_ok=True)
    for name, read in DOMAINS.items():
        train, calib, test = split(read(args.sources))
        (args.text / name).mkdir(parents=True, exist_ok=True)
        (args.work / "train" / f"{name}.txt").write_text(train, "utf-8")
        (args.text / name / "calib.txt").write_text(calib, "utf-8")
        (args.text / name / "test.txt").write_text(test, "utf-8")
        print(f"{name:8} train {len(train):9,}  calib {len(calib):7,}  test {len(test):7,} characters")


if __name__ == "__main__":
    main()
