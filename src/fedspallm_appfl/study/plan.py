"""What a study measures: several algorithms and targets on the same clients, with several seeds (docs/study.md)."""

import copy
import dataclasses
import difflib
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedspallm_appfl import __version__
from fedspallm_appfl.algorithms import registry
from fedspallm_appfl.errors import ConfigError, FedSpaLLMError, quoted
from fedspallm_appfl.models.lazy_model import Skeleton
from fedspallm_appfl.pruning import registry as pruners
from fedspallm_appfl.runs.further_models import folder_name
from fedspallm_appfl.settings import plugins, presets
from fedspallm_appfl.settings.presets import PRESETS
from fedspallm_appfl.settings.reading import load_config, read_config
from fedspallm_appfl.settings.schema import Config, Gram, Recovery, plain
from fedspallm_appfl.tensors.target import Target, parse_target
from fedspallm_appfl.tensors.targets import DEFAULT_KEY
from fedspallm_appfl.validation.files import check_with_files, unfit
from fedspallm_appfl.validation.rules import check, check_on_this_machine

DEFAULT = (
    "standalone",
    "fedprllm+wanda",
    "fedavg",
    "fedspallm",
    "consensus",
    "gram",
    "consensus+admm",
    "gram+admm",
    "gram+admm+fisher",
    "best",
    "centralized",
)
RUNS = "runs"  # a run directory for each cell


@dataclass(frozen=True)
class Method:
    """One item of `--algorithms`.

    Attributes:
        name: as it is spelled.
        algorithm: the algorithm.
        pruner: the pruner of all clients; None leaves it to the configuration.
        propagate: of `gram`.
        target: of `gram`.
        stride: of `gram`.
        allocation: how targets of matrices are chosen; None leaves it to the configuration.
        recovers: a round of recovery follows, or those of the configuration.
        preset: lies below all of these and above the configuration.
    """

    name: str
    algorithm: str
    pruner: str | None = None
    propagate: str = "dense"
    target: str = "own"
    stride: int = 0
    allocation: str | None = None
    recovers: bool = False
    preset: str | None = None

    @property
    def shares_uploads(self) -> bool:
        """Whether its uploads serve all targets and pruners."""
        return registry.find(self.algorithm).gathers and self.propagate == "dense" and not self.recovers

    def in_run_of(self, other: "Method") -> bool:
        """Whether a model of its kind can be made of the uploads of the other one's run."""
        alike = (self.pruner, self.allocation, self.preset) == (other.pruner, other.allocation, other.preset)
        return alike and not (self.recovers or other.recovers)


SHORTCUTS: dict[str, dict[str, Any]] = {
    "gram-sweep": {"algorithm": "gram", "propagate": "pruned"},
    "gram-blocks": {"algorithm": "gram", "propagate": "pruned", "stride": 1},
    "gram-dense": {"algorithm": "gram", "propagate": "pruned", "target": "dense"},
    "magnitude": {"algorithm": "fedprllm", "pruner": "magnitude"},
}
STAGES: dict[str, dict[str, Any]] = {"fisher": {"allocation": "fisher"}, "recovery": {"recovers": True}}


