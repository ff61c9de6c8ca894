"""Every rule that the values of a configuration must fulfil, by its text: the key, the value received, the fix."""

import shutil

import pytest
import yaml
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import LlamaConfig, LlamaForCausalLM

from fedspallm_appfl import devices
from fedspallm_appfl.models.lazy_model import Skeleton
from fedspallm_appfl.runs import run_dir
from fedspallm_appfl.settings.reading import load_config
from fedspallm_appfl.texts.tokenizer import load_tokenizer
from fedspallm_appfl.texts.windows import Cut, windows_of
from fedspallm_appfl.validation import words
from fedspallm_appfl.validation.files import check_with_files
from fedspallm_appfl.validation.rules import check
from helpers.paths import DEMO, ROOT

TRAIN = "client_configs.train_configs"
COMM = "client_configs.comm_configs"


def says(problems, *parts):
    """Whether one of the problems holds all parts."""
    return any(all(part in problem for part in parts) for problem in problems)


def demo(*overrides):
    config, problems = load_config(ROOT / "configs" / "demo.yaml", overrides)
    assert problems == []
    return config


def wrong(*overrides):
    """What is wrong with the demo's values as `fedspallm validate --no-files` finds it."""
    config, problems = load_config(ROOT / "configs" / "demo.yaml", overrides)
    return problems or check(config)


@pytest.mark.parametrize("compression", ["auto", "none", "zstd"])
def test_every_compression_there_is_may_be_asked_for(compression):
    config = demo(f"{COMM}.compression={compression}")
    assert check(config) == []
    assert {client.comm_configs.compression for client in config.clients} == {compression}


