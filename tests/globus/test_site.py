"""The site file: what an endpoint keeps to itself, and what it says where something is missing."""

import stat
from dataclasses import replace

import pytest
import yaml

from fedspallm_appfl import cli
from fedspallm_appfl.errors import ConfigError, ModelError
from fedspallm_appfl.globus.site import worker
from fedspallm_appfl.globus.site.site_file import SITE, Site, load_site
from fedspallm_appfl.globus.site.worker import require_consent, same_model
from fedspallm_appfl.models.storage.checkpoint import model_hash
from fedspallm_appfl.secure.identity import Identity, Roster
from fedspallm_appfl.settings import custom_code
from fedspallm_appfl.settings.schema import ClientSettings, HashedModel
from helpers.paths import DEMO, ROOT


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
    with pytest.raises(
        ConfigError,
        match=r"client a: this site does not send token_counts; .*\(gram.first_input: private needs token_counts",
    ):
        load_site("a").require_consent("a", {"grams", "token_counts"})
    write("clients: {a: }\nmay_send: [grams, token_counts]")
    load_site("a").require_consent("a", {"grams", "token_counts"})
    with pytest.raises(ConfigError, match="does not send masks, values;"):
        load_site("a").require_consent("a", {"masks", "values"})
    write("clients: {a: }\nmay_send: []")
    with pytest.raises(ConfigError, match="does not send masks; use another algorithm, or add them to"):
        load_site("a").require_consent("a", {"masks"})


def test_a_site_knows_the_plugins_that_its_own_file_names(write):
    told = ClientSettings(client_id="a", pruner="ria")
    write("clients: {a: }")
    with pytest.raises(ConfigError, match="a pruner is one of .*, or of a plugin that `plugins` names; got 'ria'"):
        require_consent(told, load_site("a"))
    write(f"clients: {{a: }}\nplugins: [{ROOT}/examples/plugins/ria.py]\nmay_send: [masks]")
    require_consent(told, load_site("a"))


def test_a_hub_name_stays_one_and_a_client_may_have_no_text(write):
    write("model: owner/name\nclients: {a: }")
    assert load_site("a") == Site("owner/name")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("clients: {b: {text: x}}", "lists b; add it under `clients`"),
        ("{}", "lists none; add it"),
        ("clients: {a: {texts: x}}", "has only the keys `text`, `field` and `identity`"),
        ("clients: {a: SECRET}", "has only the keys `text`, `field` and `identity`"),
        ("clients: {a: [SECRET]}", "has only the keys `text`, `field` and `identity`"),
        ("clients: {a: {SECRET: 1}}", "has only the keys `text`, `field` and `identity`"),
        ("clients: {a: }\nstore: [SECRET]", "must have keys of their own"),
        ("clients: {a: }\nmodel: [SECRET]", "a folder or a hub name"),
        ("clients: {a: }\nSECRET: 1", "may have only the keys"),
        ("clients: {a: }\nmay_send:", "must be a list of"),
        ("clients: {a: }\nmin_tokens: few", "must be a number of tokens"),
        ("clients: {a: {identity: [SECRET]}}", "`identity` in the site file must be the name of a file"),
        ("clients: {a: }\nroster: [SECRET]", "audit, approved, roster in the site file are names of files"),
        ("clients: {a: }\nsecure_sums: SECRET", "secure_sums in the site file is required, or left out$"),
        ("clients: {a: }\nevaluation: SECRET", "evaluation in the site file is true or false$"),
        (
            "clients: {a: {text: x}}\npath: y",
            "may have only the keys approved, audit, clients, evaluation, may_send, min_tokens, model, plugins, roster, "
            "secure_sums, store, trust_remote_code",
        ),
        ("clients: {a: }\nmay_send: text", "may_send .* must be a list of weights, masks, values, grams, token_counts"),
        ("clients: {a: }\nmay_send: [text]", "may_send .* got .'text'.$"),
        ("clients: {a: }\nmay_send: weights", r"got 'weights'; write it in brackets, e.g. may_send: \["),
        ("clients: {a: }\nmay_send: [wieghts, mask]", "got .* did you mean weights, masks\\?"),
        (
            "clients: {a: }\nstore: {prot: SECRET}",
            "store .* only the keys bucket, endpoints, folder, host, port, tls, url, and folder",
        ),
        ("clients: {a: }\nstore: {SECRET: 7}", "store .* may have only the keys"),
        ("clients: {a: }\nstore: {connector: SECRET}", "store .* may have only the keys"),
        ("clients: {a: }\nstore: {folder: [SECRET]}", "folder must be text"),
        ("clients: {a: {text: ~nobody-SECRET/x}}", "begins with ~ and an unknown user name"),
        ("clients:\n  a:\n\ttext: SECRET", "cannot be read: invalid YAML at line 3, column 1 "),
        ("clients: {a: *SECRET}", "cannot be read: invalid YAML at line 1, column 14 "),
        ("model: x\nclients: {SECRET: , SECRET: }", "line 2, column 10 .* a key occurs twice"),
        ("clients: SECRET\0", "YAML does not allow its character 16"),
        ("[1", "cannot be read"),
        ("- a", "may have only the keys"),
        ("clients: [a]", "may have only the keys"),
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


