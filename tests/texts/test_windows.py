"""Windows of tokens: cut in order, drawn from (seed, client) alone, and what is wrong with a text in words."""

from types import SimpleNamespace

import pytest
import torch

from fedspallm_appfl.errors import DataError, ModelError
from fedspallm_appfl.texts import content, drawing, windows
from fedspallm_appfl.texts.checks import check_vocabulary
from fedspallm_appfl.texts.drawing import draw, draw_windows
from fedspallm_appfl.texts.tokenizer import load_tokenizer
from fedspallm_appfl.texts.windows import Cut, about_how_many, forget_windows, windows_of
from helpers.paths import DEMO

WINDOWS = torch.arange(60).view(20, 3)
BEGIN = 1  # the begin-of-sequence token of `Letters`; no text holds it


class Letters(SimpleNamespace):
    """A tokenizer whose tokens are the characters."""

    all_special_ids = ()
    unk_token_id = None

    def __call__(self, text, add_special_tokens=True, **how):
        self.seen = getattr(self, "seen", 0) + len(text)
        return {"input_ids": [BEGIN] * add_special_tokens + list(map(ord, text))}

    def convert_ids_to_tokens(self, ids):
        return [chr(one) for one in ids]


def letters(found):
    return ["".join(map(chr, window)) for window in found]


@pytest.fixture
def cut(tmp_path):
    def cut(text, length, bos="never", most=None):
        (tmp_path / "a.txt").write_text(text, "utf-8")
        forget_windows()
        return windows_of(str(tmp_path / "a.txt"), Cut(length, bos), Letters(), most)

    return cut


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
def test_windows_cover_a_text_in_order_without_overlap(cut, text, length, expected):
    found = cut(text, length)
    assert letters(found) == expected
    assert (found.shape, found.dtype) == ((len(expected), length), torch.int64)


def test_a_window_begins_as_the_tokenizer_says_or_the_text_as_a_whole_does_or_none(cut):
    assert letters(cut("abcdefgh", 3, "auto")) == ["\1ab", "\1de"]
    assert letters(cut("abcdefgh", 3, "first")) == ["\1ab", "cde", "fgh"]
    assert letters(cut("abcdefgh", 3, "never")) == ["abc", "def"]


def test_the_windows_of_a_real_tokenizer_spell_the_text_and_nothing_else(caplog, tmp_path):
    text = (DEMO / "text" / "austen" / "calib.txt").read_text("utf-8")[:5000]
    (tmp_path / "a.txt").write_text(text, "utf-8")
    tokenizer = load_tokenizer(DEMO / "model")
    spelt = tokenizer.decode(windows_of(str(tmp_path / "a.txt"), Cut(32), tokenizer).flatten())
    assert text.startswith(spelt)
    assert len(spelt) > len(text) - 200
    assert not caplog.records


LINES = "".join(f"{number:04}: " + "wörd " * (number % 7) + "end\n" for number in range(400))


@pytest.fixture
def large(monkeypatch, tmp_path):
    """A text that counts as large, in two files, and its tokenizer."""
    monkeypatch.setattr(windows, "WHOLE", 1000)
    monkeypatch.setattr(drawing, "WHOLE", 1000)
    monkeypatch.setattr(content, "PIECE", 500)
    monkeypatch.setattr(drawing, "LEAST_CELL", 1)
    monkeypatch.setattr(windows, "SAMPLE", 100)
    forget_windows()
    (tmp_path / "1.txt").write_text(LINES[:5000], "utf-8")
    (tmp_path / "2.txt").write_text(LINES[5000:], "utf-8")
    return str(tmp_path), Letters()