@dataclass(frozen=True)
class Plan:
    """What a study measures.

    Attributes:
        config: what all cells share; its seed, sparsity and algorithm are replaced.
        source: file that it was read from.
        overrides: key=value arguments that changed it.
        methods: the rows.
        targets: ratios or n:m, a table each.
        seeds: what mean and spread are over.
        out: the study's folder.
        keep_models: methods whose pruned models stay on disk.
        share_uploads: methods that make their models of the same uploads are measured in one run.
    """

    config: Config
    source: Path
    overrides: tuple[str, ...]
    methods: tuple[Method, ...]
    targets: tuple[Target, ...]
    seeds: tuple[int, ...]
    out: Path
    keep_models: tuple[str, ...] = ()
    share_uploads: bool = False

    def experiment(self, method: Method, target: Target, seed: int) -> Config:
        """The configuration of one cell."""
        made = copy.deepcopy(self.config)
        if method.preset:
            made, _ = read_config(presets.applied(plain(made), method.preset))
        made.algorithm, made.seed = method.algorithm, seed
        made.evaluation.compare = [other.algorithm for other in self.companions(method)]
        asked = dataclasses.replace(made.gram, propagate=method.propagate, target=method.target, stride=method.stride)
        made.gram = asked if registry.find(method.algorithm).gathers else Gram()
        made.recovery = made.recovery if registry.find(method.algorithm).federates else Recovery()
        for owner in (made.client_configs, *made.clients):
            owner.train_configs.sparsity = owner.train_configs.sparsity.with_default(target)
            owner.train_configs.pruner = method.pruner or owner.train_configs.pruner
        made.allocation.method = method.allocation or made.allocation.method
        made.recovery.rounds = max(made.recovery.rounds, int(method.recovers))
        made.run_dir = str(self.out / RUNS / f"{method.name}-{folder_name(str(target))}-seed{seed}")
        return made

    def companions(self, method: Method) -> list[Method]:
        """Methods that are measured in the run of another one, from its uploads."""
        if not (self.share_uploads and registry.find(method.algorithm).compares):
            return []
        return [one for one in self.methods if one.algorithm in registry.COMPARISONS and one.in_run_of(method)]

    def settings(self) -> dict[str, Any]:
        """What all cells have in common, in plain types."""
        shared = plain(self.config)
        shared |= {"run_dir": "", "seed": 0, "algorithm": "", "workers": ""}
        shared["evaluation"]["compare"] = []
        shared["gram"] |= {"propagate": "", "target": "", "stride": 0}
        for owner in (shared["client_configs"], *shared["clients"]):
            given = owner["train_configs"]["sparsity"]
            owner["train_configs"]["sparsity"] = given | {DEFAULT_KEY: ""} if isinstance(given, dict) else ""
        return {"fedspallm_appfl": __version__, **shared}

    def command(self) -> str:
        """The command that measures the same."""
        words = ["fedspallm", "study", str(self.source)]
        words += ["--algorithms", *(method.name for method in self.methods), "--sparsity", *map(str, self.targets)]
        words += ["--share-uploads"] * self.share_uploads
        words += ["--keep-models", *self.keep_models] if self.keep_models else []
        words += ["--seeds", *map(str, self.seeds), "--out", str(self.out)]
        return shlex.join([*words, *self.overrides])


def parse_method(text: str) -> Method:
    """Read NAME, NAME+PRUNER, and stages after it: NAME+PRUNER+fisher+recovery. A preset is a NAME with its own pruner.

    Raises:
        ConfigError: a name is none; lists the valid ones.
    """
    name, *more = text.split("+")
    _require("an algorithm", name, (*registry.names(), *SHORTCUTS, *PRESETS))
    made: dict[str, Any] = SHORTCUTS.get(name, {"algorithm": presets.of(name).get("algorithm", name)})
    made = made | ({"preset": name} if name in PRESETS else {})
    for word in more:
        _require(f"{text}: a pruner or a stage", word, (*pruners.names(), *STAGES))
        if word not in STAGES and {"pruner", "preset"} & made.keys():
            raise ConfigError(f"--algorithms: {text} names a pruner, and there is one already; leave out +{word}")
        made |= STAGES.get(word) or {"pruner": word}
    return Method(text, **made)


def _require(what: str, name: str, valid: Sequence[str]) -> None:
    if name not in valid:
        near = difflib.get_close_matches(name, valid, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"--algorithms: {what} is one of {', '.join(valid)}; got {quoted(name)}{hint}")