def test_a_site_file_that_is_not_utf_8_says_where(write, tmp_path):
    write("")
    (tmp_path / "site.yaml").write_bytes(b"model: \xe4")
    with pytest.raises(ConfigError, match=r"cannot be read: it is not UTF-8 \(byte 7\)"):
        load_site("a")


def test_a_client_may_be_called_by_a_number(write):
    write("clients: {1: {text: /x}}")
    assert load_site("1").text == ["/x"]


def test_a_model_that_is_not_there_is_looked_for_where_it_was_named():
    with pytest.raises(ModelError, match="'./none' is no folder here .* check `model` in the site file"):
        same_model(HashedModel(str(DEMO / "model"), hash="x/y"), Site("./none"), "a")
    with pytest.raises(ModelError, match="'./none' is no folder here .* check `model.path`"):
        same_model(HashedModel("./none", hash="x/y"), Site(), "a")


@pytest.fixture
def checked(tmp_path, capsys):
    """What `fedspallm site` says of a file: exit code, cells of each client's row, error output."""

    def checked(text, *words):
        (tmp_path / "site.yaml").write_text(text)
        code = cli.main(["site", str(tmp_path / "site.yaml"), *words])
        out, err = capsys.readouterr()
        checked.said = " ".join(out.split())
        lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
        return code, [line for line in lines if line[0]], err

    return checked


def test_a_site_can_look_at_its_file_alone(checked, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "1.txt").write_text("word " * 400)
    (tmp_path / "notes" / "2.txt").write_text("ä")
    file = f"model: {DEMO / 'model'}\nclients: {{a: {{text: notes}}, b: }}\nmay_send: [masks]\nmin_tokens: 8192"
    code, [a, b], err = checked(file, "--length", "64")
    assert (code, err) == (0, "")
    assert a[2:4] == ["2", "2,003"] and int(a[4]) >= 400 // 64
    assert "may leave: masks; sums of losses on its own text; no upload of fewer than 8,192 tokens" in checked.said
    assert checked(f"{file}\nevaluation: false", "--length", "64")[0] == 0
    assert "may leave: masks; no upload of fewer than 8,192 tokens" in checked.said
    assert b[1].startswith("none") and b[2:5] == ["-"] * 3
    assert checked("clients: {a: {text: notes}}", "--length", "64")[1][0][4] == "-"
    assert checked("clients: {a: {text: notes}}", "--length", "64", "--model", str(DEMO / "model"))[1][0][4] == a[4]


