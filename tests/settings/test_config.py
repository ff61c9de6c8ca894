"""Reading a configuration: YAML as people write it, overrides, references, and every problem at once."""

import re
from dataclasses import fields

import pytest
import yaml

from fedspallm_appfl.errors import ConfigError
from fedspallm_appfl.rounds.participants import roster
from fedspallm_appfl.settings.presets import PRESETS
from fedspallm_appfl.settings.reading import load_config, read_config, to_yaml
from fedspallm_appfl.settings.rules import wrong_values
from fedspallm_appfl.settings.schema import Config, plain
from fedspallm_appfl.tensors.target import parse_target
from helpers.paths import ROOT


@pytest.fixture
def read(tmp_path):
    """Load a configuration that stands in a text."""

    def read(text, *overrides):
        file = tmp_path / "experiment.yaml"
        file.write_text(text, "utf-8")
        return load_config(file, overrides)

    return read


@pytest.fixture
def value(read):
    """Load a configuration and give the value at a dotted key."""

    def value(key, text, *overrides):
        found, problems = read(text, *overrides)
        assert problems == []
        for part in key.split("."):
            found = found[int(part)] if part.isdecimal() else getattr(found, part)
        return found

    return value


def test_an_empty_group_takes_its_defaults(read):
    config, problems = read("run_dir: runs/x\nmodel:\nserver_configs:\nclients:\nevaluation: {texts: }\n")
    assert (config, problems) == (Config(run_dir="runs/x"), [])


WRONG_KEYS = """
run_dirr: runs/x
model: {pth: a}
server_configs: {aggregator_kwargs: {wieghts: equal}, scheduler_kwargs: {zzz: 1}}
client_configs: {train_configs: {sparsty: 0.5}, data: {window: 1}}
clients: [{client_id: a}, {client: b, comm_configs: {max_mesage_bytes: 1}}]
evaluation: {text: {}}
1: one
"""


@pytest.mark.parametrize(
    "problem",
    [
        "run_dirr: unknown key; did you mean run_dir?",
        "model.pth: unknown key; did you mean path?",
        "server_configs.aggregator_kwargs.wieghts: unknown key; did you mean weights?",
        "server_configs.scheduler_kwargs.zzz: unknown key; valid here are max_open_blocks",
        "client_configs.train_configs.sparsty: unknown key; did you mean sparsity?",
        "client_configs.data.window: unknown key; did you mean windows?",
        "clients.1.client: unknown key; did you mean client_id?",
        "clients.1.comm_configs.max_mesage_bytes: unknown key; did you mean max_message_bytes?",
        "evaluation.text: unknown key; did you mean texts?",
        "1: unknown key; valid here are "
        "algorithm, allocation, checkpoint_every, client_configs, clients, evaluation, gram, model, plugins, preset, "
        "prune, recovery, run_dir, seed, server_configs, tracking, workers",
    ],
)
def test_every_wrong_key_is_reported_with_the_nearest_valid_one(read, problem):
    assert problem in read(WRONG_KEYS)[1]


WRONG_TYPES = """
run_dir: [runs]
seed: 1.5
model: llama
server_configs: {num_clients: yes, num_global_epochs: two}
client_configs: {train_configs: {damping: small, threads: many, pruner: true, refit: 1, sparsity: 1.5}}
clients: [{client_id: {a: b}}]
evaluation: {texts: [a, b], compare: fedavg, windows: "4"}
"""


