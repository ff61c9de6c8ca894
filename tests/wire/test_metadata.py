"""What travels beside a payload is read, or refused with the client's name."""

import json
import math

import pytest

from fedspallm_appfl.errors import QUOTED, UpdateError, quoted
from fedspallm_appfl.wire.metadata import read_metadata

HONEST = {"_chunk_idx": 1, "_total_chunks": 2, "samples": 6, "seconds": 0.5, "host": "node1"}
DIGITS = 10**5000  # Python refuses to write it as decimal digits


def deep(levels):
    return json.loads("[" * levels + "]" * levels)


def test_honest_metadata_is_read():
    notes = {"q": {"damping": 0.01, "attempts": 2}}
    read = read_metadata(HONEST | {"notes": json.dumps(notes)}, "client ann")
    assert (read.number, read.total, read.samples, read.seconds, read.host) == (1, 2, 6, 0.5, "node1")
    assert read.notes == notes and read.is_last
    assert not read_metadata(HONEST | {"_chunk_idx": 0}, "client ann").is_last
    assert read_metadata(HONEST | {"host": "\x1b[2J|a b"}, "client ann").host == "2Jab"
    assert read_metadata(HONEST | {"_client_ids": ["ann"]}, "client ann") == read_metadata(HONEST, "client ann")


@pytest.mark.parametrize("key", ["_chunk_idx", "_total_chunks", "samples", "seconds", "notes"])
@pytest.mark.parametrize("wrong", range(14))
def test_wrong_types_and_ranges_are_refused_by_name(key, wrong):
    value = [
        *(
            "6",
            True,
            -1,
            math.nan,
            math.inf,
            -math.inf,
            2**70,
            DIGITS,
            -DIGITS,
            [1],
            {"a": 1},
            b"1",
            object(),
            deep(500),
        )
    ][wrong]
    with pytest.raises(UpdateError, match="refused the metadata of client ann: .*, got ") as refusal:
        read_metadata(HONEST | {key: value}, "client ann")
    assert len(str(refusal.value)) < 2 * QUOTED


@pytest.mark.parametrize("key", ["_chunk_idx", "_total_chunks", "samples", "seconds"])
def test_nothing_may_be_missing(key):
    with pytest.raises(UpdateError, match=f"client ann: {key} is .*, got None"):
        read_metadata({name: value for name, value in HONEST.items() if name != key}, "client ann")


@pytest.mark.parametrize(
    "notes",
    [
        "[1]",
        "{",
        '{"q": 1}',
        '{"q": {"damping": "x"}}',
        '{"q": {"damping": NaN}}',
        '{"q": {"damping": true}}',
        '{"q": {"n": 1' + "0" * 4999 + "}}",
        '{"q": {"n": 1' + "0" * 300 + "}}",
        '{"\\u001b": {"n": 1}}',
        "[" * 100_000,
        '{"q":' * 50_000,
        '{"' + "q" * 1000 + '": {}}',
    ],
    ids=range(12),
)
def test_notes_are_numbers_by_linear_and_name(notes):
    with pytest.raises(UpdateError, match="client ann: notes is JSON of linear, name and a finite number, got "):
        read_metadata(HONEST | {"notes": notes}, "client ann")


@pytest.mark.parametrize(
    "metadata", [None, [], "x", 1, HONEST | {"self": 1}, HONEST | {1: 1}, HONEST | {"x" * 9999: 1}]
)
def test_other_things_and_other_keys_are_refused(metadata):
    with pytest.raises(UpdateError, match="refused the metadata of client ann: ") as refusal:
        read_metadata(metadata, "client ann")
    assert len(str(refusal.value)) < 2 * QUOTED


class Loud:
    def __repr__(self):
        raise AssertionError("what came from outside was asked for its words")


def test_quotes_are_short_and_ask_nobody():
    long = [
        "x" * 10**6,
        list(range(10**5)),
        {str(n): n for n in range(10**4)},
        DIGITS,
        deep(900),
        b"x" * 10**6,
        Loud(),
        [Loud()],
    ]
    for value in (*long, Loud(), [Loud()]):
        assert len(quoted(value)) <= QUOTED
    assert [quoted(value) for value in ("a", 1, 0.5, None, True, ["a", 1], {"a": None})] == [
        "'a'", "1", "0.5", "None", "True", "['a', 1]", "{'a': None}"
    ]  # fmt: skip
