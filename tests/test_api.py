"""The face for Python: what it takes, what it gives, and what it refuses."""

import hashlib

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedspallm_appfl as fs
from fedspallm_appfl.texts.windows import Cut, windows_of
from helpers.experiments import DOMAINS, first_pages, small_config
from helpers.paths import DEMO
from helpers.tiny import events, run, save_tiny, tiny_config, weights

HOW = {"sparsity": "2:4", "windows": 6, "length": 24, "batch": 4, "device": "cpu", "threads": 1, "overwrite": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"), torch.float32)


@pytest.fixture(scope="module")
def texts():
    return {name: first_pages(name) for name in DOMAINS[:2]}


def written(folder):
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_it_gives_the_bits_of_the_command_line(model, texts, tmp_path):
    shared = {"client_configs": {"data": {"windows": 6}, "train_configs": {"sparsity": "2:4"}}}
    clients = [{"client_id": name, "data": {"text": str(text)}} for name, text in texts.items()]
    config = tiny_config(tmp_path, model, "fedspallm", 2, **shared, clients=clients)
    by_command = run(config)
    result = fs.prune(model, texts, tmp_path / "api", **HOW)
    assert written(result.model) == written(by_command / "model")
    again = fs.run(fs.load_config(config, run_dir=tmp_path / "again"))
    assert written(again.model) == written(by_command / "model")


def test_texts_and_models_may_be_in_memory(model, texts, tmp_path, capfd):
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(DEMO / "model")
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    words = {name: text.read_text("utf-8") for name, text in texts.items()}
    windows = {name: windows_of(str(text), Cut(24), tokenizer) for name, text in texts.items()}
    capfd.readouterr()
    wanted = written(fs.prune(model, texts, tmp_path / "run", **HOW).model)
    for given in (
        {name: [word] for name, word in words.items()},
        {name: [text] for name, text in texts.items()},
        {name: [str(text)] for name, text in texts.items()},
        {name: window.flatten().int() for name, window in windows.items()},
    ):
        result = fs.prune(loaded, given, tmp_path / "run", tokenizer=tokenizer, **HOW)
        assert written(result.model) == wanted
    without_length = {key: value for key, value in HOW.items() if key != "length"}
    held_out = {"held out": windows[DOMAINS[0]][:3]}
    result = fs.prune(loaded, windows, tmp_path / "run", evaluate=held_out, **without_length)
    assert written(result.model) == wanted
    assert set(result.perplexity) == {"dense", "fedspallm"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items())
    assert capfd.readouterr() == ("", "")


def test_a_result_can_be_read_loaded_and_shown(model, texts, tmp_path):
    held_out = {"a text": texts[DOMAINS[0]]}
    result = fs.prune(model, texts, tmp_path / "run", evaluate=held_out, evaluation={"windows": 2}, **HOW)
    assert result.sparsity == 0.5 and {one.sparsity for one in result.matrices} == {0.5}
    loaded = result.load().state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights(tmp_path / "run").items())
    shown, page = repr(result), result._repr_html_()
    for word in ("a text", "FedSpaLLM", "dense", f"{result.perplexity['dense']['a text']:.2f}", "50.0000 %"):
        assert word in shown and word in page
    assert "\x1b" not in shown
    measured = fs.evaluate(result.model, held_out, length=24, windows=2, batch=8)
    assert measured.perplexity == result.perplexity["fedspallm"]


def test_progress_is_shown_when_asked_for(model, texts, tmp_path, capfd):
    fs.prune(model, texts, tmp_path / "run", progress=True, **HOW)
    assert "round 1/1  client austen" in capfd.readouterr().out
    assert len(events(tmp_path / "run", "upload")) == 6


def test_a_model_for_each_client_is_not_loaded_as_one(model, texts, tmp_path):
    result = fs.prune(model, texts, tmp_path / "run", algorithm="standalone", **HOW)
    with pytest.raises(fs.ModelError, match="a model for each client"):
        result.load()


def test_settings_are_found_by_their_own_names(tmp_path):
    config = fs.load_config(
        small_config(tmp_path),
        sparsity=0.7,
        seed=3,
        weights="sample_size",
        precision="fp32",
        blocks_per_message=2,
        device="cpu",
        evaluation={"length": 32},
    )
    train = config.clients[1].train_configs
    assert (str(train.sparsity), config.seed, train.device, config.server_configs.device) == ("0.7", 3, "cpu", "cpu")
    assert config.server_configs.aggregator_kwargs.weights == "sample_size" and config.gram.precision == "fp32"
    assert config.client_configs.comm_configs.blocks_per_message == 2
    assert (config.evaluation.length, config.clients[0].data.length) == (32, 64)


def test_validate_and_estimate_give_objects(tmp_path):
    file = small_config(tmp_path)
    assert fs.validate(file) == fs.validate(fs.load_config(file)) == []
    wrong = fs.validate(fs.load_config(file, damping=-1.0, windows=10**6))
    assert wrong[0] == "client_configs.train_configs.damping: greater than 0, at most 100, got -1.0"
    assert sum("1000000 calibration windows" in problem for problem in wrong) == 3
    found = fs.estimate(file)
    assert set(found.memory) == {*DOMAINS[:3], "server"} and found.traffic[0].blocks == 8
    assert set(found.durations.clients) == set(DOMAINS[:3])
    assert "Bytes that travel" in repr(found) and "Bytes that travel" in found._repr_html_()