@pytest.mark.parametrize(
    "problem",
    [
        "run_dir: expected str, got ['runs']",
        "seed: expected int, got 1.5",
        "model: expected keys and values, got 'llama'",
        "server_configs.num_clients: expected int, got True",
        "server_configs.num_global_epochs: expected int, got 'two'",
        "client_configs.train_configs.damping: expected float, got 'small'",
        "client_configs.train_configs.threads: expected int, got 'many'",
        "client_configs.train_configs.pruner: expected str, got True",
        "client_configs.train_configs.refit: expected true or false, got 1",
        "client_configs.train_configs.sparsity: sparsity is a share in [0, 1), got 1.5; 50 % is written 0.5",
        "clients.0.client_id: expected str, got {'a': 'b'}",
        "evaluation.texts: expected keys and values, got ['a', 'b']",
        "evaluation.compare: expected a list, got 'fedavg'",
        "evaluation.windows: expected int, got '4'",
    ],
)
def test_every_value_of_a_wrong_type_is_reported_and_leaves_the_default(read, problem):
    config, problems = read(WRONG_TYPES)
    assert problem in problems
    assert (config.run_dir, config.seed, config.evaluation.windows) == ("", 0, None)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("clients: {a: b}", "clients: expected a list, got {'a': 'b'}"),
        ("clients: [a]", "clients.0: a client is a group of keys such as client_id and data, got 'a'"),
        ("clients: [{data: 5}]", "clients.0.data: expected keys and values, got 5"),
        ("clients: [{data: [5]}]", "clients.0.data: expected keys and values, got [5]"),
        ("client_configs: {data: {batch: 2}}\nclients: [{data: [5]}]", "clients.0.data: expected keys and values"),
        ("clients: [a, {dta: {}}]", "clients.1.dta: unknown key; did you mean data?"),
    ],
)
def test_a_client_of_a_wrong_shape_is_reported_at_its_place(read, text, problem):
    assert any(found.startswith(problem) for found in read(text)[1])


def test_a_wrong_key_that_all_clients_share_is_reported_once(read):
    _, problems = read("client_configs: {data: {window: 1}}\nclients: [{client_id: a}, {client_id: b}]")
    assert problems == ["client_configs.data.window: unknown key; did you mean windows?"]


SPARSITY = "client_configs.train_configs.sparsity"


@pytest.mark.parametrize("written", ["2:4", "4:8", "1:2", "'2:4'"])
def test_an_nm_pattern_is_text_in_a_file_and_as_an_override(value, written):
    expected = parse_target(written.strip("'"))
    assert value(SPARSITY, f"client_configs: {{train_configs: {{sparsity: {written} }}}}") == expected
    assert value(SPARSITY, "run_dir: x", f"{SPARSITY}={written}") == expected


@pytest.mark.parametrize(
    ("written", "expected"), [("1e-3", 1e-3), ("1E+2", 100.0), (".5", 0.5), ("2.", 2.0), ("1.5e-3", 1.5e-3), ("3", 3.0)]
)
def test_a_number_with_a_point_or_an_exponent_is_a_float(value, written, expected):
    key = "client_configs.train_configs.damping"
    found = value(key, f"client_configs: {{train_configs: {{damping: {written}}}}}")
    assert (found, type(found)) == (expected, float)
    assert value(key, "run_dir: x", f"{key}={written}") == expected


@pytest.mark.parametrize(("written", "expected"), [("12", 12), ("+7", 7), ("010", 10), ("08", 8), ("0", 0)])
def test_digits_are_decimal_whatever_they_begin_with(value, written, expected):
    assert value("seed", f"seed: {written}") == expected


@pytest.mark.parametrize("name", ["2024-01-31", "12:30:45", "1_000", "0x1F", "a: b"])
def test_what_is_no_number_of_yaml_1_2_stays_text(value, name):
    assert value("run_dir", f"run_dir: {name!r}") == name
    if ": " not in name:
        assert value("run_dir", f"run_dir: {name}") == name


@pytest.mark.parametrize("text", ["run_dir: a\nrun_dir: b", "model: {path: a, path: b}", "clients: [{data: , data: }]"])
def test_a_key_that_stands_twice_is_refused(read, text):
    with pytest.raises(ConfigError, match="the key '(run_dir|path|data)' stands twice"):
        read(text)


@pytest.mark.parametrize("text", ["", "# all of it is a comment", "- a\n- b", "hello", "'a: b'", "5", "null"])
def test_a_file_that_holds_no_keys_and_values_says_what_it_must_hold(read, text):
    with pytest.raises(ConfigError, match="experiment.yaml must hold keys and values, such as `run_dir: runs/first`"):
        read(text)


