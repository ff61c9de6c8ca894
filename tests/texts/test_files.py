"""What people have as text, and what is read of it."""

import errno
import gzip
import json
import sys
import tempfile
from pathlib import Path

import datasets
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest
import zstandard

from fedspallm_appfl.errors import DataError
from fedspallm_appfl.texts import formats
from fedspallm_appfl.texts.checks import look_at
from fedspallm_appfl.texts.content import PIECE, Content
from fedspallm_appfl.texts.files import are_tokens, text_files

RECORDS = [{"id": 1, "text": "first, ü"}, {"id": 2, "text": 'second\n"line"'}]
JOINED = 'first, ü\n\nsecond\n"line"'


def read(paths, field=None):
    return Content(paths, field).text()


@pytest.fixture
def folder(tmp_path):
    texts = {
        "b.txt": "second",
        "a.TXT": "first",
        "sub/c.md": "third ü",
        "notes.pdf": "not this",
        "sub/x.doc": "nor this",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, "utf-8")
    return tmp_path


def test_a_folder_stands_for_the_texts_in_it_in_order_and_what_is_left_out_is_named(folder):
    assert read(str(folder)) == "first\nsecond\nthird ü"
    found = text_files(str(folder))
    assert found.left_out == (str(folder / "notes.pdf"), str(folder / "sub" / "x.doc"))
    assert found.left_out_words() == ", ".join(found.left_out)


def test_a_list_is_read_in_its_own_order_whatever_the_endings(folder):
    paths = [str(folder / "sub" / "c.md"), str(folder / "notes.pdf"), str(folder / "a.TXT")]
    assert read(paths) == "third ü\nnot this\nfirst"


def test_a_pattern_stands_for_what_it_matches(folder):
    assert read(str(folder / "**" / "*.[mt]*")) == "second\nthird ü"
    (folder / "[b].txt").write_text("literal")
    assert read(str(folder / "[b].txt")) == "literal"
    with pytest.raises(DataError, match="matches no file; name a file, a folder or another pattern"):
        read(str(folder / "*.none"))


def test_a_tilde_is_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert read("~/b.txt") == "second"
    assert read(["~"]).startswith("first\n")


def test_a_missing_text_is_named(tmp_path):
    for name in ("none.txt", "none.jsonl", "none.md.gz"):
        with pytest.raises(DataError, match=rf"the text .*{name} cannot be read: No such file or directory"):
            read(str(tmp_path / name))


def test_a_folder_without_text_says_what_it_must_hold(tmp_path):
    (tmp_path / "data.pdf").touch()
    with pytest.raises(DataError, match=r"has no text; name a file, or a folder with files that end in \.txt, \.md, "):
        read(str(tmp_path))


def test_a_text_that_is_not_utf_8_says_at_which_byte(tmp_path):
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt is not UTF-8 \(byte 2\); convert it first"):
        look_at(str(tmp_path), None)
    (tmp_path / "latin.txt").write_bytes(b"\x80" * 2 * PIECE)  # no place to cut it at
    with pytest.raises(DataError, match=r"latin\.txt is not UTF-8 \(byte 0\); convert it first"):
        list(Content(str(tmp_path)).pieces())


@pytest.mark.parametrize("kind", ["a.txt", "a.txt.gz"])
def test_a_mark_of_utf_8_is_no_part_of_the_text(tmp_path, kind):
    data = "\ufeffaü\nb".encode()
    (tmp_path / kind).write_bytes(gzip.compress(data) if kind.endswith(".gz") else data)
    (tmp_path / "b.txt").write_text("\ufeff\ufeffc", "utf-8")  # the second one is a character of the text
    content = Content(str(tmp_path))
    assert content.text() == "aü\nb\n\ufeffc"
    assert content.size == len(content.text().encode())
    assert content.text(1, 3) == "ü"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("naïve".encode("utf-16"), "is UTF-16; name plain text, or convert it to UTF-8"),
        ("naïve".encode("utf-32"), "is UTF-32; "),
        (b"\xfe\xff" + "naïve".encode("utf-16-be"), "is UTF-16, big end first; "),
        (
            "ab".encode("utf-16-le"),
            r"holds a NUL byte \(byte 1\), so it is binary or UTF-16; name plain text, or convert",
        ),
        ("ü\r\n\0".encode(), r"holds a NUL byte \(byte 4\)"),
        (b"\xef\xbb\xbfab\0", r"holds a NUL byte \(byte 5\)"),
    ],
)
def test_binary_and_utf_16_are_seen_and_said(tmp_path, data, words):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(DataError, match=rf"a\.txt {words}"):
        look_at(str(tmp_path), None)


def test_any_part_of_a_text_can_be_read_with_whole_characters(tmp_path):
    (tmp_path / "1.txt").write_bytes("aü\r\nb".encode())
    (tmp_path / "2.txt").write_text("€c", "utf-8")
    content = Content(str(tmp_path))
    assert content.text() == "aü\nb\n€c"
    assert [content.text(begin, begin + 4) for begin in range(content.size)] == [
        *("aü\n", "ü\n", "\nb", "\nb\n", "\nb\n", "b\n", "\n€", "€c", "c", "c", "c")
    ]


