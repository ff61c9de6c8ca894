"""The keys of a configuration: name, type, default, choices, range and meaning of each, in one place.

One experiment is one YAML. Its top-level keys `server_configs`, `client_configs` and `clients` are APPFL's. These classes
are also what server and clients are handed: `ServerSettings` and `ClientSettings` are groups of the same keys, as APPFL's
`aggregator_kwargs` and `train_configs` carry them.

Nothing here imports torch: a wrong key or value is refused at once. `reading` makes these objects, `rules` checks them, and
`page` writes docs/configuration.md from them.
"""

import copy
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedspallm_appfl.tensors.target import NM, Target, parse_target
from fedspallm_appfl.tensors.targets import Sparsity, Targets

Paths = str | list[str]

ALGORITHMS = ("fedspallm", "fedprllm", "fedavg", "consensus", "gram", "standalone", "centralized")
PRUNERS = ("sparsegpt", "admm", "wanda", "magnitude")
TRACKERS = {  # name -> modules that it needs
    "tensorboard": ("tensorboard",),
    "mlflow": ("mlflow", "sqlalchemy"),
    "wandb": ("wandb",),
}
DTYPES = ("float32", "float16", "bfloat16")
BOSES = ("auto", "first", "never")
BOS = "begin-of-sequence: `auto`: each window begins as the tokenizer begins a text; `first`: the whole text does; `never`"
MOST = 10**9  # nobody means more, and what is not a machine integer fails far from here
MPI_LIMIT = 2**31 - 1  # bytes of one MPI message
MESSAGE_LIMIT = MPI_LIMIT - 2**24  # bytes of its tensors: names, shapes and metadata take far less than 16 MiB
REDIS_LIMIT = 2**29 - 2**20  # bytes of a value, a little below where Redis ends
GPU = "cuda:(0|[1-9][0-9]{0,3})"
DEVICE = (rf"auto|cpu|cuda|{GPU}", "auto, cpu, cuda or cuda:N")
UUID = r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"
NAME = (r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", "one or more letters, digits, '-', '_', '.'")  # it names a folder too


@dataclass(frozen=True)
class Rule:
    """What a value must fulfil by itself, and what it means.

    Attributes:
        says: one sentence for the page of all keys, in Markdown.
        choices: the values that are allowed; empty for any.
        extensible: plugins may add to the choices.
        least: the smallest number allowed.
        most: the largest number allowed.
        form: (regular expression that a text must match as a whole, what to say it is).
        range: what to say of a number outside the range, where it is not the usual "at least" or "at most".
    """

    says: str
    choices: tuple[str, ...] = ()
    extensible: bool = False
    least: float | None = None
    most: float | None = None
    form: tuple[str, str] | None = None
    range: str = ""


def key(default: Any, says: str, **rule: Any) -> Any:
    """A key with its default, meaning and rule; a class, or `list` or `dict`, as default is called for a new one."""
    metadata = {"rule": Rule(says, **rule)}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def group(kind: type) -> Any:
    """A group of keys."""
    return field(default_factory=kind)


@dataclass
class Model:
    """The dense model, of which every client and the server hold a copy."""

    path: str = key("", "folder saved by `save_pretrained`, or hub name")
    dtype: str = key(
        "auto",
        "arithmetic of forward passes: `auto` (as stored), `float32`, `float16`, `bfloat16`; sums are wider",
        choices=("auto", *DTYPES),
    )
    blocks: str | None = key(None, "dotted name of the list of decoder blocks, if the search does not find it")
    trust_remote_code: bool = key(
        False,
        "run Python code that the model folder brings along (`auto_map` in its config.json) on server and clients; over "
        "Globus Compute a site decides for itself (`trust_remote_code` in its site file)",
    )


@dataclass
class Prune:
    """Which matrices are pruned; the others stay dense."""

    include: list[str] = key(
        list,
        "patterns of the matrices to prune: blocks (`7`, `0-3`), names (`self_attn`, `*.down_proj`) or both "
        "(`blocks.0-3.down_proj`); empty means all",
    )
    ignore: list[str] = key(list, "patterns of matrices that stay dense, of those that `include` names")
    keep_zeros: bool = key(
        True,
        "weights that are zero in the dense model are pruned first and stay zero, so that its sparsity is not lost",
    )


@dataclass(frozen=True)
class Gram:
    """What clients send with an algorithm that gathers Gram matrices."""

    precision: str = key(
        "int8",
        "precision of the entries above the diagonal of a Gram matrix: `int8`, `bf16`, `fp32`",
        choices=("fp32", "bf16", "int8"),
    )
    propagate: str = key(
        "dense",
        "`dense`: one forward pass of the dense model; `pruned`: a sweep, each exchange of which measures the model "
        "that is pruned so far",
        choices=("dense", "pruned"),
    )
    target: str = key(
        "own",
        "in a sweep, the outputs to match: `own`, those of the dense weights on the inputs there; `dense`, those of the "
        "dense model",
        choices=("own", "dense"),
    )
    first_input: str = key(
        "public",
        "inputs that single tokens decide: `public` sends Gram matrices of random tokens, `private` those of the text, "
        "which reveal token counts",
        choices=("public", "private"),
    )
    min_tokens: int | None = key(
        None,
        "statistics of fewer tokens are not sent; empty means the width of the input",
        least=1,
        most=MOST,
    )
    stride: int = key(
        0,
        "in a sweep, blocks of an exchange, with all their inputs at once; 0: an exchange for each input of each block",
        least=0,
        most=MOST,
    )

    @property
    def by_input(self) -> bool:
        """Whether the clients measure one input after the other, with the matrices before it pruned."""
        return self.propagate == "pruned" and not self.stride

    @property
    def drift(self) -> bool:
        """Whether the drift from the dense model's inputs travels too."""
        return self.propagate == "pruned" and self.target == "dense"

    def fewest_tokens(self, features: int) -> int:
        """The fewest tokens of which a Gram matrix of so many features may be sent."""
        return features if self.min_tokens is None else self.min_tokens


@dataclass
class Allocation:
    """How much of each matrix is pruned, at the same total."""

    method: str = key(
        "uniform",
        "`uniform`: `sparsity` holds for each matrix; `fisher`: it holds for all together, and matrices that the loss "
        "depends on less are pruned more, as a public text at the server shows ([docs](allocation.md))",
        choices=("uniform", "fisher"),
    )
    width: str = key(
        "auto",
        "how far the target of a matrix may be from `sparsity`, such as 0.15; `auto` tries a few, 0 among them, and keeps "
        "the one with the smallest loss on other windows of the text",
        form=(r"auto|0?\.(?=.*[1-9])[0-9]{1,6}", "auto, or a number between 0 and 1 such as 0.15"),
    )
    text: Paths | None = key(None, "public text, as `data.text`; empty takes the one that comes with the package")
    field: str | None = key(None, "as `data.field`")
    windows: int = key(64, "windows of it that the targets are made of, at most half of the text", least=1, most=MOST)
    length: int | None = key(
        None, "tokens in a window; empty means 256, or what the model takes if that is less", least=2, most=MOST
    )
    batch: int = key(1, "windows in a forward or backward pass", least=1, most=MOST)

    @property
    def asked(self) -> bool:
        """Whether matrices get targets of their own."""
        return self.method != "uniform"


@dataclass
class Recovery:
    """Training after pruning: masks stay, clients fit kept weights to their text, and the server goes along the mean."""

    model: str | None = key(
        None,
        "folder of a model that was pruned before, or its run_dir: nothing is pruned, and its zeros stay; "
        "`fedspallm recover` sets it",
    )
    rounds: int = key(0, "rounds of recovery, after the last round of the algorithm; 0 for none", least=0, most=MOST)
    scope: str = key(
        "all",
        "`all`: the whole model at once; `blockwise`: one block after the other, fitted to the dense block's output, with "
        "one in memory",
        choices=("all", "blockwise"),
    )
    loss: str = key(
        "kl",
        "with `all`: `kl`, the divergence from the dense model's predictions; `next_token`, which over-fits a small text",
        choices=("kl", "next_token"),
    )
    steps: int = key(16, "optimizer steps of a client in a round, for each block with `blockwise`", least=1, most=MOST)
    batch: int = key(8, "windows in a step, at least `data.batch`", least=1, most=MOST)
    lr: float | None = key(
        None,
        "how far a step goes at first, as a share of a matrix's root mean square; it falls to 0 over the round. Empty: "
        "each client tries its first step with 0.02 (`all`) or 0.05 (`blockwise`) and halves of it, and takes the best",
        least=0,
        most=1,
        range="greater than 0, at most 1, got {value}",
    )
    rank: int = key(
        0,
        "0: each kept weight is trained, and its change travels. From 1: a matrix changes by a product B A under its mask, "
        "with a random A, the same for all; B, of so many columns, travels: few bytes, less memory, less gain",
        least=0,
        most=1024,
    )
    delta: str = key(
        "int4",
        "precision in which changes, or the entries of B, travel: `int4`, `int8`, `fp16`",
        choices=("int4", "int8", "fp16"),
    )

    @property
    def reach(self) -> float:
        """The learning rate, or what was found to be best with the scope."""
        return self.lr if self.lr is not None else 0.02 if self.scope == "all" else 0.05


@dataclass
class AggregatorKwargs:
    """How uploads are combined."""

    weights: str = key(
        "equal",
        "`equal`, or `sample_size`: clients count by their calibration windows",
        choices=("equal", "sample_size"),
    )
    fold: str = key(
        "latest",
        "what a later round does with the sums of earlier ones: `latest` replaces them, `cumulative` adds to them",
        choices=("latest", "cumulative"),
    )
    unreached: str = key(
        "magnitude",
        "mixtures of experts: an expert that too few tokens of every client reach is pruned by `magnitude`, or stays "
        "`dense`",
        choices=("magnitude", "dense"),
    )
    expansion: str = key(
        "matrix", "`matrix` or `row`: the group in which entries compete in mask expansion", choices=("matrix", "row")
    )
    screening: str = key(
        "refuse",
        "what becomes of an upload that no honest client would send: `refuse`, `report` in report.md only, `off` does not "
        "look ([docs](algorithms.md#what-no-honest-client-sends))",
        choices=("refuse", "report", "off"),
    )


@dataclass
class SchedulerKwargs:
    """How uploads are let in."""

    max_open_blocks: int = key(
        2, "blocks with sums in memory before clients that run ahead have to wait", least=1, most=MOST
    )


@dataclass
class Functions:
    """Ids of this package's functions at Globus Compute, as `fedspallm functions` has registered them."""

    look_around: str | None = key(
        None,
        "over Globus Compute: a UUID that `fedspallm functions` shows, if sites allow its functions alone; empty registers "
        "the function in each run",
    )
    prune: str | None = key(None, "the other one")


@dataclass
class ServerConfigs:
    """The server and the rounds."""

    num_clients: int | None = key(None, "number of clients; if given, it must equal the length of `clients`")
    num_global_epochs: int = key(1, "rounds", least=1, most=MOST)
    min_clients: int | None = key(
        None,
        "a client that fails is left out of the round, and the run ends if fewer than so many are left; over Globus "
        "Compute a round also ends once so many have answered. Empty: over Globus Compute it waits for all that have not "
        "failed, else the first failure ends the run",
        least=1,
        most=MOST,
    )
    connection_deadline: float | None = key(
        3600.0,
        "over Globus Compute: seconds without a connection to the service after which the run ends, to be gone on with by "
        "`fedspallm resume`; empty waits without limit",
        least=0.0,
    )
    round_deadline: float | None = key(
        None,
        "over Globus Compute: seconds that an exchange may take (FedSpaLLM has one a round, `consensus` two, a sweep of "
        "`gram` one for each input or each `gram.stride` blocks); clients that have not answered by then are left out of "
        "the round; empty waits without limit",
        least=0,
        most=MOST,
        range=f"seconds, greater than 0 and at most {MOST}, got {{value:g}}",
    )
    preflight_deadline: float = key(
        600.0,
        "over Globus Compute: seconds that an endpoint has to answer the preflight",
        least=0,
        most=MOST,
        range=f"seconds, greater than 0 and at most {MOST}, got {{value:g}}",
    )
    functions: Functions = group(Functions)
    secure_sums: bool = key(
        False,
        "with `gram`, `consensus`, `fedprllm` and `preset: best`: the server sees the sum of all clients, and no client's "
        "upload ([docs](secure_sums.md)). In the place of the default `fedspallm` take `algorithm: gram`",
    )
    roster: str | None = key(
        None,
        "with `secure_sums`: a YAML file of client -> public key; clients then sign what they tell each other "
        "([docs](secure_sums.md#identities))",
    )
    fold_ranks: int = key(
        0,
        "under MPI: ranks after the server's that check uploads, add them up and close them in its place; each has its "
        "share of the matrices ([docs](scale.md#fold-ranks))",
        least=0,
        most=MOST,
    )
    device: str = key(
        "auto",
        "where sums are kept and combined: `auto` (a GPU if the server sees one), `cpu`, `cuda`, `cuda:N`",
        form=DEVICE,
    )
    aggregator: str = key(
        "FedSpaLLMAggregator",
        "or a subclass in a file: `path/to/file.py:ClassName`; the file can import installed modules only",
    )
    aggregator_kwargs: AggregatorKwargs = group(AggregatorKwargs)
    scheduler: str = key("FedSpaLLMScheduler", "or a subclass in a file, in the same way")
    scheduler_kwargs: SchedulerKwargs = group(SchedulerKwargs)


@dataclass
class Pruning:
    """How a matrix is pruned."""

    pruner: str = key(
        "sparsegpt", "`sparsegpt`, `admm`, `wanda`, `magnitude`, or one of a plugin", choices=PRUNERS, extensible=True
    )
    sparsity: Sparsity = key(
        parse_target("0.5"),
        "share in [0, 1), or n:m; or a mapping of patterns to targets, of which the last that fits decides: "
        '`{default: 0.5, "blocks.0-1": 0.3, "*.down_proj": 2:4}`; the same for every client',
    )
    damping: float = key(
        0.01,
        "added to the diagonal of the Gram matrix, as a share of its mean (SparseGPT) or of each entry (ADMM, `refit`)",
        least=0,
        most=100,
        range="greater than 0, at most 100, got {value}",
    )
    damping_retries: int = key(
        3, "how often a failed factorization is tried again with ten times the damping", least=0, most=100
    )
    iterations: int = key(20, "ADMM: steps at most; fewer are faster, more a little better", least=1, most=MOST)
    refit: bool = key(False, "least squares on the kept weights after SparseGPT or Wanda")
    min_tokens: int = key(
        32,
        "mixtures of experts: a client does not prune an expert that fewer of its tokens reach",
        least=1,
        most=MOST,
    )

    @property
    def own_target(self) -> Target:
        """The target, in the settings of one matrix (see `at`)."""
        assert isinstance(self.sparsity, Target), "settings of a matrix are made by `at`"
        return self.sparsity

    def at(self, block: int, name: str) -> "Pruning":
        """How one matrix is pruned."""
        return dataclasses.replace(self, sparsity=self.sparsity.of(block, name))


@dataclass
class TrainConfigs(Pruning):
    """Local pruning."""

    trainer: str = key(
        "FedSpaLLMTrainer",
        "or a subclass in a file, in the same way, the same for every client; not over Globus Compute, where a site "
        "runs no code of the server's",
    )
    layer_sampling: str = key(
        "balanced",
        "`balanced`, `uniform`, `sweep`; the same for every client",
        choices=("balanced", "uniform", "sweep"),
    )
    resource_share: float = key(
        1.0,
        "share of the blocks that a client prunes in a round, in (0, 1]",
        least=0,
        most=1,
        range="a share in (0, 1], got {value}",
    )
    device: str = key("auto", "`auto` (a GPU of the node if there is one), `cpu`, `cuda`, `cuda:N`", form=DEVICE)
    devices: list[str] = key(
        list,
        "in the place of `device`: several GPUs for one client, such as `[cuda:0, cuda:1]`, which share the batches of its "
        "text ([docs](hpc.md#several-gpus-for-one-client))",
        form=(rf"cpu|{GPU}", "cuda:N with the number of each GPU, or cpu"),
    )
    threads: int | None = key(
        None,
        "CPU threads of a client; equal numbers give equal bits; empty leaves it to torch",
        least=1,
        range="at least 1, or null to leave it to torch; got {value}",
    )

    @property
    def places(self) -> list[str]:
        """All devices that are asked for."""
        return self.devices or [self.device]


@dataclass
class Data:
    """Private text of a client and what is taken from it."""

    text: Paths | None = key(
        None,
        "private text: a file, a folder, a pattern, a data set, or a list of these ([formats](#text)); usually set for "
        "each client",
    )
    field: str | None = key(
        None, "column of records that holds the text; empty means `text`, or else the only column with text"
    )
    bos: str = key("auto", BOS, choices=BOSES)
    control_words: bool = key(
        False, "`true`: words in the text such as `</s>` become control tokens; `false`: they are text like any other"
    )
    windows: int = key(128, "calibration windows drawn from it", least=1, most=MOST)
    length: int = key(2048, "tokens in a window", least=2, most=MOST)
    batch: int = key(1, "windows in a forward pass; more is faster on a GPU and takes more memory", least=1, most=MOST)
    activations: str = key(
        "memory",
        "`memory`, or `file`: hidden states between two blocks (windows x length x hidden size) lie in a temporary file of "
        "the client in `TMPDIR`, which should be a disk and not memory; the bits are the same",
        choices=("memory", "file"),
    )


@dataclass
class Store:
    """Where payloads lie that are too large for a task of Globus Compute."""

    connector: str = key(
        "none",
        "over Globus Compute: where payloads lie that are too large for a task: `none`, `file`, `redis`, `s3`, `endpoint` "
        "([docs](globus.md#the-data-store))",
        choices=("none", "file", "redis", "s3", "endpoint"),
    )
    folder: str | None = key(None, "`file`: a folder that server and sites mount")
    host: str = key("127.0.0.1", "`redis`")
    port: int = key(6379, "`redis`", least=1, most=65535)
    tls: bool = key(False, "`redis`; its password is in `FEDSPALLM_REDIS_PASSWORD`")
    bucket: str | None = key(None, "`s3`; only the server has credentials, as boto3 takes them")
    url: str | None = key(None, "`s3`: address of the service, if it is not that of AWS")
    endpoints: list[str] = key(list, "`endpoint`: UUIDs of all ProxyStore endpoints, the server's first")


@dataclass
class CommConfigs:
    """Messages."""

    blocks_per_message: int = key(1, "blocks in a message", least=1, most=MOST)
    max_message_bytes: int = key(
        2**29,
        "bytes of a rank's message, shared by its clients; a larger block is split",
        least=1024,
        most=MESSAGE_LIMIT,
        range=f"at least 1024 and at most {MESSAGE_LIMIT}, a little below where MPI ends, got {{value}}",
    )
    compression: str = key(
        "auto",
        "`zstd`: masks and values travel as zstandard frames if that is smaller; `none`; `auto`: `zstd` over Globus "
        "Compute, `none` in one process and under MPI, where links are faster than the coder",
        choices=("auto", "none", "zstd"),
    )
    store: Store = group(Store)


@dataclass
class ClientConfigs:
    """What all clients share."""

    train_configs: TrainConfigs = group(TrainConfigs)
    data: Data = group(Data)
    comm_configs: CommConfigs = group(CommConfigs)


@dataclass
class Client(ClientConfigs):
    """One client, `client_configs` with its own entry merged over it."""

    client_id: str = key("", "letters, digits, `-`, `_` and `.`; different for every client", form=NAME)
    endpoint_id: str | None = key(
        None,
        "over Globus Compute: the UUID of the client's endpoint; its site names the text",
        form=(UUID, "the UUID that globus-compute-endpoint list shows"),
    )
    identity: str | None = key(
        None,
        "with `server_configs.roster`: the file of the client's secret key; over Globus Compute its site file names it",
    )


@dataclass
class Evaluation:
    """Held-out text on which the server measures perplexity."""

    texts: dict[str, Paths] = key(
        dict, "name -> held-out text, as `data.text`, or `wikitext2`, `ptb`, `c4` as papers cut them"
    )
    field: str | None = key(None, "as `data.field`")
    bos: str = key("auto", BOS, choices=BOSES)
    own_windows: int | None = key(
        None,
        "windows of its own text that each client keeps out of calibration, to compare the pruned model with the dense one "
        "where the text lies ([docs](#evaluation-where-the-text-lies)); 0 for none; empty means 8 without `texts`, else 0",
        least=0,
        most=MOST,
    )
    length: int = key(2048, "tokens in a window", least=2, most=MOST)
    windows: int | None = key(None, "at most so many windows of each text; empty takes all", least=1, most=MOST)
    batch: int = key(1, "windows in a forward pass", least=1, most=MOST)
    device: str = key("auto", "`auto` (a GPU if the server sees one), `cpu`, `cuda`, `cuda:N`", form=DEVICE)
    compare: list[str] = key(
        list,
        "`standalone` (needs one round and every resource share at 1), `fedavg`; dense is always there; left out with "
        "algorithms whose uploads do not serve for it",
    )


@dataclass
class Config:
    """One experiment."""

    run_dir: str = key("", "folder for the results; one that is not empty needs `--overwrite`")
    seed: int = key(
        0,
        "seed of calibration windows, layer sampling, and the random tokens of `gram.first_input: public`",
        least=0,
        most=MOST,
    )
    checkpoint_every: float = key(
        60.0,
        "least number of seconds between two times that a client writes its hidden states, from which `--resume` goes on; "
        "more where writing would take a twentieth of the time ([docs](run_directory.md#going-on-after-an-interruption))",
        least=0.0,
    )
    workers: str = key(
        "auto",
        "processes that share clients and evaluation where there is no launcher: a number, or `auto` for as many as cores, "
        "clients and memory allow and the work is worth; each has its share of the CPU threads",
        form=(r"auto|[1-9]\d{0,3}", "auto, or a number of processes from 1 to 9999"),
    )
    plugins: list[str] = key(
        list, "Python files or modules that add pruners or algorithms: [python.md](python.md#your-own-pruner)"
    )
    tracking: list[str] = key(
        list,
        "`tensorboard`, `mlflow`, `wandb`: the server hands its measurements to these too "
        "([docs](run_directory.md#trackers))",
        choices=tuple(TRACKERS),
    )
    preset: str | None = key(
        None,
        "a whole way to prune, of which single keys may differ: `paper` (FedSpaLLM as published), `fast` (masks by Wanda, "
        "seconds), `best` (the lowest perplexity) ([docs](#presets))",
        choices=("paper", "fast", "best"),
    )
    algorithm: str = key(
        "fedspallm",
        "`fedspallm`, `fedprllm`, `fedavg`, `consensus`, `gram`, `standalone`, `centralized`, or one of a plugin: "
        "[algorithms.md](algorithms.md)",
        choices=ALGORITHMS,
        extensible=True,
    )
    allocation: Allocation = group(Allocation)
    gram: Gram = group(Gram)
    recovery: Recovery = group(Recovery)
    model: Model = group(Model)
    prune: Prune = group(Prune)
    server_configs: ServerConfigs = group(ServerConfigs)
    client_configs: ClientConfigs = group(ClientConfigs)
    clients: list[Client] = field(default_factory=list)
    evaluation: Evaluation = group(Evaluation)

    @property
    def allocates(self) -> bool:
        """Whether matrices get targets of their own; with n:m each group has one, and a model to recover its zeros."""
        given = self.recovery.model or isinstance(self.client_configs.train_configs.sparsity, NM)
        return self.allocation.asked and not given

    def with_sparsity(self, sparsity: Sparsity) -> "Config":
        """The same with another target, for all clients."""
        made = copy.deepcopy(self)
        for owner in (made.client_configs, *made.clients):
            owner.train_configs.sparsity = sparsity
        return made

    def pruners(self) -> str:
        """The pruners that clients use, in the order of the file."""
        return ", ".join(dict.fromkeys(client.train_configs.pruner for client in self.clients))

    def over_globus(self) -> bool:
        """Whether every client has an endpoint, so that the file is meant for Globus Compute."""
        return bool(self.clients) and all(client.endpoint_id for client in self.clients)


@dataclass
class HashedModel(Model):
    """A model that two sites can tell apart from others.

    Attributes:
        hash: of its configuration and weights; empty within one process or job.
    """

    hash: str = ""


@dataclass
class Pooled:
    """The text of one client that a participant has beside others', for comparison."""

    client_id: str = ""
    text: Paths | None = None
    windows: int = 0
    field: str | None = None


@dataclass
class OwnData(Data):
    """The data of a participant.

    Attributes:
        pool: the clients whose text it has; empty for its own `text`.
    """

    pool: list[Pooled] = field(default_factory=list)


@dataclass
class ClientSettings(TrainConfigs):
    """All that one client is told, as APPFL's `train_configs` carry it.

    Attributes:
        client_id: its id.
        model: the dense model.
        prune: which matrices are pruned.
        data: its text.
        comm: its messages.
        seed: the experiment's.
        algorithm: name of the algorithm.
        gram: which statistics to send, for algorithms that gather them.
        recovery: what follows pruning.
        rounds: number of rounds.
        secure_sums: the server sees sums of all clients alone.
        roster: id -> resource share of all participants, for scripts that do not pass assignments on.
        public_keys: id -> public key of all clients, where those of secure sums have identities.
        tokens: id -> calibration tokens of all clients of secure sums.
        identity: file of its secret key; None for none.
        own_windows: windows of its text to measure on at the end.
        agreed: folder for pruned blocks that come down, shared by the clients of a process; None for one of its own.
        checkpoints: folder for its hidden states; None for none.
        checkpoint_every: seconds between two of them.
        secrets: folder for keys of secure sums and for statistics between two exchanges; None keeps keys in memory.
    """

    client_id: str = ""
    model: HashedModel = group(HashedModel)
    prune: Prune = group(Prune)
    data: OwnData = group(OwnData)
    comm: CommConfigs = group(CommConfigs)
    seed: int = 0
    algorithm: str = "fedspallm"
    gram: Gram = group(Gram)
    recovery: Recovery = group(Recovery)
    rounds: int = 1
    secure_sums: bool = False
    roster: dict[str, float] = field(default_factory=dict)
    public_keys: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    identity: str | None = None
    own_windows: int = 0
    agreed: str | None = None
    checkpoints: str | None = None
    checkpoint_every: float = 60.0
    secrets: str | None = None


@dataclass
class ServerSettings(AggregatorKwargs, Pruning):
    """All that the server's aggregator is told, as APPFL's `aggregator_kwargs` carry it.

    Attributes:
        model: the dense model.
        prune: which matrices are pruned.
        algorithm: name of the algorithm.
        gram: which statistics clients send, for algorithms that gather them.
        recovery: what follows pruning.
        comparisons: algorithms whose models are made of the same uploads, beside the global one.
        mask_only: clients whose pruner leaves kept weights as they are; they send masks without values.
        layer_sampling: how blocks are assigned.
        seed: the experiment's.
        rounds: number of rounds.
        secure_sums: the server sees sums of all clients alone.
        roster: id -> resource share of all participants.
        public_keys: id -> public key of all clients, where those of secure sums have identities.
        windows: id -> calibration windows that a participant was asked for; nothing of those that may have any number.
        tokens: id -> tokens in these windows.
        fitted: clients whose kept weights come of least squares, or of little damping.
        device: where sums are kept and combined.
        threads: CPU threads of what the server solves; None leaves it to torch.
        max_message_bytes: bytes of a message that goes down.
        compression: `zstd` compresses what goes down.
        own_windows: windows of their texts on which clients measure at the end.
        state_dir: folder for packed blocks and sums; None for a temporary one.
    """

    model: Model = group(Model)
    prune: Prune = group(Prune)
    algorithm: str = "fedspallm"
    gram: Gram = group(Gram)
    recovery: Recovery = group(Recovery)
    comparisons: list[str] = field(default_factory=list)
    mask_only: list[str] = field(default_factory=list)
    layer_sampling: str = "balanced"
    seed: int = 0
    rounds: int = 1
    secure_sums: bool = False
    roster: dict[str, float] = field(default_factory=dict)
    public_keys: dict[str, str] = field(default_factory=dict)
    windows: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    fitted: list[str] = field(default_factory=list)
    device: str = "auto"
    threads: int | None = None
    max_message_bytes: int = 2**29
    compression: str = "none"
    own_windows: int = 0
    state_dir: str | None = None


def plain(settings: Any) -> Any:
    """Settings as dicts, lists and values that YAML and JSON know; `reading.build` makes them again."""
    if isinstance(settings, Targets):
        return settings.plain()
    if dataclasses.is_dataclass(settings) and not isinstance(settings, Target):
        return {one.name: plain(getattr(settings, one.name)) for one in dataclasses.fields(settings)}
    if isinstance(settings, dict):
        return {name: plain(value) for name, value in settings.items()}
    if isinstance(settings, list | tuple):
        return [plain(value) for value in settings]
    return str(settings) if isinstance(settings, Target | Path) else settings