@pytest.mark.parametrize("text", ["model: [", "a: b: c", "\tmodel: a", "? [1]\n: 2"])
def test_a_file_that_is_no_yaml_says_where(read, text):
    with pytest.raises(ConfigError, match="(?s)experiment.yaml is not valid YAML: .*line [12], column"):
        read(text)


DOUBLED = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x'}]\n" for i in range(9))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (DOUBLED, "more than 200000 values, with aliases followed"),
        ("a: " + "[" * 20_000, "more than 50 groups in each other"),
        ("a: " + "{b: " * 60, "more than 50 groups in each other"),
        ("seed: " + "1" * 5000, "a number cannot be read"),
        ("seed: !!float x", "a number cannot be read"),
        ("a: &a [*a]", "an alias stands for a group that it lies in"),
    ],
)
def test_a_file_that_would_exhaust_memory_or_stack_is_refused(read, text, says):
    with pytest.raises(ConfigError, match=says):
        read(text)


def test_a_file_that_is_not_utf_8_is_refused(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("run_dir: é".encode("latin-1"))
    with pytest.raises(ConfigError, match="latin.yaml .*utf-8"):
        load_config(tmp_path / "latin.yaml")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="none.yaml cannot be read: No such file or directory"):
        load_config(tmp_path / "none.yaml")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)


TWO = """
run_dir: runs/two
client_configs:
  train_configs: {pruner: wanda, damping: 0.5}
  data: {windows: 7, batch: 3}
clients:
  - client_id: a
    data: {text: a.txt, windows: 9}
  - client_id: b
    data: {text: [b.txt, more]}
    train_configs: {resource_share: 0.5}
evaluation: {texts: {news: news.txt}, compare: [standalone]}
"""


def test_each_client_is_merged_over_what_all_share(read):
    a, b = read(TWO)[0].clients
    assert (a.data.text, a.data.windows, a.data.batch, a.data.length) == ("a.txt", 9, 3, 2048)
    assert (b.data.text, b.data.windows, b.data.batch) == (["b.txt", "more"], 7, 3)
    assert [client.train_configs.pruner for client in (a, b)] == ["wanda", "wanda"]
    assert [client.train_configs.resource_share for client in (a, b)] == [1.0, 0.5]
    assert roster(read(TWO)[0]) == {"a": 1.0, "b": 0.5}


def test_a_group_that_a_client_leaves_empty_keeps_what_all_share(value):
    text = "client_configs: {train_configs: {pruner: wanda}}\nclients: [{client_id: a, train_configs: }]"
    assert value("clients.0.train_configs.pruner", text) == "wanda"


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("run_dir=runs/a=b", "run_dir", "runs/a=b"),
        ("seed=3", "seed", 3),
        ("clients.0.data.text=other.txt", "clients.0.data.text", "other.txt"),
        ("clients.1.data.text=[c.txt, d.txt]", "clients.1.data.text", ["c.txt", "d.txt"]),
        ("clients.1={client_id: c}", "clients.1.client_id", "c"),
        ("client_configs.data.batch=5", "clients.0.data.batch", 5),
        ("client_configs.data.windows=5", "clients.0.data.windows", 9),
        ("client_configs.train_configs.threads=4", "clients.1.train_configs.threads", 4),
        ("evaluation.compare=[fedavg, standalone]", "evaluation.compare", ["fedavg", "standalone"]),
        ("evaluation.compare=[]", "evaluation.compare", []),
        ("evaluation.texts.law=law.txt", "evaluation.texts", {"news": "news.txt", "law": "law.txt"}),
        ("evaluation.texts={law: law.txt}", "evaluation.texts", {"news": "news.txt", "law": "law.txt"}),
        ("evaluation.windows=null", "evaluation.windows", None),
        ("clients=[{client_id: only}]", "clients.0.client_id", "only"),
    ],
)
def test_an_override_replaces_one_value(value, override, key, expected):
    assert value(key, TWO, override) == expected