def refused(error, *words, **changes):
    given = {"model": DEMO / "model", "clients": {"a": "a.txt"}, "run_dir": "nowhere"} | HOW | changes
    with pytest.raises(error) as caught:
        fs.prune(given.pop("model"), given.pop("clients"), given.pop("run_dir"), **given)
    assert all(word in str(caught.value) for word in words), caught.value


def test_what_cannot_be_pruned_is_refused_with_argument_value_and_fix(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    tokens = torch.ones(8, 24, dtype=torch.int64)
    refused(fs.ConfigError, "no setting 'sparsty'", "did you mean sparsity?", sparsty=0.5)
    refused(fs.ConfigError, "fs.prune: 1 problem", "sparsity is a share in [0, 1), got 1.5", sparsity=1.5)
    refused(fs.ConfigError, "client a: the text a.txt cannot be read")
    refused(fs.ConfigError, "clients is a dict of names and texts, got list", clients=["a.txt"])
    refused(fs.ConfigError, "clients['a']", "an empty list", clients={"a": []})
    refused(fs.ConfigError, "clients['a']: token ids are whole numbers", clients={"a": tokens.float()})
    refused(fs.ConfigError, "client a", "tokens from -1 to -1", "0 to 1023", clients={"a": -tokens})
    refused(fs.ConfigError, "its windows have 24 tokens, the configuration wants 8", clients={"a": tokens}, length=8)
    refused(fs.ConfigError, "evaluate is a dict", evaluate="a.txt", clients={"a": tokens})
    refused(fs.ConfigError, "tokenizer: a loaded model", model=loaded, clients={"a": ["some text"]})
    refused(fs.ConfigError, "model is a folder", "got int", model=3, clients={"a": tokens})
    refused(fs.ConfigError, "is no folder here and no hub name", model="none", clients={"a": tokens})
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(loaded.config)
    refused(fs.ModelError, "meta device", model=empty, clients={"a": tokens})
    loaded.config.quantization_config = {"quant_method": "some"}
    refused(fs.ModelError, "quantized", model=loaded, clients={"a": tokens})
    refused(fs.ConfigError, "looks like a file, others do not", clients={"a": ["a.txt", "some words"]})
    refused(fs.ConfigError, "the text", "cannot be found: File name too long", clients={"a": "words " * 100})
    refused(fs.ConfigError, "path: model and clients say that", path="x", clients={"a": tokens})
    refused(fs.ConfigError, "names are texts and differ", clients={1: tokens, "1": tokens})
    refused(fs.ConfigError, "gram: expected keys and values", clients={"a": tokens}, gram="x", precision="fp32")
    for wrong in (lambda: fs.run(3), lambda: fs.estimate(None), lambda: fs.evaluate(loaded, {"a": tokens})):
        with pytest.raises(fs.ConfigError, match="got "):
            wrong()
    with pytest.raises(fs.ConfigError, match="windows: at least 1, got -1"):
        fs.evaluate(DEMO / "model", {"a": tokens}, length=24, windows=-1)
    assert list(tmp_path.iterdir()) == []


def test_texts_that_look_like_no_files_are_texts(model, tmp_path):
    words = "The quick brown fox jumps over the lazy dog. "
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    texts = {"a": ["", words * 30, words], "b": [words * 8]}  # an empty line, and one longer than a name of a file
    fs.prune(
        AutoModelForCausalLM.from_pretrained(model),
        texts,
        tmp_path / "run",
        tokenizer=tokenizer,
        **(HOW | {"windows": 1}),
    )


def test_a_model_that_was_written_again_is_read_again(texts, tmp_path):
    first = fs.prune(save_tiny(tmp_path / "model"), texts, tmp_path / "first", **HOW)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        other.model.embed_tokens.weight.add_(1.0)
    other.save_pretrained(tmp_path / "model")
    other.save_pretrained(tmp_path / "elsewhere")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "elsewhere" / file).write_bytes((tmp_path / "model" / file).read_bytes())
    again = fs.prune(tmp_path / "model", texts, tmp_path / "again", **HOW)
    elsewhere = fs.prune(tmp_path / "elsewhere", texts, tmp_path / "third", **HOW)
    assert written(again.model) == written(elsewhere.model) != written(first.model)


def test_a_configuration_may_be_changed_by_hand(tmp_path):
    config = fs.load_config(small_config(tmp_path))
    config.clients[0].data.text = first_pages("bible")
    config.clients[0].train_configs.sparsity = config.client_configs.train_configs.sparsity = 0.7
    assert [problem for problem in fs.validate(config) if "sparsity" not in problem] == []
    config.seed = "x"
    assert fs.validate(config) == ["seed: expected int, got 'x'"]


def test_a_run_directory_is_not_overwritten_unless_asked(model, texts, tmp_path):
    keep = {**HOW, "overwrite": False}
    fs.prune(model, texts, tmp_path / "run", **keep)
    refused(fs.ConfigError, "exists and is not empty", model=model, clients=texts, run_dir=tmp_path / "run", **keep)
