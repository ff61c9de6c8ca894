"""The site file: what an endpoint keeps to itself, and what it says where something is missing."""

import pytest

from fedspallm_appfl.errors import ConfigError
from fedspallm_appfl.site import SITE, Site, load_site


@pytest.fixture
def write(tmp_path, monkeypatch):
    def write(text):
        (tmp_path / "site.yaml").write_text(text)
        monkeypatch.setenv(SITE, str(tmp_path / "site.yaml"))

    return write


def test_paths_start_from_the_folder_of_the_file(write, tmp_path):
    (tmp_path / "model").mkdir()
    write("model: model\nclients: {a: {text: [notes, /else/b.txt]}, b: {text: c.txt}}\nstore: {folder: x, port: 1}")
    site = load_site("a")
    assert site.text == [str(tmp_path / "notes"), "/else/b.txt"]
    assert site.model == str(tmp_path / "model")
    assert site.store == {"folder": str(tmp_path / "x"), "port": 1}
    assert load_site("b").text == [str(tmp_path / "c.txt")]


def test_what_tells_which_words_occur_leaves_only_where_the_site_says_so(write):
    write("clients: {a: }")
    load_site("a").require_consent("a", {"weights", "masks", "values", "grams"})
    with pytest.raises(ConfigError, match="client a: this site does not send token_counts;"):
        load_site("a").require_consent("a", {"grams", "token_counts"})
    write("clients: {a: }\nmay_send: [grams, token_counts]")
    load_site("a").require_consent("a", {"grams", "token_counts"})
    with pytest.raises(ConfigError, match="does not send masks, values;"):
        load_site("a").require_consent("a", {"masks", "values"})
    write("clients: {a: }\nmay_send: []")
    with pytest.raises(ConfigError, match="does not send masks;"):
        load_site("a").require_consent("a", {"masks"})


def test_a_hub_name_stays_one_and_a_client_may_have_no_text(write):
    write("model: owner/name\nclients: {a: }")
    assert load_site("a") == Site("owner/name")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("clients: {b: {text: x}}", "lists b; add it under `clients`"),
        ("{}", "lists none; add it"),
        ("clients: {a: {texts: x}}", "has `text:` and nothing else"),
        ("clients: {a: SECRET}", "has `text:` and nothing else"),
        ("clients: {a: [SECRET]}", "has `text:` and nothing else"),
        ("clients: {a: {SECRET: 1}}", "has `text:` and nothing else"),
        ("clients: {a: }\nstore: [SECRET]", "hold keys themselves"),
        ("clients: {a: }\nmodel: [SECRET]", "a folder or a hub name"),
        ("clients: {a: }\nSECRET: 1", "all others are wrong"),
        ("clients: {a: }\nmay_send:", "is a list of"),
        ("clients: {a: }\nmin_tokens: few", "is a number of tokens"),
        ("clients: {a: {text: x}}\npath: y", "holds the keys clients, may_send, min_tokens, model, store"),
        ("clients: {a: }\nmay_send: text", "may_send .* is a list of weights, masks, values, grams, token_counts"),
        ("clients: {a: }\nmay_send: [text]", "may_send .* got .'text'."),
        ("[1", "cannot be read"),
        ("- a", "holds the keys"),
        ("clients: [a]", "holds the keys"),
    ],
)
def test_what_is_wrong_is_said_without_a_path(write, tmp_path, text, why):
    write(text)
    with pytest.raises(ConfigError, match=f"client a: .*({why})") as caught:
        load_site("a")
    assert str(tmp_path) not in str(caught.value) and "SECRET" not in str(caught.value)


def test_an_endpoint_without_a_site_file_says_which_line_to_add(monkeypatch, tmp_path):
    monkeypatch.delenv(SITE, raising=False)
    with pytest.raises(ConfigError, match="add to worker_init: export FEDSPALLM_SITE="):
        load_site("a")
    monkeypatch.setenv(SITE, str(tmp_path / "gone.yaml"))
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_site("a")


def test_names_of_files_are_blanked_whole(tmp_path):
    (tmp_path / "John Smith 1970.txt").touch()
    site = Site(text=[str(tmp_path)])
    assert (
        site.without_paths(f"the text {tmp_path}/John Smith 1970.txt is no UTF-8")
        == "the text <private text> is no UTF-8"
    )
    assert site.without_paths("'John Smith 1970.txt': no") == "'<private text>': no"


@pytest.mark.parametrize(
    ("words", "blanked"),
    [
        ("the text /data/notes cannot be read", "the text <private text> cannot be read"),
        ("the text '/data/notes/ann.txt': no", "the text '<private text>': no"),
        ("/data/notes2 and /data", "<private text> and /data"),
    ],
)
def test_the_path_of_the_text_is_blanked(words, blanked):
    assert Site(text=["/data/notes"]).without_paths(words) == blanked