def save(folder, kind):
    """The records as a file of a kind; returns its path."""
    file = folder / f"a{kind}"
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS)
    table = pyarrow.Table.from_pylist(RECORDS)
    if ".jsonl" in kind:
        content = lines.encode()
        packed = {".gz": gzip.compress, ".zst": zstandard.compress}.get(
            kind[-4:] if kind.endswith(".zst") else kind[-3:]
        )
        file.write_bytes(packed(content) if packed else content)
    elif kind == ".json":
        file.write_text(json.dumps(RECORDS))
    elif kind == ".csv":
        pyarrow.csv.write_csv(table, file)
    elif kind == ".parquet":
        pyarrow.parquet.write_table(table, file)
    else:
        datasets.Dataset(table).save_to_disk(file)
    return str(file)


@pytest.mark.parametrize("kind", [".jsonl", ".JSONL", ".jsonl.gz", ".jsonl.zst", ".json", ".csv", ".parquet", "-saved"])
def test_of_records_the_text_alone_is_read_and_no_copy_stays(tmp_path, monkeypatch, kind):
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "cache"))
    file = save(tmp_path, kind.lower())
    if kind.isupper():
        file = str(Path(file).rename(tmp_path / "a.JSONL"))
    assert read(file) == JOINED
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(("ending", "packed"), [(".gz", gzip.compress), (".zst", zstandard.compress)])
def test_compressed_text_needs_no_library_of_records(tmp_path, monkeypatch, ending, packed):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / f"a.txt{ending}").write_bytes(packed("first ü".encode()))
    (tmp_path / "b.md").write_text("second")
    assert read(str(tmp_path)) == "first ü\nsecond"
    (tmp_path / f"a.txt{ending}").write_bytes(packed(b"first")[:-3])
    with pytest.raises(DataError, match="cannot be unpacked"):
        read(str(tmp_path))

    def denied(raw):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(formats, "_gunzipped" if ending == ".gz" else "_unframed", denied)
    with pytest.raises(DataError, match=rf"the text .*a.txt{ending} cannot be read: Permission denied"):
        read(str(tmp_path))


def test_records_without_the_library_say_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"is not plain text, .* pip install --constraint constraints.txt '.\[data\]'"):
        read(save(tmp_path, ".jsonl"))


def test_the_column_is_named_or_clear_or_asked_for(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"note": "one", "n": 1}\n{"note": null, "n": 2}\n{"note": "two", "n": 3}\n')
    assert read(str(file)) == read(str(file), "note") == "one\n\ntwo"
    with pytest.raises(DataError, match=r"a\.jsonl has no column body; set field to one of its columns: note, n"):
        read(str(file), "body")
    with pytest.raises(DataError, match="its column n holds int, not text"):
        read(str(file), "n")
    file.write_text('{"note": "one", "title": "two"}\n')
    with pytest.raises(
        DataError, match="has 2 columns with text, and none is called text; set field to .* note, title"
    ):
        read(str(file))


def test_a_saved_data_set_with_splits_asks_for_one(tmp_path):
    part = datasets.Dataset.from_list(RECORDS)
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="has the splits train, test; name one, as .*saved/train"):
        read(str(tmp_path / "saved"))
    assert read(str(tmp_path / "saved" / "test")) == JOINED


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("hf:o/n", {"path": "o/n", "split": "train"}),
        ("hf:o/n:conf:test@v1", {"path": "o/n", "name": "conf", "split": "test", "revision": "v1"}),
        ("wikitext2", {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test"}),
    ],
)
def test_a_data_set_of_the_hub_is_asked_for_by_name(monkeypatch, name, asked):
    def load(**how):
        assert {key: how[key] for key in asked} == asked
        assert how["streaming"]
        return datasets.Dataset.from_list(RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read(name) == JOINED


def test_the_texts_of_papers_are_joined_as_their_scripts_do(monkeypatch):
    found = datasets.Dataset.from_dict({"sentence": ["a", "b"], "text": ["c", "d"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda **how: found)
    monkeypatch.setattr(formats, "C4_RECORDS", 1)
    assert (read("ptb"), read("c4"), read("wikitext2")) == ("a b", "c", "c\n\nd")


def test_a_hub_that_cannot_be_reached_is_said(monkeypatch):
    def load(**how):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match="the data set c4 cannot be read: no route; it comes from the Hugging Face hub"):
        read("c4")


def test_tokens_and_text_do_not_mix(tmp_path):
    assert are_tokens([str(tmp_path / "a.safetensors")])
    with pytest.raises(DataError, match="is tokenized and others beside it are not"):
        are_tokens([str(tmp_path / "a.safetensors"), str(tmp_path / "a.txt")])