def test_the_last_of_several_overrides_wins(value):
    assert value("seed", TWO, "seed=1", "run_dir=x", "seed=2") == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run_dir", "an override is key=value, got 'run_dir'; e.g. client_configs.train_configs.sparsity=0.7"),
        ("=3", "an override is key=value, got '=3'"),
        (
            "clients.7.data.text=x",
            "the override 'clients.7.data.text=x' cannot be applied: there is no such entry in the list",
        ),
        ("clients.b.data.text=x", "the override 'clients.b.data.text=x' cannot be applied: .*'b'"),
        ("run_dir=[", r"the override 'run_dir=\[' cannot be applied"),
        ("run_dir=${", r"the override 'run_dir=\$\{' cannot be applied"),
    ],
)
def test_an_override_that_cannot_be_applied_is_named(read, override, message):
    with pytest.raises(ConfigError, match=message):
        read(TWO, override)


def test_a_misspelt_override_is_an_unknown_key(read):
    assert read(TWO, "clients.0.data.txt=x")[1] == ["clients.0.data.txt: unknown key; did you mean text?"]


def test_here_is_the_folder_of_the_file_and_not_the_working_directory(value, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    text = 'run_dir: runs/x\nclients: [{client_id: a, data: {text: "${here:../my texts/a.txt}"}}]'
    assert value("clients.0.data.text", text) == str(tmp_path.parent / "my texts" / "a.txt")
    assert value("run_dir", text) == "runs/x"
    assert value("model.path", text, "model.path=${here:model}") == str(tmp_path / "model")


def test_here_belongs_to_the_file_that_is_read(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "c.yaml").write_text("run_dir: ${here:run}")
    configs = [load_config(tmp_path / name / "c.yaml")[0] for name in ("one", "two")]
    assert [config.run_dir for config in configs] == [str(tmp_path / name / "run") for name in ("one", "two")]


def test_a_value_may_refer_to_another(value):
    assert value("model.path", "run_dir: runs/x\nmodel: {path: '${run_dir}/model'}", "run_dir=runs/y") == "runs/y/model"


@pytest.mark.parametrize("reference", ["${model.pth}", "${nope:x}", "${here}", "${client_configs.data.texts}"])
def test_a_reference_to_nothing_says_which_value_holds_it(read, reference):
    with pytest.raises(ConfigError, match="^run_dir refers to something that is not there: "):
        read(f"run_dir: {reference}\nclient_configs: {{data: {{}}}}")


def test_a_message_about_a_reference_holds_no_internals_of_omegaconf(read):
    with pytest.raises(ConfigError) as caught:
        read("run_dir: ${model.pth}")
    assert "object_type" not in str(caught.value)


ROUND_TRIPS = [
    "run_dir: runs/x",
    TWO,
    "client_configs: {train_configs: {sparsity: 2:4, damping: 1e-05, threads: null}}\nclients: [{client_id: é}]",
    "client_configs: {train_configs: {damping: .inf}}\nseed: 12",
    "run_dir: ${here:runs}\nmodel: {path: '${run_dir}/model', blocks: model.layers}",
    "evaluation: {windows: 3, texts: {1: 'a: #b', 'yes': [c, d], 08: e}}",
    *(f"clients: [{{client_id: {name!r}}}]" for name in ("1", "007", "09", "1e3", "12e5", "2:4", "null", "on", "1_0")),
]


@pytest.mark.parametrize("text", [*ROUND_TRIPS, (ROOT / "configs" / "demo.yaml").read_text("utf-8")])
def test_the_resolved_configuration_is_one_that_gives_the_same(read, text):
    config, problems = read(text)
    assert problems == []
    assert read(to_yaml(config)) == (config, [])


def test_the_resolved_configuration_spells_out_defaults_and_merged_clients(read):
    resolved = yaml.safe_load(to_yaml(read(TWO)[0]))
    assert resolved["server_configs"]["aggregator_kwargs"] == {
        "weights": "equal",
        "fold": "latest",
        "unreached": "magnitude",
        "expansion": "matrix",
        "screening": "refuse",
    }
    given = {"text": ["b.txt", "more"], "windows": 7, "batch": 3}
    read_as = {"field": None, "bos": "auto", "control_words": False}
    assert resolved["clients"][1]["data"] == given | read_as | {"length": 2048, "activations": "memory"}


def test_targets_and_patterns_are_read_from_overrides_and_written_again(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("run_dir: runs/x\nclient_configs: {train_configs: {sparsity: 0.5}}\nclients: [{client_id: a}]\n")
    mapping = "{default: 0.5, blocks.0-1: 0.3, '*.down_proj': 2:4}"
    config, problems = load_config(file, [f"client_configs.train_configs.sparsity={mapping}", "prune.ignore=[0, 7]"])
    assert not problems
    assert config.prune.ignore == ["0", "7"]
    for owner in (config.client_configs, *config.clients):
        assert str(owner.train_configs.sparsity) == "0.5, blocks.0-1 0.3, *.down_proj 2:4"
    again, problems = read_config(plain(config))
    assert not problems
    assert again == config


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("sparsity=0.7", "client_configs.train_configs.sparsity"),
        ("client_configs.windows=8", "data.windows"),
        ("own_windows=0", "evaluation.own_windows"),
    ],
)
def test_a_key_that_is_one_of_a_group_within_is_found_there(read, override, meant):
    assert read(TWO, override)[1] == [f"{override.partition('=')[0]}: unknown key; did you mean {meant}?"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("ignore=[0,7]", r"unknown key; did you mean prune.ignore, with the value \[0, 7\]\?"),
        ("sparsity=[0.4,0.5,0.5,0.6]", r'is written \{default: 0.5, "blocks.0": 0.4, "blocks.3": 0.6\}'),
    ],
)
def test_what_is_guessed_for_a_choice_names_the_right_key(tmp_path, override, says):
    file = tmp_path / "config.yaml"
    file.write_text("run_dir: runs/x\nclients: [{client_id: a}]\n")
    [problem] = load_config(file, [f"client_configs.train_configs.{override}"])[1]
    assert re.search(says, problem)