def test_the_demo_has_no_problem():
    config = demo()
    assert check(config) + check_with_files(config) == []


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("run_dir=''", ["run_dir: name a folder for the results, e.g. runs/first"]),
        ("model.path=''", ["model.path: name the dense model", "save_pretrained or a hub name"]),
        ("model.dtype=int8", ["model.dtype: one of auto, float32, float16, bfloat16; got 'int8'"]),
        ("seed=-1", ["seed: at least 0, got -1"]),
        ("server_configs.aggregator=FedAvg", ["server_configs.aggregator: expected FedSpaLLMAggregator, got 'FedAvg'"]),
        ("server_configs.scheduler=Sync", ["server_configs.scheduler: expected FedSpaLLMScheduler, got 'Sync'"]),
        (f"{TRAIN}.trainer=Vanilla", [f"{TRAIN}.trainer: expected FedSpaLLMTrainer, got 'Vanilla'"]),
        ("server_configs.num_clients=3", ["num_clients is 3, `clients` lists 4; make them equal"]),
        ("server_configs.num_global_epochs=0", ["server_configs.num_global_epochs: at least 1, got 0"]),
        ("server_configs.device=gpu", ["server_configs.device: ", "cuda:N", "got 'gpu'"]),
        ("server_configs.device=3", ["server_configs.device: ", "cuda:N", "got '3'"]),
        ("server_configs.aggregator_kwargs.weights=size", ["weights: one of equal, sample_size; got 'size'"]),
        ("server_configs.aggregator_kwargs.fold=first", ["fold: one of latest, cumulative; got 'first'"]),
        ("server_configs.aggregator_kwargs.expansion=block", ["expansion: one of matrix, row; got 'block'"]),
        ("server_configs.scheduler_kwargs.max_open_blocks=0", ["max_open_blocks: at least 1, got 0"]),
        ("clients=[]", ["clients: the list is empty; name at least one client with a client_id and data.text"]),
        ("clients.2.client_id=austen", ["client_id 'austen' is used 2 times; ids must differ"]),
        ("clients.2.client_id=''", ["clients.2.client_id: one or more letters, digits, '-', '_', '.'; got ''"]),
        ("clients.2.client_id='a/b'", ["clients.2.client_id: one or more letters, digits", "got 'a/b'"]),
        ("clients.1.data.text=null", ["clients.1.data.text: client 'bible' has no private text; name a file or"]),
        ("clients.1.data.text=[]", ["clients.1.data.text: client 'bible' has no private text"]),
        ("clients.1.data.text=[a.txt, {b: c}]", ["clients.1.data.text", "{'b': 'c'}"]),
        ("evaluation.texts.law=null", ["evaluation.texts.law: ", "None"]),
        ("clients.1.data.windows=0", ["clients.1.data.windows: at least 1, got 0"]),
        ("clients.1.data.length=1", ["clients.1.data.length: at least 2, got 1"]),
        ("clients.1.data.batch=0", ["clients.1.data.batch: at least 1, got 0"]),
        ("clients.1.data.activations=disk", ["clients.1.data.activations: one of memory, file; got 'disk'"]),
        ("client_configs.data.activations=1", ["client_configs.data.activations: one of memory, file; got '1'"]),
        ("clients.1.train_configs.resource_share=0", ["resource_share: a share in (0, 1], got 0.0"]),
        ("clients.1.train_configs.resource_share=1.5", ["resource_share: a share in (0, 1], got 1.5"]),
        ("clients.1.train_configs.resource_share=.nan", ["resource_share: a share in (0, 1], got nan"]),
        (f"{TRAIN}.pruner=wnda", ["client_configs.train_configs.pruner: one of ", "sparsegpt", "wanda", "got 'wnda'"]),
        (f"{TRAIN}.damping=0", ["client_configs.train_configs.damping: greater than 0, at most 100, got 0.0"]),
        (f"{TRAIN}.damping=.nan", ["client_configs.train_configs.damping: greater than 0, at most 100, got nan"]),
        (f"{TRAIN}.damping_retries=-1", ["client_configs.train_configs.damping_retries: at least 0, got -1"]),
        (
            f"{TRAIN}.threads=0",
            ["client_configs.train_configs.threads: at least 1, or null to leave it to torch; got 0"],
        ),
        (f"{TRAIN}.device=gpu", ["client_configs.train_configs.device: auto, cpu, cuda or cuda:N; got 'gpu'"]),
        (f"{TRAIN}.device='cuda:'", ["client_configs.train_configs.device: auto, cpu, cuda or cuda:N; got 'cuda:'"]),
        (f"{TRAIN}.device=3", ["client_configs.train_configs.device: auto, cpu, cuda or cuda:N; got '3'"]),
        (f"{TRAIN}.layer_sampling=random", [f"{TRAIN}.layer_sampling: one of balanced, uniform, sweep; got 'random'"]),
        (f"{TRAIN}.sparsity=1.0", [f"{TRAIN}.sparsity: ", "a share in [0, 1), got 1.0; 50 % is written 0.5"]),
        (f"{TRAIN}.sparsity=50", [f"{TRAIN}.sparsity: ", "a share in [0, 1), got 50; 50 % is written 0.5"]),
        (f"{TRAIN}.sparsity=-0.1", [f"{TRAIN}.sparsity: ", "a share in [0, 1), got -0.1"]),
        (f"{TRAIN}.sparsity=.nan", [f"{TRAIN}.sparsity: ", "such as 0.5 or a pattern such as 2:4, got 'nan'"]),
        (f"{TRAIN}.sparsity=half", [f"{TRAIN}.sparsity: ", "such as 0.5 or a pattern such as 2:4, got 'half'"]),
        (
            f"{TRAIN}.sparsity=4:2",
            [f"{TRAIN}.sparsity: ", "0 < n < m (n non-zero in every m), got 4:2; 2:4 is one"],
        ),
        (f"{TRAIN}.sparsity=0:4", [f"{TRAIN}.sparsity: ", "0 < n < m (n non-zero in every m), got 0:4"]),
        ("clients.0.train_configs.sparsity=0.7", ["clients.0.train_configs.sparsity: ", "'0.7' beside '0.5'"]),
        ("clients.0.train_configs.layer_sampling=sweep", ["the same for every client, got 'sweep' beside 'balanced'"]),
        ("clients.0.train_configs.trainer=Mine", ["the same for every client, got 'Mine' beside 'FedSpaLLMTrainer'"]),
        (f"{COMM}.blocks_per_message=0", [f"{COMM}.blocks_per_message: at least 1, got 0"]),
        (
            f"{COMM}.max_message_bytes=9",
            [f"{COMM}.max_message_bytes: at least 1024 and at most 2130706431", "got 9"],
        ),
        (f"{COMM}.max_message_bytes=2147483648", ["at most 2130706431, a little below where MPI ends, got 2147483648"]),
        ("clients.0.comm_configs.blocks_per_message=2", ["clients.0.comm_configs", "the same for every client, got 2"]),
        ("clients.0.comm_configs.max_message_bytes=2147483648", ["clients.0.comm_configs", "2147483648"]),
        (f"{COMM}.compression=gzip", [f"{COMM}.compression: one of auto, none, zstd; got 'gzip'"]),
        (
            "clients.2.comm_configs.compression=zstd",
            ["clients.2.comm_configs.compression: the same for every client, got 'zstd' beside 'auto'"],
        ),
        ("evaluation.length=1", ["evaluation.length: at least 2, got 1"]),
        ("evaluation.device=gpu", ["evaluation.device: auto, cpu, cuda or cuda:N; got 'gpu'"]),
        ("evaluation.windows=0", ["evaluation.windows: at least 1, got 0"]),
        ("evaluation.batch=0", ["evaluation.batch: at least 1, got 0"]),
        (
            "evaluation.compare=[dense]",
            ["evaluation.compare: of standalone, fedavg (dense is always there)", "'dense'"],
        ),
        ("server_configs.num_global_epochs=2", ["standalone needs every client to prune every block", "are 2 rounds"]),
        (
            "clients.3.train_configs.resource_share=0.5",
            ["standalone needs", "below 1 of ['sqldocs']", "in a run of its own with resource_share 1 and one round"],
        ),
    ],
)
def test_a_rule_names_the_key_the_value_received_and_the_fix(override, parts):
    assert says(wrong(override), *parts)


