"""Arrows point down: a file imports from its own layer or a lower one, and heavy packages stay where they belong."""

import ast
from fnmatch import fnmatch

import pytest

from conftest import ROOT

PACKAGE = ROOT / "src" / "fedspallm_appfl"
LAYERS = (
    # 0  pure mathematics and plain words
    "__init__ errors yaml_io dtypes devices events messages algorithms/* pruning/* native/* "
    "heap bitmask sparsity l0_aggregation mask_expansion layer_sampling votes exact_sum triangle",
    # 1  what travels and what rests
    "payload payload_bytes compression packed_store agreed_blocks checkpoint_files gram_payload gram_store sums_file "
    "model_identity object_stores s3_objects data_store places",
    # 2  models and data
    "blocks lazy_model calibration activations blockwise gram_sweep evaluation export",
    # 3  settings, and the two sides of a round
    "config config_rules globus_rules site estimate estimate_globus estimate_memory run_dir "
    "global_model folds local_client uploads",
    # 4  APPFL adaptors
    "appfl_adaptors/*",
    # 5  running
    "launch/* progress report estimate_tables site_check experiment further_models study* cli __main__",
)
FROM_LAYER = {
    "transformers": 2,
    "appfl": 4,
    "mpi4py": 4,
    "globus_compute_sdk": 4,
    "proxystore": 1,
    "boto3": 1,
    "redis": 1,
    "requests": 1,
}  # the lowest that may import it
FILES = {file.relative_to(PACKAGE).with_suffix("").as_posix(): file for file in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(file.read_text("utf-8")) for name, file in FILES.items()}


def layers_of(name):
    return [layer for layer, patterns in enumerate(LAYERS) if any(fnmatch(name, p) for p in patterns.split())]


def layer(name):
    return max(layers_of(name), default=0)


def imports(name):
    """Line and absolute dotted name of everything that a file imports, wherever in it the import stands."""
    package = ["fedspallm_appfl", *name.split("/")][:-1]
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            base += [node.module] if node.module else []
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)


def file_of(dotted):
    """The file of this package that a dotted name stands for or stands in; None for another package's."""
    root, *parts = dotted.split(".")
    if root != PACKAGE.name:
        return None
    options = ["/".join([*parts[:size], *end]) for size in range(len(parts), -1, -1) for end in ([], ["__init__"])]
    return next(option for option in options if option in FILES)


@pytest.mark.parametrize("name", FILES)
def test_every_file_has_one_layer(name):
    assert len(layers_of(name)) == 1, f"{name}.py: put it into one of the LAYERS"


def test_every_layer_lists_files_that_exist():
    patterns = " ".join(LAYERS).split()
    assert [pattern for pattern in patterns if not any(fnmatch(name, pattern) for name in FILES)] == []


@pytest.mark.parametrize("name", FILES)
def test_arrows_point_down(name):
    up = [
        f"line {line}: {dotted}"
        for line, dotted in imports(name)
        if (target := file_of(dotted)) and layer(target) > layer(name)
    ]
    assert up == []


@pytest.mark.parametrize("name", FILES)
def test_heavy_packages_stay_in_their_layers(name):
    too_low = [
        f"line {line}: {dotted}"
        for line, dotted in imports(name)
        if layer(name) < FROM_LAYER.get(dotted.split(".")[0], 0)
    ]
    assert too_low == []


def test_only_the_adaptors_import_appfl():
    others = [name for name in FILES if not name.startswith("appfl_adaptors/")]
    assert [name for name in others if any(dotted.split(".")[0] == "appfl" for _, dotted in imports(name))] == []


def test_validate_estimate_and_site_do_not_need_appfl():
    """Importing it takes seconds: nothing that the three import, at whatever place in a file, leads to it."""
    reached = set()
    left = ["config_rules", "globus_rules", "estimate_globus", "run_dir", "progress", "estimate_tables", "site_check"]
    while left:
        reached.add(name := left.pop())
        left += {file_of(dotted) for _, dotted in imports(name)} - reached - {None}
    assert len(reached) > 30
    assert sorted(name for name in reached if name.startswith(("appfl_adaptors", "launch"))) == []


def prints(tree):
    return [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "print"]


def test_nothing_prints_but_the_command_line_and_a_rank_that_aborts():
    [abort] = [node for node in ast.walk(TREES["launch/mpi"]) if getattr(node, "name", "") == "abort_on_failure"]
    allowed = {"launch/mpi": prints(abort)}
    found = {name: prints(tree) for name, tree in TREES.items() if name != "cli" and prints(tree)}
    assert {name: lines for name, lines in found.items() if lines != allowed.get(name)} == {}


def test_no_except_is_bare():
    assert [
        f"{name}.py:{node.lineno}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ] == []