def test_what_is_wrong_at_a_site_stands_below_with_its_real_path(checked, tmp_path):
    (tmp_path / "short.txt").write_text("word")
    (tmp_path / "latin.txt").write_bytes(b"\xe4")
    names = {"a": "text: gone.txt", "b": "text: short.txt", "c": "path: x", "d": "text: latin.txt"}
    clients = ", ".join(f"{name}: {{{own}}}" for name, own in names.items())
    code, rows, err = checked(f"clients: {{{clients}}}", "--model", str(DEMO / "model"))
    head, *problems = err.splitlines()
    assert code == 2 and len(rows) == 4 and head.endswith("site.yaml: 4 problems")
    assert [problem.strip()[2:10] for problem in problems] == [f"client {name}" for name in "abcd"]
    assert f"{tmp_path}/gone.txt cannot be read: No such file" in problems[0]
    assert f"{tmp_path}/short.txt holds no window of 2048 tokens" in problems[1]
    assert "has only the keys `text`, `field` and `identity`" in problems[2]
    assert f"{tmp_path}/latin.txt is not UTF-8" in problems[3]


@pytest.mark.parametrize(
    ("text", "words", "why"),
    [
        ("clients:", [], "it lists no client"),
        ("model: ./gone\nclients: {a: }", [], "`model` is {folder}/gone, which is not a folder"),
        ("model: empty\nclients: {a: }", [], "model: {folder}/empty holds no model: there is no config.json in it"),
        ("model: empty\nclients: {a: }", ["--model", str(DEMO / "model")], "model: {folder}/empty holds no model"),
        ("clients: {a: }", ["--model", "owner/name"], "--model owner/name is not a folder here"),
        (
            "clients:\n\ta:",
            [],
            "{folder}/site.yaml: the site file (FEDSPALLM_SITE) cannot be read: invalid YAML at line 2",
        ),
    ],
)
def test_what_is_wrong_for_all_clients_is_said_once(checked, tmp_path, text, words, why):
    (tmp_path / "empty").mkdir()
    code, _, err = checked(text, *words)
    assert code == 2 and err.count(why.format(folder=tmp_path)) == 1