def test_a_preset_lies_below_the_file_and_above_it_as_an_override(value, tmp_path):
    """`value` refuses any problem, so each preset holds valid keys alone."""
    pruner = "client_configs.train_configs.pruner"
    own = "client_configs: {train_configs: {pruner: magnitude}}\n"
    for name, preset in PRESETS.items():
        expected = preset["client_configs"]["train_configs"]["pruner"]
        assert value(pruner, f"preset: {name}\n") == expected
        assert value("algorithm", f"preset: {name}\n{own}") == preset["algorithm"]
        assert value(pruner, f"preset: {name}\n{own}") == "magnitude"
        assert value(pruner, own, f"preset={name}") == expected
        assert value(pruner, own, f"{pruner}=wanda", f"preset={name}") == "wanda"
        assert value("recovery.rounds", "preset: best\n", f"preset='{name}'") == preset["recovery"]["rounds"]
        config, _ = load_config(tmp_path / "experiment.yaml", (), {"preset": name})
        assert (config.algorithm, read_config(plain(config))) == (preset["algorithm"], (config, []))


def test_an_override_takes_the_preset_of_a_file_away(value):
    assert value("algorithm", "preset: best\n", "preset=null") == "fedspallm"


def test_a_preset_that_is_none_is_refused_with_those_that_are(read):
    config, problems = read("preset: bset\n")
    assert problems == []
    assert "preset: one of paper, fast, best; got 'bset'" in wrong_values(config, "", [])
    assert [one.metadata["rule"].choices for one in fields(Config) if one.name == "preset"] == [tuple(PRESETS)]


@pytest.mark.parametrize("word", ["off", "False", "'off'"])
def test_off_is_a_word_where_it_is_a_choice(read, word):
    config, problems = read(TWO, f"server_configs.aggregator_kwargs.screening={word}")
    assert (problems, config.server_configs.aggregator_kwargs.screening) == ([], "off")
    assert read("seed: off")[1] == ["seed: expected int, got False"]