def test_there_must_be_text_to_compare_on():
    config = demo()
    config.evaluation.texts = {}
    assert says(check(config), "evaluation.compare: there is nothing to compare on", "in evaluation.texts")


def test_only_magnitude_needs_no_private_text():
    changes = [f"clients.{index}.data.text=null" for index in range(4)]
    assert wrong(f"{TRAIN}.pruner=magnitude", *changes) == []
    assert len(wrong(f"{TRAIN}.pruner=wanda", *changes)) == 4


@pytest.mark.parametrize("override", [f"{TRAIN}.sparsity=0", f"{TRAIN}.sparsity=2:4", f"{TRAIN}.device=cuda:1"])
def test_values_at_the_border_are_good(override):
    limit = f"{COMM}.max_message_bytes=2130706431"
    assert wrong(override, limit, "clients.1.train_configs.resource_share=1", f"{TRAIN}.threads=null") == []


def test_several_problems_are_reported_at_once():
    overrides = [f"{TRAIN}.damping=101", "seed=-1", "clients.0.client_id=bible", "evaluation.batch=0", "run_dir=''"]
    problems = wrong(*overrides)
    assert len(problems) == len(overrides)
    for part in ("got 101", "got -1", "'bible' is used 2 times", "evaluation.batch", "run_dir"):
        assert says(problems, part)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random LLaMA with matrices that 4 divides and 8 does not."""
    folder = tmp_path_factory.mktemp("model")
    sizes = {"vocab_size": 1024, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "model" / file, folder)
    return folder


@pytest.fixture
def problems(model, tmp_path):
    """What is wrong with an experiment on that model once its files are opened."""
    (tmp_path / "short.txt").write_text("All of it fits into a few windows. " * 8)
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "empty").mkdir()
    text = str(DEMO / "text" / "austen" / "test.txt")
    base = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(model)},
        "server_configs": {"num_clients": 2},
        "client_configs": {"data": {"windows": 8, "length": 16}},
        "clients": [{"client_id": name, "data": {"text": text}} for name in "ab"],
        "evaluation": {"texts": {"novels": text}, "length": 16},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(base))

    def problems(*overrides):
        config, form = load_config(tmp_path / "c.yaml", overrides)
        assert form + check(config) == []
        return check_with_files(config)

    return problems


@pytest.mark.parametrize("sparsity", ["0.5", "2:4", "1:2", "0"])
def test_an_experiment_on_a_tiny_model_has_no_problem(problems, sparsity):
    assert problems(f"{TRAIN}.sparsity={sparsity}") == []


def test_an_nm_pattern_must_divide_every_matrix(problems):
    found = problems(f"{TRAIN}.sparsity=4:8")
    assert found == [f"{TRAIN}.sparsity: mlp.down_proj: 4:8 needs rows that are a multiple of 8 long, got 44"]


def test_a_problem_that_several_have_is_said_once_with_their_names(problems):
    matrices = "self_attn.q_proj, self_attn.k_proj, self_attn.v_proj, self_attn.o_proj, mlp.gate_proj, mlp.up_proj"
    found = problems(f"{TRAIN}.sparsity=3:5", "client_configs.data.length=65")
    assert says(found, f"{TRAIN}.sparsity: {matrices}: 3:5 needs rows that are a multiple of 5 long, got 32")
    assert says(found, f"{TRAIN}.sparsity: mlp.down_proj: 3:5 needs rows that are a multiple of 5 long, got 44")
    assert says(found, "clients a, b: data.length: the model takes at most 64 tokens")
    assert len(found) == 3


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        (
            "model.path=${here:none}",
            ["model: model path '", "none' is no folder here and no hub name", "`model.path`"],
        ),
        (
            "model.path=${here:empty}",
            ["model: ", "holds no model: there is no config.json in it; name a folder saved by save_pretrained"],
        ),
        ("model.blocks=layers.of.nothing", ["model: ", "layers.of.nothing"]),
        ("clients.1.data.text=${here:none.txt}", ["client b: the text ", "none.txt cannot be read: No such file"]),
        ("clients.1.data.text=${here:latin.txt}", ["client b: the text ", "is not UTF-8 (byte 2); convert it first"]),
        ("clients.1.data.text=${here:empty}", ["client b: the folder ", "has no text; name a file, or a folder"]),
        ("clients.1.data.length=65", ["client b: data.length", "at most 64 tokens (max_position_embeddings), got 65"]),
        ("evaluation.length=65", ["evaluation.length: ", "at most 64 tokens (max_position_embeddings), got 65"]),
        ("evaluation.texts.law=${here:none.txt}", ["evaluation.texts.law: the text ", "none.txt cannot be read"]),
        ("evaluation.texts.law=${here:latin.txt}", ["evaluation.texts.law: the text ", "is not UTF-8 (byte 2)"]),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_its_key(problems, override, parts):
    assert says(problems(override), *parts)


def test_a_model_that_the_hub_cannot_give_says_what_to_do(problems, monkeypatch):
    def offline(*_, **__):
        raise LocalEntryNotFoundError("no network\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    [problem] = problems("model.path=someone/model")
    assert says(
        [problem],
        "'someone/model' is no folder here and could not be fetched from the hub",
        "(no network)",
        "download it",
    )


def test_a_text_with_too_few_windows_says_how_many_there_are(problems, model, tmp_path):
    there = len(windows_of(str(tmp_path / "short.txt"), Cut(16), load_tokenizer(model)))
    assert there > 1
    short = "clients.0.data.text=${here:short.txt}"
    assert problems(short, f"clients.0.data.windows={there}") == []
    assert problems(short, f"clients.0.data.windows={there + 1}") == [
        f"client a: {there + 1} calibration windows of 16 tokens were requested, its text has {there}; "
        "give more text, or lower client_configs.data.windows or client_configs.data.length"
    ]


def test_an_evaluation_text_needs_one_whole_window(problems, tmp_path):
    (tmp_path / "word.txt").write_text("word")
    [problem] = problems("evaluation.texts.word=${here:word.txt}")
    assert says(
        [problem], f"evaluation.texts.word: {tmp_path / 'word.txt'} has no whole window of 16 tokens; give more"
    )


@pytest.mark.parametrize("model_is_there", [True, False])
def test_an_evaluation_text_that_is_not_there_is_named_with_its_key(problems, tmp_path, model_is_there):
    elsewhere = [] if model_is_there else [f"model.path={tmp_path / 'nowhere'}"]
    found = problems("evaluation.texts.word=${here:none.txt}", *elsewhere)
    assert says(found, f"evaluation.texts.word: the text {tmp_path / 'none.txt'} cannot be read")


def test_a_tokenizer_of_another_model_is_noticed(problems, monkeypatch):
    monkeypatch.setattr(Skeleton, "vocabulary", 10)
    found = problems()
    for client in "ab":
        start = f"client {client}: the text has tokens from "
        assert [problem.startswith(start) for problem in found].count(True) == 1
        assert says(found, start, "the model those from 0 to 9; tokenizer and model do not belong together")


def test_magnitude_alone_opens_no_private_text(problems):
    overrides = (f"{TRAIN}.pruner=magnitude", "clients.0.data.text=null", "clients.1.data.text=null")
    assert problems(*overrides, "evaluation.length=16") == []


def test_problems_of_all_files_are_reported_at_once(problems):
    clients = ("clients.0.data.text=${here:none.txt}", "clients.1.data.text=${here:latin.txt}")
    found = problems(f"{TRAIN}.sparsity=4:8", *clients, "evaluation.length=65")
    assert len(found) == 4
    for part in ("mlp.down_proj", "client a: ", "client b: ", "evaluation.length"):
        assert says(found, part)


def test_a_run_directory_must_be_free_or_overwritten(tmp_path):
    run = tmp_path / "run"
    config = demo(f"run_dir={run}")
    assert run_dir.problem(config, overwrite=False) is None
    run.mkdir()
    assert run_dir.problem(config, overwrite=False) is None
    (run / "report.md").touch()
    for overwrite in (False, True):
        assert f"{run} is not empty and holds no earlier run" in run_dir.problem(config, overwrite)
    (run / "metrics.jsonl").touch()
    problem = run_dir.problem(config, overwrite=False)
    assert problem.startswith(f"run_dir: {run} exists and is not empty; give another run_dir, or --overwrite (")
    assert run_dir.problem(config, overwrite=True) is None


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_directory_is_no_file(tmp_path, overwrite):
    (tmp_path / "run").touch()
    config = demo(f"run_dir={tmp_path / 'run'}")
    assert run_dir.problem(config, overwrite) == f"run_dir: {tmp_path / 'run'} is a file; name a folder"


@pytest.mark.parametrize(
    ("dtype", "times", "said"), [("bfloat16", 8.2, True), ("bfloat16", 1.4, False), ("float32", 8.2, False)]
)
def test_arithmetic_that_is_slow_on_this_cpu_is_said_before_a_run(dtype, times, said, model, monkeypatch):
    monkeypatch.setattr(devices, "slowdown", lambda dtype: times)
    monkeypatch.setattr(words.torch.cuda, "device_count", lambda: 0)
    lines = words.forecast(demo(f"model.path={model}", f"model.dtype={dtype}"))
    assert any(line.startswith("this CPU has no fast arithmetic in bfloat16: ") for line in lines) == said