def planned(
    source: Path,
    overrides: Sequence[str],
    algorithms: Sequence[str],
    sparsity: Sequence[str] = (),
    seeds: Sequence[str] = (),
    out: Path | None = None,
    keep_models: Sequence[str] | None = None,
    share_uploads: bool = False,
) -> tuple[Plan, list[str]]:
    """Read what a study shall measure.

    Args:
        source: the configuration.
        overrides: `key=value`.
        algorithms: the methods as they are spelled.
        sparsity: targets; empty for that of the configuration.
        seeds: whole numbers; empty for that of the configuration.
        out: the study's folder; None for the configuration's run_dir with `-study` after it.
        keep_models: methods whose pruned models stay on disk; empty for all, None for none.
        share_uploads: methods that make their models of the same uploads are measured in one run.

    Returns:
        The plan, and everything that keeps some cell of it from being run.

    Raises:
        ConfigError: the file cannot be read as YAML, or an override has no `=`.
    """
    config, malformed = load_config(source, overrides)
    found, methods, targets = list(malformed), [], []
    plugins.load(config.plugins)
    for text in dict.fromkeys(algorithms):
        try:
            methods.append(parse_method(text))
        except ConfigError as error:
            found.append(str(error))
    for text in sparsity:
        try:
            targets.append(parse_target(text))
        except ValueError as error:
            found.append(f"--sparsity: {error}")
    strange = [name for name in keep_models or () if name not in algorithms]
    found += [f"--keep-models: {name} is no method of this study; they are {', '.join(algorithms)}" for name in strange]
    found += [f"--seeds: whole numbers from 0, got {quoted(seed)}" for seed in seeds if not seed.isdecimal()]
    if share_uploads and config.server_configs.num_global_epochs > 1:
        found.append("--share-uploads: uploads of later rounds differ by method; leave it out, or set one round")
    if out is None and not config.run_dir:
        found.append("--out: name a folder for the results, e.g. --out runs/study")
    plan = Plan(
        config,
        source,
        tuple(overrides),
        tuple(methods),
        tuple(dict.fromkeys(targets)) or (config.client_configs.train_configs.sparsity.default,),
        tuple(dict.fromkeys(int(seed) for seed in seeds if seed.isdecimal())) or (config.seed,),
        out or Path(f"{config.run_dir}-study"),
        () if keep_models is None else tuple(dict.fromkeys(keep_models or algorithms)),
        share_uploads,
    )
    return plan, found if malformed or not methods else [*found, *_problems(plan)]


def _problems(plan: Plan) -> list[str]:
    found: dict[str, list[str]] = {}
    for method, target, seed in cells_of(plan):
        config = plan.experiment(method, target, seed)
        for problem in [*check(config), *check_on_this_machine(config)]:
            found.setdefault(problem, []).append(method.name)
    everywhere = len(plan.methods)
    named = ((problem, list(dict.fromkeys(names))) for problem, names in found.items())
    listed = [p if len(names) == everywhere else f"{', '.join(names)}: {p}" for p, names in named]
    return [*listed, *_twice(plan), *_files(plan)]


def _twice(plan: Plan) -> Iterator[str]:
    """Methods that are the same by two names."""
    configured = plan.config.pruners()
    seen: dict[Method, str] = {}
    for method in plan.methods:
        same = dataclasses.replace(method, name="", pruner=method.pruner or configured)
        if same in seen:
            yield f"--algorithms: {method.name} is the same as {seen[same]}; name it once"
        seen[same] = method.name


def _files(plan: Plan) -> Iterator[str]:
    """What shows once model and text are opened."""
    if not plan.config.evaluation.texts:
        yield "evaluation.texts: a study compares perplexities; name some held-out text"
    strictest = max(
        plan.methods, key=lambda method: registry.find(method.algorithm).gathers
    )  # asks for enough tokens too
    yield from check_with_files(plan.experiment(strictest, plan.targets[0], plan.seeds[0]))
    with suppress(FedSpaLLMError):  # said above
        layout, given = Skeleton.of(plan.config).layout, plan.config.client_configs.train_configs.sparsity
        for target in plan.targets[1:]:
            yield from unfit(layout, given.with_default(target))


def _when(method: Method) -> tuple[bool, bool]:
    """What stands where: a method that others are measured with before them."""
    return method.shares_uploads, not registry.find(method.algorithm).compares


def cells_of(plan: Plan) -> Iterator[tuple[Method, Target, int]]:
    """Seed by seed, so that means over few seeds can be seen early; what shares uploads stands together."""
    for seed in plan.seeds:
        for method in sorted(plan.methods, key=_when):
            for target in plan.targets:
                yield method, target, seed