def test_a_hub_name_is_not_looked_up(checked, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    code, _, _ = checked("model: owner/name\nclients: {a: }")
    assert code == 0 and "model: owner/name, not a folder here" in checked.said


def test_the_site_file_of_the_examples_is_right(capsys):
    assert cli.main(["site", str(ROOT / "examples" / "globus" / "site.yaml"), "--model", str(DEMO / "model")]) == 0


@pytest.mark.parametrize("own", ["", "trust_remote_code: true"])
def test_the_site_alone_lets_code_of_a_model_run(write, monkeypatch, own):
    """Whatever the server's configuration says."""
    monkeypatch.setattr(custom_code, "_allowed", set())
    write(f"model: {DEMO / 'model'}\nclients: {{a: {{text: x}}}}\n{own}")
    model = HashedModel("elsewhere", trust_remote_code=True, hash=model_hash(DEMO / "model"))
    made = worker._with_own(ClientSettings(client_id="a", model=model, device="cpu"), load_site("a"))
    assert custom_code.allowed(DEMO / "model") is bool(own)
    assert made.model.trust_remote_code is False


@pytest.fixture
def agreed(write, tmp_path, capsys):
    """A site whose client stands in a roster of three, and what a server tells that has the same one."""

    def agreed(more=""):
        write(f"clients: {{a: {{identity: a.key}}}}\nroster: roster.yaml\n{more}")
        assert cli.main(["site", str(tmp_path / "site.yaml"), "--keys"]) == 0
        keys = {name: Identity.make().public for name in "bc"} | yaml.safe_load(capsys.readouterr().out)
        (tmp_path / "roster.yaml").write_text(yaml.safe_dump(keys))
        roster = dict.fromkeys("abc", 1.0)
        return ClientSettings(client_id="a", algorithm="gram", secure_sums=True, roster=roster, public_keys=keys)

    return agreed


def test_a_key_is_made_once_and_only_its_owner_reads_it(agreed, write, tmp_path, capsys):
    told = agreed()
    assert stat.S_IMODE((tmp_path / "a.key").stat().st_mode) == 0o600
    assert cli.main(["site", str(tmp_path / "site.yaml"), "--keys"]) == 0
    assert capsys.readouterr().out == f"a: {told.public_keys['a']}\n"
    write("clients: {a: {identity: secret/keys/a.key}}")
    assert cli.main(["site", str(tmp_path / "site.yaml"), "--keys"]) == 0
    assert stat.S_IMODE((tmp_path / "secret" / "keys").stat().st_mode) == 0o700


def test_the_roster_is_looked_at_where_it_lies(agreed, checked, tmp_path, capsys):
    told = agreed()
    file = "clients: {a: {identity: a.key}}\nroster: roster.yaml"
    assert checked(file)[0] == 0
    code, _, _ = checked(f"{file}\nsecure_sums: required\nmay_send: [weights, grams]\nevaluation: false")
    assert code == 0 and "may leave: parts of secure sums of grams; no grams of fewer tokens than" in checked.said
    assert cli.main(["site", str(tmp_path / "site.yaml")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    fingerprint = Roster.read(tmp_path / "roster.yaml").digest.hex()
    assert f"fingerprint of the roster, to be compared with the other sites: {fingerprint}" in out
    assert "identities that fit the roster: a" in out
    (tmp_path / "roster.yaml").write_text(yaml.safe_dump(told.public_keys | {"a": Identity.make().public}))
    code, _, err = checked(file)
    assert code == 2 and f"client a: {tmp_path}/roster.yaml has another key of it than {tmp_path}/a.key" in err
    assert "client a: it has no `identity`" in checked("clients: {a: }\nroster: roster.yaml")[2]
    assert "needs `roster`" in checked("clients: {a: }\nsecure_sums: required")[2]


def test_a_site_takes_part_with_the_clients_of_its_roster_alone(agreed, tmp_path):
    told = agreed()
    require_consent(told, load_site("a"))
    model = HashedModel(str(DEMO / "model"), hash=model_hash(DEMO / "model"))
    own = replace(told, model=model, pruner="magnitude", identity="the server's", device="cpu")
    made = worker._with_own(own, load_site("a"))
    assert (made.public_keys, made.identity) == (told.public_keys, str(tmp_path / "a.key"))
    fewer, other = {"a": 1.0, "b": 1.0}, told.public_keys | {"b": Identity.make().public}
    for change, why in (
        ({"roster": fewer}, "the roster of this site has a, b, c, and the server names a, b;"),
        ({"public_keys": other}, "the server has other keys than the roster of this site, of b;"),
        ({"public_keys": {}}, "the server has other keys than the roster of this site, of a, b, c;"),
    ):
        with pytest.raises(ConfigError, match=f"client a: {why}"):
            require_consent(replace(told, **change), load_site("a"))


def test_what_is_wrong_with_keys_is_said_without_a_path(agreed, write, tmp_path):
    told = agreed()
    write("clients: {a: }")
    with pytest.raises(ConfigError, match="client a: identities need `roster` in the site file, and `identity`"):
        require_consent(told, load_site("a"))
    require_consent(replace(told, public_keys={}), load_site("a"))
    told = agreed()
    (tmp_path / "a.key").chmod(0o644)
    with pytest.raises(ConfigError, match="client a: the roster or the identity .* cannot be used") as caught:
        require_consent(told, load_site("a"))
    assert str(tmp_path) not in str(caught.value)
    (tmp_path / "a.key").unlink()
    Identity.make().save(tmp_path / "a.key")
    with pytest.raises(ConfigError, match="client a: the roster of this site has another key of it than its identity"):
        require_consent(told, load_site("a"))


def test_a_site_may_ask_for_secure_sums(agreed, write):
    told = agreed("secure_sums: required")
    require_consent(told, load_site("a"))
    for change in ({"secure_sums": False}, {"algorithm": "fedspallm"}):
        with pytest.raises(ConfigError, match="client a: this site sends nothing but parts of secure sums"):
            require_consent(replace(told, **change), load_site("a"))
    write("clients: {a: }\nsecure_sums: required")
    with pytest.raises(ConfigError, match="client a: identities need `roster`"):
        require_consent(replace(told, public_keys={}), load_site("a"))
