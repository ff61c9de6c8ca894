"""Windows of tokens: cut in order, drawn from (seed, client) alone, and what is wrong with a text in words."""

from types import SimpleNamespace

import pytest
import torch

from fedspallm_appfl.errors import DataError, ModelError
from fedspallm_appfl.models.text import check_vocabulary, cut_windows, draw_windows, load_tokenizer, read_text
from helpers.paths import DEMO

WINDOWS = torch.arange(60).view(20, 3)


class Letters(SimpleNamespace):
    """A tokenizer whose tokens are the characters."""

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": list(map(ord, text))}


def letters(windows):
    return ["".join(map(chr, window)) for window in windows]


@pytest.mark.parametrize(
    ("text", "length", "expected"),
    [
        ("abcdefgh", 3, ["abc", "def"]),
        ("abcdef", 3, ["abc", "def"]),
        ("abcdef", 6, ["abcdef"]),
        ("abc", 1, ["a", "b", "c"]),
        ("ab", 3, []),
    ],
)
def test_windows_cover_a_text_in_order_without_overlap(text, length, expected):
    windows = cut_windows(Letters(), text, length)
    assert letters(windows) == expected
    assert (windows.shape, windows.dtype) == ((len(expected), length), torch.int64)


def test_the_windows_of_a_real_tokenizer_spell_the_text_and_nothing_else(caplog):
    text = (DEMO / "text" / "austen" / "calib.txt").read_text("utf-8")[:5000]
    tokenizer = load_tokenizer(DEMO / "model")
    tokenizer.model_max_length = 16
    spelt = tokenizer.decode(cut_windows(tokenizer, text, 32).flatten())
    assert text.startswith(spelt)
    assert len(spelt) > len(text) - 200
    assert not caplog.records


def drawn(count=5, seed=0, client="a", windows=WINDOWS):
    return draw_windows(windows, count, seed, client).tolist()


def test_a_draw_depends_on_seed_and_client_alone():
    torch.manual_seed(1)
    first = drawn()
    state = torch.manual_seed(2).get_state()
    assert drawn() == first
    assert torch.equal(torch.get_rng_state(), state)


def test_draws_differ_between_clients_and_between_seeds():
    draws = [drawn(10, seed, client) for seed in (0, 1) for client in ("a", "b", "1", "11")]
    assert len({str(draw) for draw in draws}) == len(draws)


@pytest.mark.parametrize("count", [1, 7, 20])
def test_a_draw_takes_whole_windows_and_none_twice(count):
    rows = drawn(count)
    assert len({tuple(row) for row in rows}) == count
    assert all(row in WINDOWS.tolist() for row in rows)


def test_a_larger_draw_begins_with_the_smaller_one():
    assert drawn(12)[:5] == drawn(5)


def test_too_little_text_says_how_much_there_is_and_names_settings_that_exist():
    with pytest.raises(DataError) as caught:
        drawn(21, client="clinic")
    message = str(caught.value)
    assert message.startswith("client clinic: 21 calibration windows of 3 tokens were requested, its text has 20; ")
    assert "data.windows" in message
    assert "data.length" in message
    assert "calibration." not in message


@pytest.fixture
def folder(tmp_path):
    for name, text in (("b.txt", "second"), ("a.txt", "first"), ("c.txt", "third ü"), ("notes.md", "not this")):
        (tmp_path / name).write_text(text, "utf-8")
    return tmp_path


def test_a_folder_stands_for_its_txt_files_in_the_order_of_their_names(folder):
    assert read_text(str(folder)) == "first\nsecond\nthird ü"


def test_a_list_is_read_in_its_own_order(folder):
    paths = [str(folder / "c.txt"), str(folder / "notes.md"), str(folder / "a.txt")]
    assert read_text(paths) == "third ü\nnot this\nfirst"


def test_a_tilde_is_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert read_text("~/a.txt") == "first"
    assert read_text(["~"]).startswith("first\n")


def test_a_missing_text_is_named(tmp_path):
    with pytest.raises(DataError, match=r"the text .*none\.txt cannot be read: No such file or directory"):
        read_text(str(tmp_path / "none.txt"))


def test_a_folder_without_text_says_what_it_must_hold(tmp_path):
    (tmp_path / "data.json").touch()
    with pytest.raises(DataError, match=r"has no \.txt file; name a text file or a folder with .txt files"):
        read_text(str(tmp_path))


def test_a_text_that_is_not_utf_8_says_at_which_byte(tmp_path):
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt is not UTF-8 \(byte 2\); convert it first"):
        read_text(str(tmp_path))


def test_a_token_without_an_embedding_is_refused():
    check_vocabulary(WINDOWS, 60, "client a")
    check_vocabulary(WINDOWS[:0], 0, "client a")
    message = (
        "client a: the text has tokens from 0 to 59, the model those from 0 to 58; tokenizer and model do not belong"
    )
    with pytest.raises(DataError, match=message):
        check_vocabulary(WINDOWS, 59, "client a")
    with pytest.raises(DataError, match="the text has tokens from -1 to 58, "):
        check_vocabulary(WINDOWS - 1, 60, "client a")


@pytest.mark.parametrize("content", [None, "", "not JSON", "{}", '{"added_tokens": []}'])
def test_a_folder_without_a_tokenizer_that_can_be_read_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=f"{tmp_path.name} has no readable tokenizer: "):
        load_tokenizer(tmp_path)