def test_a_large_text_gives_the_windows_that_it_gives_as_a_whole(large, cut):
    folder, tokenizer = large
    whole = LINES[:5000] + "\n" + LINES[5000:]
    assert letters(windows_of(folder, Cut(10, "never"), tokenizer)) == letters(
        torch.tensor(list(map(ord, whole[: len(whole) // 10 * 10]))).view(-1, 10)
    )


def test_of_a_large_text_no_more_is_tokenized_than_the_first_windows_take(large):
    folder, tokenizer = large
    assert letters(windows_of(folder, Cut(10, "never"), tokenizer, most=3)) == [
        LINES[at : at + 10] for at in (0, 10, 20)
    ]
    assert tokenizer.seen < 600


def test_windows_of_a_large_text_lie_in_it_apart_from_each_other(large):
    folder, tokenizer = large
    found = letters(draw(folder, Cut(20, "never"), tokenizer, 25, 0, "a"))
    whole = LINES[:5000] + "\n" + LINES[5000:]
    places = sorted(whole.index(window) for window in found if whole.count(window) == 1)
    assert all(window in whole for window in found)
    assert len(places) > 15
    assert all(after - before >= 20 for before, after in zip(places, places[1:], strict=False))
    assert tokenizer.seen < 0.7 * len(whole)


def test_a_draw_from_a_large_text_depends_on_seed_client_and_text_alone(large):
    folder, _ = large
    first = draw(folder, Cut(20), Letters(), 5, 0, "a").tolist()
    torch.manual_seed(7)
    assert draw(folder, Cut(20), Letters(), 5, 0, "a").tolist() == first
    assert draw(folder, Cut(20), Letters(), 5, 1, "a").tolist() != first
    assert draw(folder, Cut(20), Letters(), 5, 0, "b").tolist() != first
    assert draw(folder, Cut(20), Letters(), 5, 0, "a", spare=3).tolist()[:5] == first
    assert len(draw(folder, Cut(20), Letters(), 5, 0, "a", spare=3)) == 8


def test_every_place_of_a_large_text_is_equally_likely(large, tmp_path):
    """Of 500 draws, each tenth of the text but the two ends gets as many as the others, give or take four sigma."""
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 4000)))  # each letter tells its place
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text(text, "utf-8")
    places = torch.cat(
        [draw(str(tmp_path / "letters"), Cut(10, "never"), Letters(), 2, seed, "a")[:, 0] for seed in range(500)]
    )
    tenths = torch.bincount((places - 0x4E00) // 400, minlength=10)[1:9].double()
    assert (tenths - tenths.mean()).abs().max() < 4 * tenths.mean().sqrt()


def test_a_large_text_with_too_few_windows_says_how_many_it_has(large):
    folder, tokenizer = large
    there = len(windows_of(folder, Cut(50), tokenizer))
    assert len(draw(folder, Cut(50), tokenizer, there, 0, "a")) == there
    with pytest.raises(DataError, match=f"client a: {there + 1} calibration .* requested, its text has {there}; "):
        draw(folder, Cut(50), tokenizer, there + 1, 0, "a")
    assert abs(about_how_many(folder, Cut(50), tokenizer) - there) < 0.1 * there


def test_a_check_and_the_run_after_it_tokenize_once_unless_the_text_changes(tmp_path):
    file, tokenizer = tmp_path / "a.txt", Letters()
    file.write_text("abcdefghij")
    first = draw(str(file), Cut(2), tokenizer, 3, 0, "a")
    seen = tokenizer.seen
    assert torch.equal(draw(str(file), Cut(2), tokenizer, 3, 0, "a"), first)
    draw(str(file), Cut(2), tokenizer, 3, 0, "another client")
    assert tokenizer.seen == seen
    file.write_text("klmnopqrstuv")
    assert not torch.equal(draw(str(file), Cut(2), tokenizer, 3, 0, "a"), first)


def drawn(count=5, seed=0, client="a", found=WINDOWS):
    return draw_windows(found, count, seed, client).tolist()


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
    assert draw_windows(WINDOWS, 5, 0, "a", spare=7).tolist() == drawn(12)
    assert len(draw_windows(WINDOWS, 5, 0, "a", spare=70)) == 20


def test_too_little_text_says_how_much_there_is_and_names_settings_that_exist():
    with pytest.raises(DataError) as caught:
        drawn(21, client="clinic")
    message = str(caught.value)
    assert message.startswith("client clinic: 21 calibration windows of 3 tokens were requested, its text has 20; ")
    assert "data.windows" in message
    assert "data.length" in message
    assert "calibration." not in message


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
